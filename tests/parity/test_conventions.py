"""Token ids and trained spans of whole conversations against the processors of transformers 5.23.

200 random conversations of each family: several turns, several pictures of any size, text with line ends and white
space at its ends. Templates are those of the published directories, with the generation tag that transformers asks for
to tell what is trained. What has no processor there is compared with fastchat (LLaVA v0 and v1) or with strings written
here after OpenFlamingo's code; Idefics 1 and BERT in ids alone. mmjax's own, generic and markers, have nothing to be
compared with.
"""

import random
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the `parity` extra")
pytest.importorskip("transformers", reason="needs the `parity` extra")

from parity import vocabularies
from PIL import Image as Pictures
from transformers import image_processing_backends  # noqa: F401  (the *Pil classes ask for it)
from transformers.processing_utils import ProcessorMixin

from mmjax.sequence.document import Document, Image, Text
from mmjax.sequence.interleave import Config, interleave
from mmjax.sequence.layout import layout, patches_of
from mmjax.tokenizers import text
from mmjax.tokenizers.chat import Chat
from mmjax.tokenizers.conventions import CONVENTIONS
from mmjax.tokenizers.resolution import Fixed, Native
from mmjax.tokenizers.tiles import AnyRes, PanAndScan, Splits, Tiles

COUNT = 200
WORDS = [
    "the cat",
    "sat on",
    "a mat",
    "hello you",
    "who is it?",
    "Привет",
    "日本語",
    "🙂",
    "42",
    "1,024",
    "it's",
    "Ünï",
]
EDGES = ["", "", "", " ", "\n", "\n\n", "  ", "\t"]


def words(rng: random.Random, plain: bool) -> str:
    body = rng.choice([" ", "\n", ", ", "  "]).join(rng.choices(WORDS, k=rng.randint(1, 6)))
    return body if plain else rng.choice(EDGES) + body + rng.choice(EDGES)


@dataclass
class Family:
    """How a convention is compared.

    template: the published chat template, with the generation tag.
    place: of pictures; "first": before the text of their turn.
    """

    vocabulary: str
    template: str
    processor: Any = None  # (tokenizer) → transformers' processor; None: the tokenizer alone
    names: dict[str, str] | None = None
    begin: str = ""
    policy: Any = None
    media: Any = patches_of
    system: bool = True
    pictures: int = 3  # at most in a turn
    place: str = "anywhere"
    plain: bool = False  # no white space at the ends of texts


def generation(body: str) -> str:
    return "{% generation %}" + body + "{% endgeneration %}"


CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ 'IMAGE' }}{% elif content['type'] == 'text' %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
)
CHATML = (
    "{% for message in messages %}SYSTEM{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == "
    "'assistant' %}{% generation %}"
    + CONTENT
    + "{{ '<|im_end|>' }}{% endgeneration %}{% else %}"
    + CONTENT
    + "{{ '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_SYSTEM = (
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
)
LLAVA_HF = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAMA_3 = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' }}{% set said %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<image>\n' }}{% else %}{{ content['text'] }}{% endif %}{% endfor %}{% endset %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ said | trim }}{{ '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ said | trim }}{{ '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
IDEFICS = (
    "START{% for message in messages %}{{message['role'].capitalize()}}{% if message['content'][0]['type'] == 'image' "
    "%}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{line['text']}}{{ '<end_of_utterance>' }}"
    "{% endgeneration %}{% else %}{{line['text']}}{% endif %}{% elif line['type'] == 'image' %}{{ '<image>' }}"
    "{% endif %}{% endfor %}{% if message['role'] != 'assistant' %}{{ '<end_of_utterance>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- if messages[0]['content'] is string -%}"
    "{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}{%- else -%}"
    "{%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}"
    "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set first_user_prefix = '' -%}"
    "{%- set loop_messages = messages -%}{%- endif -%}{%- for message in loop_messages -%}"
    "{%- if (message['role'] == 'assistant') -%}{%- set role = 'model' -%}{%- else -%}"
    "{%- set role = message['role'] -%}{%- endif -%}{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if "
    "loop.first else '') }}{%- if role == 'model' -%}{% generation %}{%- for item in message['content'] -%}"
    "{{ item['text'] | trim }}{%- endfor -%}{{ '<end_of_turn>' }}{% endgeneration %}{%- else -%}"
    "{%- for item in message['content'] -%}{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}"
    "{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}{{ '<end_of_turn>' }}"
    "{%- endif -%}{{ '\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}"
)
DEEPSEEK_NAMES = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
DEEPSEEK_NAMES |= {"image_token": "<image_placeholder>"}
DEEPSEEK = (  # which leaves out the end of an answer that nothing follows
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language.\n\n{% for message in messages %}"
    "{% if message['role'] == 'user' %}User: {% elif message['role'] == 'assistant' %}Assistant: {% else %}"
    "{{ message['role'].capitalize() }}: {% endif %}{% set said %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<image_placeholder>{% else %}{% set text = content['text'] %}"
    "{% if loop.first %}{% set text = text.lstrip() %}{% endif %}{% if loop.last %}{% set text = text.rstrip() %}"
    "{% endif %}{{ text }}{% endif %}{% endfor %}{% endset %}{% if message['role'] == 'user' %}{{ said + '\n\n' }}"
    "{% else %}{% generation %}{{ said + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def processor(name: str, images: str, settings: dict[str, Any], **more: Any) -> Any:
    """transformers' processor of a family, by the names of its folder and class."""
    import importlib

    def load(folder: str, kind: str, suffix: str) -> Any:
        return importlib.import_module(f"transformers.models.{folder.split('.')[0]}.{kind}_{suffix}")

    def make(tokenizer: Any) -> Any:
        folder, cls = images.split(".")
        found = load(folder, "image_processing_pil", folder)
        pixels = getattr(found, f"{cls}ImageProcessorPil")(**settings)
        folder, cls = name.split(".")
        made = getattr(load(folder, "processing", folder), f"{cls}Processor")(
            image_processor=pixels, tokenizer=tokenizer, **more
        )
        if "do_pan_and_scan" in settings:  # which the processor sets back to its own
            made.images_kwargs = made.images_kwargs | {
                k: v for k, v in settings.items() if k.startswith(("do_", "pan_"))
            }
        return made

    return make


@pytest.fixture(autouse=True)
def _any_part(monkeypatch):
    """Processors ask of what class their parts are, which needs torchvision for the part for videos."""
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)


def llava_next(tokenizer: Any) -> Any:
    settings = {
        "size": {"shortest_edge": 28},
        "crop_size": square(28),
        "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]],
    }
    more = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return processor("llava_next.LlavaNext", "llava_next.LlavaNext", settings, **more)(tokenizer)


def fours(grid: tuple[int, int, int]) -> int:
    return patches_of(grid) // 4


NATIVE = {"size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}}
LLAMA_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
IDEFICS3 = processor(
    "idefics3.Idefics3",
    "idefics3.Idefics3",
    {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 28}},
    image_seq_len=1,
)
FAMILIES = {
    "chatml": Family("qwen", CHATML.replace("SYSTEM", ""), pictures=0, names={"eos_token": "<|im_end|>"}),
    "qwen-vl": Family(
        "qwen",
        CHATML.replace("SYSTEM", QWEN_SYSTEM).replace("IMAGE", QWEN_IMAGE),
        processor("qwen2_vl.Qwen2VL", "qwen2_vl.Qwen2VL", NATIVE),
        {"eos_token": "<|im_end|>", "image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        policy=Native(14, 2, 56 * 56, 112 * 112),
        media=fours,
    ),
    "qwen3-vl": Family(
        "qwen",
        CHATML.replace("SYSTEM", "").replace("IMAGE", QWEN_IMAGE),
        processor("qwen2_vl.Qwen2VL", "qwen2_vl.Qwen2VL", NATIVE | {"patch_size": 16}),
        {"eos_token": "<|im_end|>", "image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        policy=Native(16, 2, 56 * 56, 112 * 112),
        media=fours,
    ),
    "internvl": Family(
        "qwen",
        CHATML.replace("SYSTEM", "").replace("IMAGE", "<IMG_CONTEXT>\n"),
        processor(
            "internvl.InternVL",
            "got_ocr2.GotOcr2",
            {"size": square(28), "crop_to_patches": True, "min_patches": 1, "max_patches": 6},
            image_seq_length=1,
        ),
        {
            "eos_token": "<|im_end|>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        policy=Tiles(14, 28, 1, 6),
        media=fours,
    ),
    "llava-hf": Family(
        "llama",
        LLAVA_HF,
        processor(
            "llava.Llava",
            "clip.CLIP",
            {"size": {"shortest_edge": 28}, "crop_size": square(28)},
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        ),
        {**LLAMA_NAMES, "pad_token": "<pad>", "image_token": "<image>"},
        begin="<s>",
        policy=Fixed(14, 28, 28, "crop", 28),
        place="first",
    ),
    "llava-llama-3": Family(
        "llama3",
        LLAMA_3,
        llava_next,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "image_token": "<image>"},
        begin="<|begin_of_text|>",
        policy=AnyRes(14, 28),
        place="first",
    ),
    "idefics2": Family(
        "llama",
        IDEFICS.replace("START", ""),
        processor(
            "idefics2.Idefics2",
            "idefics2.Idefics2",
            {"size": {"shortest_edge": 28, "longest_edge": 56}, "do_image_splitting": False},
            image_seq_len=4,
        ),
        {**LLAMA_NAMES, "image_token": "<image>", "image_boundary_token": "<fake_token_around_image>"},
        begin="<s>",
        policy=Fixed(14, 28, 28),
        media=patches_of,
    ),
    "idefics3": Family(
        "llama3",
        IDEFICS.replace("START", "<|begin_of_text|>"),
        IDEFICS3,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<end_of_utterance>", "image_token": "<image>"},
        begin="<|begin_of_text|>",
        policy=Splits(14, 28, 112),
        media=fours,
    ),
    "smolvlm": Family(
        "qwen",
        IDEFICS.replace("START", "<|im_start|>"),
        IDEFICS3,
        {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "image_token": "<image>"},
        policy=Splits(14, 28, 112),
        media=fours,
    ),
    "gemma-3": Family(
        "gemma",
        GEMMA,
        processor(
            "gemma3.Gemma3",
            "gemma3.Gemma3",
            {
                "size": square(28),
                "do_pan_and_scan": True,
                "pan_and_scan_min_crop_size": 20,
                "pan_and_scan_max_num_crops": 4,
                "pan_and_scan_min_ratio_to_activate": 1.2,
            },
            image_seq_length=4,
        ),
        {
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        policy=PanAndScan(14, 28, 20),
        media=patches_of,
    ),
    "deepseek-vl": Family(
        "short",
        DEEPSEEK,
        processor("deepseek_vl.DeepseekVL", "deepseek_vl.DeepseekVL", {"size": square(32)}, num_image_tokens=4),
        DEEPSEEK_NAMES,
        begin=DEEPSEEK_NAMES["bos_token"],
        policy=Fixed(16, 32, 32, "inset", 14),
        system=False,
    ),
}


def conversation(rng: random.Random, family: Family) -> list[dict[str, Any]]:
    """Messages as transformers takes them."""
    out = []

    def say(role: str, content: list[dict[str, Any]]) -> None:
        out.append({"role": role, "content": content})

    def told() -> dict[str, Any]:
        return {"type": "text", "text": words(rng, family.plain)}

    if family.system and rng.random() < 0.4:
        say("system", [told()])
    for _ in range(rng.randint(1, 3)):
        shown = []
        for _ in range(rng.randint(0, family.pictures)):
            size = rng.randint(20, 120), rng.randint(20, 120)
            shown.append({"type": "image", "image": Pictures.new("RGB", size, (200, 100, 50))})
        content = [*shown, told()]
        if family.place == "anywhere":
            rng.shuffle(content)
        say("user", content)
        say("assistant", [told()])
    if rng.random() < 0.3:
        say("user", [told()])
    return out


def document(name: str, messages: list[dict[str, Any]]) -> Document:
    spans = []
    for message in messages:
        for item in message["content"]:
            role = message["role"]
            if item["type"] == "image":
                spans.append(Image(item["image"].height, item["image"].width, b"", role))
            else:
                spans.append(Text(item["text"], role, role == "assistant"))
    return Document(name, tuple(spans))


def ours(x: Document, chat: Chat, family: Family, answer: int = 0) -> tuple[list[int], list[bool]]:
    """Ids and what is learnt; a newline counts as the picture's, as transformers has it."""
    laid = layout(x, chat, family.policy or Fixed(14, 28, 28), family.media, answer)
    made = interleave(laid, chat.vocab, Config(position="sequential"))
    learnt = [train for p in laid.pieces for train in [p.train] * p.length]
    ids = [chat.vocab.image if i == chat.vocab.image_newline else i for i in made.tokens.tolist()]
    assert made.weight.tolist() == [*map(float, learnt[1:]), 0.0]
    return (ids[:-answer], learnt[:-answer]) if answer else (ids, learnt)


def idefics2_answers(theirs: Any, tokenizer: Any, template: str, messages: list[dict[str, Any]]) -> list[int]:
    """What is trained, from the string that Idefics2's processor makes before it tokenizes."""
    fake = "<fake_token_around_image>"
    whole = theirs.apply_chat_template(messages, chat_template=template, tokenize=False)
    whole = whole.replace("<image>", fake + "<image>" * 4 + fake).replace(fake + fake, fake)
    whole = re.sub(rf"{fake}(?=[^\s<])", f"{fake} ", whole)
    ranges, at = [], 0
    for message in messages:
        if message["role"] == "assistant":
            answer = message["content"][0]["text"] + "<end_of_utterance>"
            at = whole.index(f"\nAssistant: {answer}", at) + len("\nAssistant: ")
            ranges.append((at, at + len(answer)))
    return [int(x) for x in expected(tokenizer, whole, ranges)[1]]


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_and_trained_spans_equal_the_processors(name, tmp_path):
    family, convention = FAMILIES[name], CONVENTIONS[name]
    path, tokenizer = vocabularies.pair(
        tmp_path, family.vocabulary, convention.symbols, family.begin, **(family.names or {})
    )
    chat = Chat(text.load(path), convention)
    theirs = family.processor(tokenizer) if family.processor else tokenizer
    rng = random.Random(name)
    seen = 0
    for n in range(COUNT):
        messages = conversation(rng, family)
        asked = messages[-1]["role"] == "user"
        if family.processor is None:
            messages = [m | {"content": m["content"][0]["text"]} for m in messages]
        wants = theirs.apply_chat_template(
            messages,
            chat_template=family.template,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=asked,
            **({} if asked else {"return_assistant_tokens_mask": True}),
        )
        if family.processor is None:
            messages = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
        ids, learnt = ours(document(f"{name}/{n}", messages), chat, family, 3 if asked else 0)
        want = np.asarray(wants["input_ids"]).reshape(-1).tolist()
        assert ids == want, (messages, tokenizer.decode(want), chat.decode(ids))
        if not asked:
            mask = np.asarray(wants["assistant_masks"]).reshape(-1).tolist()
            if name == "idefics2":  # its processor tells where the answers were before pictures became many tokens
                mask = idefics2_answers(theirs, tokenizer, family.template, messages)
            assert [int(x) for x in learnt] == mask, messages
            seen += sum(learnt)
    assert seen > COUNT


LLAVA_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)


def plain(rng: random.Random, pictures: int, turns: int, system: bool = False) -> list[dict[str, Any]]:
    """Messages whose pictures come first."""
    family = Family("", "", system=system, pictures=pictures, place="first")
    while True:
        messages = conversation(rng, family)
        if len([m for m in messages if m["role"] == "user"]) <= turns and messages[-1]["role"] == "assistant":
            return messages


def said(message: dict[str, Any], image: str) -> str:
    return "".join(image if item["type"] == "image" else item["text"] for item in message["content"])


def expected(tokenizer: Any, text: str, trained: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
    """The ids of a whole text, and which of them cover one of these ranges of characters."""
    made = tokenizer(text, return_offsets_mapping=True)
    covered = made["offset_mapping"]
    return made["input_ids"], [any(a < stop and start < b for start, stop in trained) for a, b in covered]


@pytest.mark.parametrize("name", ["llava-v0", "llava-v1"])
def test_llava_as_fastchat_writes_it(name, tmp_path):
    conversations = pytest.importorskip("fastchat.conversation")
    style = conversations.SeparatorStyle
    form = {
        "llava-v0": {"roles": ("Human", "Assistant"), "sep_style": style.ADD_COLON_SINGLE, "sep": "###"},
        "llava-v1": {"roles": ("USER", "ASSISTANT"), "sep_style": style.ADD_COLON_TWO, "sep": " ", "sep2": "</s>"},
    }[name]
    convention = CONVENTIONS[name]
    path, tokenizer = vocabularies.pair(tmp_path, "llama", convention.symbols, "<s>", **LLAMA_NAMES)
    chat, rng = Chat(text.load(path), convention), random.Random(name)
    family = Family("", "", policy=Fixed(14, 14, 14))
    for n in range(COUNT):
        messages = plain(rng, 1, 3)
        whole = conversations.Conversation(name, system_message=LLAVA_SYSTEM, messages=[], **form)
        trained = []
        for message in messages:
            whole.append_message(form["roles"][message["role"] == "assistant"], said(message, "<image>\n"))
            if message["role"] == "assistant":
                now = whole.get_prompt()
                end = len(form.get("sep2", form["sep"]))
                trained.append((len(now) - end - len(said(message, "")), len(now)))
        want = expected(tokenizer, whole.get_prompt(), trained)
        assert ours(document(f"{name}/{n}", messages), chat, family) == want, messages
        whole.append_message(form["roles"][0], "who?")
        whole.append_message(form["roles"][1], None)
        asked = document(f"{name}/{n}", [*messages, {"role": "user", "content": [{"type": "text", "text": "who?"}]}])
        assert ours(asked, chat, family, 3)[0] == tokenizer(whole.get_prompt())["input_ids"]


def test_idefics_by_its_processor(tmp_path):
    """Whose pictures are looked at by cross-attention: one token each."""
    from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
    from transformers.models.idefics.processing_idefics import IdeficsProcessor

    convention = CONVENTIONS["idefics"]
    path, tokenizer = vocabularies.pair(tmp_path, "llama", convention.symbols, "", **LLAMA_NAMES, image_token="<image>")
    theirs = IdeficsProcessor(IdeficsImageProcessorPil(image_size=28), tokenizer)
    chat, rng = Chat(text.load(path), convention), random.Random("idefics")
    for n in range(COUNT):
        # It takes spaces off both ends of every string, so there are none to compare.
        messages = conversation(rng, Family("", "", system=False, plain=True))
        prompt, before = [], ""
        for message in messages:
            before += f"{message['role'].capitalize()}:"
            before += "" if message["content"][0]["type"] == "image" else " "
            for item in message["content"]:
                if item["type"] == "image":
                    prompt += [before, item["image"]] if before else [item["image"]]
                    before = ""
                else:
                    before += item["text"]
            before += "<end_of_utterance>\n"
        prompt.append(before)
        assert all(x == x.strip(" ") for x in prompt if isinstance(x, str))
        want = np.asarray(theirs(text=[prompt], add_end_of_utterance_token=False)["input_ids"])[0].tolist()
        laid = layout(document(f"idefics/{n}", messages), chat, Fixed(14, 28, 28), fuse="cross")
        assert [i for p in laid.pieces for i in p.ids] == want, messages
        images = [i for i, p in enumerate(laid.pieces) if p.features]
        assert all(laid.pieces[i - 1].ids == (chat.controls["<image>"],) for i in images)


def test_paligemma_by_its_processor(tmp_path):
    from transformers.models.paligemma.processing_paligemma import PaliGemmaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    convention = CONVENTIONS["paligemma"]
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "image_token": "<image>"}
    path, tokenizer = vocabularies.pair(tmp_path, "gemma", convention.symbols, "", **names)
    pixels = SiglipImageProcessorPil(size=square(28))
    pixels.image_seq_length = 4
    theirs = PaliGemmaProcessor(pixels, tokenizer)
    chat, rng = Chat(text.load(path), convention), random.Random("paligemma")
    family = Family("", "", policy=Fixed(14, 28, 28))
    for n in range(COUNT):
        messages = plain(rng, 2, 1)
        while messages[0]["content"][0]["type"] == "text":  # it wants a picture
            messages = plain(rng, 2, 1)
        images = [item["image"] for item in messages[0]["content"] if item["type"] == "image"]
        prefix, suffix = said(messages[0], "<image>"), said(messages[1], "")
        want = theirs(images=[images], text=[prefix], suffix=[suffix])
        learnt = [kind == 1 for kind in want["token_type_ids"][0]]
        x = document(f"paligemma/{n}", messages)
        assert ours(x, chat, family) == (list(want["input_ids"][0]), learnt), messages
        asked = theirs(images=[images], text=[prefix])["input_ids"][0]
        assert ours(document("q", messages[:1]), chat, family, 2)[0] == list(asked)


def test_flamingo_as_open_flamingo_writes_it(tmp_path):
    """Its loaders' strings (train/data.py) and its masked labels (train/train_utils.py)."""
    convention = CONVENTIONS["flamingo"]
    path, tokenizer = vocabularies.pair(tmp_path, "llama", convention.symbols, "<s>", **LLAMA_NAMES)
    chat, rng = Chat(text.load(path), convention), random.Random("flamingo")
    for n in range(COUNT):
        chunks = [words(rng, False).strip() for _ in range(rng.randint(1, 4))]
        spans = []
        for chunk in chunks:
            spans += [Image(30, 40, b"", "document"), Text(chunk, "document", True)]
        whole = "".join(f"<|endofchunk|><image>{chunk}" for chunk in chunks).replace("<|endofchunk|>", "", 1)
        want = tokenizer(f"{whole}<|endofchunk|></s>")["input_ids"]
        laid = layout(Document(f"{n}", tuple(spans)), chat, Fixed(14, 14, 14), fuse="cross")
        assert [i for p in laid.pieces for i in p.ids] == want
        media, end, inside, learnt = chat.controls["<image>"], chat.controls["<|endofchunk|>"], False, []
        for i in want:
            inside = inside or i == media
            learnt.append(inside and i != media)
            inside = inside and i != end
        assert [p.train for p in laid.pieces for _ in p.ids] == [*learnt[:-1], True]  # ours learns to end, too


def test_segments_as_bert_writes_them(tmp_path):
    from transformers.models.bert import BertTokenizer

    vocabulary = vocabularies.file("bert")
    theirs = BertTokenizer(vocab=str(vocabulary))
    path = tmp_path / "tokenizer.json"
    theirs.backend_tokenizer.save(str(path))
    chat, rng = Chat(text.load(path), CONVENTIONS["segments"]), random.Random("segments")
    for n in range(COUNT):
        first, second = words(rng, False), words(rng, False)
        x = Document(f"{n}", (Text(first, "document"), Text(second, "document")))
        assert ours(x, chat, Family("", ""))[0] == theirs(first, second)["input_ids"]


INJECTIONS = [
    "<image>",
    "＜image＞",
    "<|im_start|>",
    "</s>",
    "<s>",
    "<0x41>",
    "ASSISTANT:",
    "<end_of_turn>",
    "▁",
    "<bos>",
]


@pytest.mark.parametrize("role", ["user", "system", "assistant"])
@pytest.mark.parametrize("name", [n for n in CONVENTIONS if n not in ("generic", "markers", "segments")])
def test_text_that_looks_like_a_marker_is_text(name, role, tmp_path):
    convention = CONVENTIONS[name]
    vocabulary = FAMILIES[name].vocabulary if name in FAMILIES else "gemma" if name == "paligemma" else "llama"
    path, _ = vocabularies.pair(tmp_path, vocabulary, convention.symbols)
    chat = Chat(text.load(path), convention)
    own = [*convention.symbols, *INJECTIONS]
    turns = {"system": "s", "user": "u", "assistant": "a"}

    def written(said: str) -> list[int]:
        spans = [Text(said if role == r else word, r, r == "assistant") for r, word in turns.items()]
        laid = layout(Document("d", tuple(spans)), chat, Fixed(14, 14, 14))
        return [i for p in laid.pieces for i in p.ids]

    controls = set(chat.controls.values())
    quiet = [i for i in written("x") if i in controls]
    for symbol in own:
        for hostile in (symbol, f"a {symbol} b", f"a{symbol}{symbol}\n", f"{symbol[:1]}{symbol}{symbol[1:]}"):
            ids = written(hostile)
            assert [i for i in ids if i in controls] == quiet, hostile
            assert hostile.strip() in chat.decode(ids)
