"""A directory in, text out: prompts with pictures through processor, encoder, cache and loop, against transformers.

Each directory holds a random model beside its processor and tokenizer. Greedy answers of 64 tokens are compared as long
as the likeliest token leads by more than 1e-4: behind a tie, both go on with something of their own.
"""

import json
import random

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the `parity` extra")
transformers = pytest.importorskip("transformers", reason="needs the `parity` extra")

from parity import vocabularies
from parity.harness import twin
from parity.test_processors import DIRECTORIES, directory, reference, write
from parity.test_videos import SIZES, Videos, clip
from PIL import Image as Pictures
from transformers.processing_utils import ProcessorMixin

from mmjax.convert import huggingface, processor
from mmjax.generate.session import Session
from mmjax.sequence.document import Document, Image, Text, Video

STEPS, MARGIN, END = 64, 1e-4, 2
BLOCKS = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = BLOCKS | {"num_key_value_heads": 2, "num_hidden_layers": 2}
CLIP = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, "num_hidden_layers": 3} | BLOCKS
M_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
QWEN = {"depth": 2, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
MODELS = {
    "llava": ("LlavaForConditionalGeneration", CLIP, TEXT | {"model_type": "llama"}),
    "llava_next": ("LlavaNextForConditionalGeneration", CLIP, TEXT | {"model_type": "llama"}),
    "llava_onevision": (
        "LlavaOnevisionForConditionalGeneration",
        {"model_type": "siglip_vision_model", "image_size": 60, "patch_size": 14, "num_hidden_layers": 2} | BLOCKS,
        TEXT | {"model_type": "qwen2"},
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        QWEN | {"embed_dim": 32, "hidden_size": 32},
        TEXT | {"rope_parameters": M_ROPE},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        QWEN
        | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "window_size": 56}
        | {"fullatt_block_indexes": [1], "tokens_per_second": 2},
        TEXT | {"rope_parameters": M_ROPE},
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        QWEN
        | {"patch_size": 16, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
        | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        TEXT | {"head_dim": 8, "rope_parameters": M_ROPE | {"mrope_interleaved": True}},
    ),
}


@pytest.fixture(autouse=True)
def _any_part(monkeypatch):
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)


def whole(folder, name):
    """A directory with everything, and transformers' model of it."""
    path = directory(folder, name, "five")
    config = json.loads((path / "config.json").read_text())
    cls, vision, text = MODELS[name]
    cls = getattr(transformers, cls)
    ids = {k: v for k, v in config.items() if k.endswith(("_token_id", "_token_index")) or k == "image_grid_pinpoints"}
    if name == "llava_onevision":
        ids["vision_aspect_ratio"] = "anyres_max_2"  # as its processor has it
    if "qwen" in name:
        tokens = json.loads((path / "tokenizer.json").read_text())["added_tokens"]
        found = {t["content"]: t["id"] for t in tokens}
        kinds = ("vision_start", "vision_end", "video_pad")
        ids |= {f"{k.replace('_pad', '')}_token_id": found[f"<|{k}|>"] for k in kinds}
    given = {k: v for k, v in vision.items() if "qwen" not in name or k != "model_type"}
    inner = text | {"vocab_size": config["text_config"]["vocab_size"]}
    model = twin(cls, cls.config_class(vision_config=given, text_config=inner, **ids))
    model.save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [END]}))
    return path, model


def asked(name):
    """Questions with one picture, two of different sizes, and none: messages, and documents."""
    noise = np.random.default_rng(0)
    sizes = {"one": [(70, 50)], "two": [(40, 90), (66, 31)], "none": []}
    for which, own in sizes.items():
        views = [noise.integers(0, 256, (*size, 3), np.uint8) for size in own]
        shown = [{"type": "image", "image": Pictures.fromarray(view)} for view in views]
        text = f"What about {which}?"
        messages = [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]
        spans = (*(Image(*view.shape[:2], view) for view in views), Text(text))
        yield messages, Document(which, spans)


def same(model, inputs, answers, least=STEPS + 1, alone=False):
    """Whether answers are transformers', up to a tie; at least so many tokens of all are compared.

    alone: they are a stream of their own, behind a first token.
    """
    compared = 0
    how = {"do_sample": False, "max_new_tokens": STEPS, "eos_token_id": END, "pad_token_id": 0}
    for given, answer in zip(inputs, answers, strict=True):
        out = model.generate(**given, **how, output_logits=True, return_dict_in_generate=True)
        want = out.sequences[0, 1 if alone else given["input_ids"].shape[1] :].tolist()
        lead = np.diff(np.sort(np.stack([x[0].numpy() for x in out.logits]), axis=1)[:, -2:])[:, 0]
        got = [*answer.ids, END] if answer.reason == "end" else list(answer.ids)
        equal = [a == b for a, b in zip(got, want, strict=False)]
        n = equal.index(False) if False in equal else len(want)
        assert n == len(want) == len(got) or lead[n] <= MARGIN, (n, lead[n], got, want)
        compared += n
    assert compared >= least, "ties came too early to compare anything"


@pytest.mark.parametrize("name", [n for n in DIRECTORIES if n in MODELS])
def test_greedy_answers(name, tmp_path):
    torch.set_num_threads(1)
    path, model = whole(tmp_path, name)
    theirs, ours = reference(path, name), processor.load(path)
    loaded = processor.with_colours(huggingface.load(path), ours)
    made = list(asked(name))
    answers = Session(loaded, ours).answer([document for _, document in made], max_tokens=STEPS)
    inputs = [
        theirs.apply_chat_template(m, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt")
        for m, _ in made
    ]
    same(model, inputs, answers)
    # Pictures matter.
    swapped = Document("two", (*made[1][1].spans[:2][::-1], made[1][1].spans[2]))
    assert Session(loaded, ours).answer([swapped], max_tokens=STEPS)[0].ids != answers[1].ids


def test_an_answer_after_a_video(tmp_path):
    """A clip whose times run past the text behind it: the answer goes on from the last token, not from the largest."""
    torch.set_num_threads(1)
    name, settings, fps = "qwen2_5_vl", SIZES["qwen2_5_vl"], 1.0
    path, model = whole(tmp_path, name)
    write(path, "video_preprocessor_config.json", settings | {"video_processor_type": "Qwen2VLVideoProcessor"})
    theirs, ours = reference(path, name), processor.load(path)
    video = clip(random.Random("clip"), 24, 60, 60)
    theirs.video_processor = Videos(name, settings, fps)
    content = [{"type": "text", "text": "see"}, {"type": "video", "video": video}, {"type": "text", "text": "what?"}]
    given = theirs.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    given = {k: torch.as_tensor(np.asarray(v)) for k, v in given.items() if k != "video_metadata"}
    rows = ("input_ids", "attention_mask", "mm_token_type_ids")
    given = {k: v.reshape(1, -1) if k in rows else v for k, v in given.items()}
    given["pixel_values_videos"] = given["pixel_values_videos"].float()
    document = Document("d", (Text("see"), Video(*video.shape[:3], fps, video), Text("what?")))
    positions = ours.batch([document]).position[0]
    session = Session(processor.with_colours(huggingface.load(path), ours), ours)
    answers = session.answer([document], max_tokens=STEPS)
    assert positions.max() > positions[answers[0].prompt - 1].max()
    same(model, [given], answers, 20)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_a_second_picture_changes_what_the_first_is_made_of_or_not(name, tmp_path):
    """OneVision shows a picture in tiles where it is alone, and whole where it is not: then nothing of it is kept."""
    path, _ = whole(tmp_path, name)
    ours = processor.load(path)
    loaded = processor.with_colours(huggingface.load(path), ours)
    views = [np.random.default_rng(n).integers(0, 256, (70 - 30 * n, 50 + 40 * n, 3), np.uint8) for n in range(2)]
    first, second = (Image(*view.shape[:2], view) for view in views)
    session = Session(loaded, ours)
    said = session.answer([Document("d", (first, Text("What is this?")))], max_tokens=5)[0]
    turns = (first, Text("What is this?"), Text(said.text, "assistant"), second, Text("and this?"))
    more = session.answer([Document("d", turns)], max_tokens=1)[0]
    fresh = Session(loaded, ours)
    fresh.answer([Document("d", turns)], max_tokens=1)
    np.testing.assert_allclose(session._state.logits, fresh._state.logits, atol=1e-4)
    assert (more.reused > said.prompt // 2) == (name != "llava_onevision")


TEXTS = {
    "Llama": {"num_key_value_heads": 1},
    "Mistral": {"sliding_window": 9},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Gemma": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 16},
    "Gemma3": {"head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 16, "num_hidden_layers": 7},
}


@pytest.mark.parametrize("name", TEXTS)
def test_greedy_texts(name, tmp_path):
    """Text alone, of different lengths in one batch, and windows that are shorter than what is said."""
    torch.set_num_threads(1)
    made, tokenizer = vocabularies.pair(tmp_path, "gemma", ("<pad>", "<eos>", "<bos>"), "<bos>", bos_token="<bos>")
    path = tmp_path / name
    sizes = TEXT | TEXTS[name] | {"vocab_size": max(tokenizer.get_vocab().values()) + 1, "pad_token_id": 0}
    ends = {"bos_token_id": 1, "eos_token_id": END}
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    model = twin(getattr(transformers, f"{name}ForCausalLM"), config(**sizes, **ends))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    made.replace(path / "tokenizer.json")
    ours = processor.load(path)
    assert ours.stops == (END,)
    texts = ["The quick brown fox jumps over", "a", "who is it? What colour has it?"]
    documents = [Document(text, (Text(text, "document"),)) for text in texts]
    answers = Session(huggingface.load(path), ours).answer(documents, max_tokens=STEPS)
    same(model, [tokenizer(text, return_tensors="pt", return_token_type_ids=False) for text in texts], answers)
