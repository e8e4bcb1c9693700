"""Every convention, written out by hand; tests/parity/test_conventions.py compares the ids with transformers."""

from dataclasses import replace

import pytest

from mmjax.core.errors import InputError
from mmjax.data import drawings
from mmjax.sequence.document import Audio, Document, Image, Text, Video
from mmjax.sequence.layout import layout
from mmjax.tokenizers import text
from mmjax.tokenizers.chat import Chat
from mmjax.tokenizers.convention import Convention, places, spelled, views
from mmjax.tokenizers.conventions import (
    CHATML,
    CONVENTIONS,
    FLAMINGO,
    GEMMA3,
    GENERIC,
    IDEFICS,
    IDEFICS2,
    IDEFICS3,
    LLAVA_LLAMA_3,
    LLAVA_V0,
    MARKERS,
    PALIGEMMA,
    QWEN_VL,
    SMOLVLM,
)
from mmjax.tokenizers.parts import BORDER, Around, Medium, Symbol, Words
from mmjax.tokenizers.resolution import Native

PICTURE = Image(8, 8, b"")
TALK = (
    Text("Be brief.", "system"),
    PICTURE,
    Text(" or "),
    PICTURE,
    Text(" best? "),
    Text("This.", "assistant", True),
    Text("Why?"),
    Text("So.", "assistant"),
)


def drawn(parts):
    """Parts as one string: ⟨symbols⟩, words, [the number of a medium's span], | a border; *what is learnt*."""
    out = ""
    for part in parts:
        if isinstance(part, Medium):
            out += f"{drawn(part.before)}[{part.span}]{drawn(part.after)}"
        else:
            said = f"⟨{part.symbol}⟩" if isinstance(part, Symbol) else "|" if part is BORDER else part.text
            out += f"*{said}*" if part.train else said
    return out


def written(convention, *spans, **options):
    return drawn(convention.parts(Document("d7", spans), **options))


VISION = "⟨<|vision_start|>⟩[{}]⟨<|vision_end|>⟩"
QWEN = [
    "⟨<|im_start|>⟩system\nBe brief.⟨<|im_end|>⟩\n",
    f"⟨<|im_start|>⟩user\n{VISION.format(1)} or {VISION.format(3)} best? ⟨<|im_end|>⟩\n",
    "⟨<|im_start|>⟩assistant\n*This.**⟨<|im_end|>⟩*\n",
    "⟨<|im_start|>⟩user\nWhy?⟨<|im_end|>⟩\n",
    "⟨<|im_start|>⟩assistant\nSo.⟨<|im_end|>⟩\n",
]
F, E = "⟨<fake_token_around_image>⟩", "⟨<end_of_utterance>⟩"
GLOBAL = "⟨<global-img>⟩"
IDEFICS_REST = [f"Assistant: *This.**{E}*\n", f"User: Why?{E}\n", f"Assistant: So.{E}\n"]
MARKED = "⟨<|text_start|>⟩{}⟨<|text_end|>⟩"
BOX = "⟨<|image_start|>⟩[{}]⟨<|image_end|>⟩"

# What is left out of TALK, where a family has no system or no second turn; and the conversation, a turn a line.
EXPECTED = {
    "generic": (
        (),
        "⟨<|begin|>⟩",
        "⟨<|system|>⟩Be brief.⟨<|end|>⟩",
        f"⟨<|user|>⟩{BOX.format(1)} or {BOX.format(3)} best? ⟨<|end|>⟩",
        "⟨<|assistant|>⟩*This.**⟨<|end|>⟩*",
        "⟨<|user|>⟩Why?⟨<|end|>⟩",
        "⟨<|assistant|>⟩So.⟨<|end|>⟩",
    ),
    "markers": (
        (),
        "⟨<|begin|>⟩",
        f"⟨<|system|>⟩{MARKED.format('Be brief.')}⟨<|end|>⟩",
        f"⟨<|user|>⟩{BOX.format(1)}{MARKED.format(' or ')}{BOX.format(3)}{MARKED.format(' best? ')}⟨<|end|>⟩",
        "⟨<|assistant|>⟩⟨<|text_start|>⟩*This.**⟨<|text_end|>⟩**⟨<|end|>⟩*",
        f"⟨<|user|>⟩{MARKED.format('Why?')}⟨<|end|>⟩",
        f"⟨<|assistant|>⟩{MARKED.format('So.')}⟨<|end|>⟩",
    ),
    "llava-v0": (
        (),
        "⟨<s>⟩Be brief.###",
        "Human: [1]\n[3]\n or  best? ###",
        "Assistant: *This.**###*",
        "Human: Why?###",
        "Assistant: So.###",
    ),
    "llava-v1": (
        (),
        "⟨<s>⟩Be brief. ",
        "USER: [1]\n[3]\n or  best?  ",
        "ASSISTANT: *This.**⟨</s>⟩*",
        "USER: Why? ",
        "ASSISTANT: So.⟨</s>⟩",
    ),
    "llava-hf": (
        (),
        "⟨<s>⟩Be brief. ",
        "USER: [1]\n[3]\n or   best?  ",
        "ASSISTANT: *This.** *",
        "USER: Why? ",
        "ASSISTANT: So. ",
    ),
    "llava-llama-3": (
        (),
        "⟨<|begin_of_text|>⟩",
        "⟨<|start_header_id|>⟩system⟨<|end_header_id|>⟩\n\nBe brief.⟨<|eot_id|>⟩",
        "⟨<|start_header_id|>⟩user⟨<|end_header_id|>⟩\n\n[1]\n[3]\n or  best?⟨<|eot_id|>⟩",
        "⟨<|start_header_id|>⟩assistant⟨<|end_header_id|>⟩\n\n*This.**⟨<|eot_id|>⟩*",
        "⟨<|start_header_id|>⟩user⟨<|end_header_id|>⟩\n\nWhy?⟨<|eot_id|>⟩",
        "⟨<|start_header_id|>⟩assistant⟨<|end_header_id|>⟩\n\nSo.⟨<|eot_id|>⟩",
    ),
    "deepseek-vl": (
        (),
        "⟨<｜begin▁of▁sentence｜>⟩",
        "Be brief.\n\n",
        "User: [1] or [3] best?\n\n",
        "Assistant: *This.**⟨<｜end▁of▁sentence｜>⟩*",
        "User: Why?\n\n",
        "Assistant: So.⟨<｜end▁of▁sentence｜>⟩",
    ),
    "llama-3.2-vision": (
        (),
        "⟨<|begin_of_text|>⟩",
        "⟨<|start_header_id|>⟩system⟨<|end_header_id|>⟩\n\nBe brief.⟨<|eot_id|>⟩",
        "⟨<|start_header_id|>⟩user⟨<|end_header_id|>⟩\n\n⟨<|image|>⟩[1] or ⟨<|image|>⟩[3] best? ⟨<|eot_id|>⟩",
        "⟨<|start_header_id|>⟩assistant⟨<|end_header_id|>⟩\n\n*This.**⟨<|eot_id|>⟩*",
        "⟨<|start_header_id|>⟩user⟨<|end_header_id|>⟩\n\nWhy?⟨<|eot_id|>⟩",
        "⟨<|start_header_id|>⟩assistant⟨<|end_header_id|>⟩\n\nSo.⟨<|eot_id|>⟩",
    ),
    "chatml": ((), *QWEN),
    "qwen-vl": ((), *QWEN),
    "qwen3-vl": ((), *QWEN),
    "internvl": (
        (),
        QWEN[0],
        "⟨<|im_start|>⟩user\n⟨<img>⟩[1]⟨</img>⟩\n or ⟨<img>⟩[3]⟨</img>⟩\n best? ⟨<|im_end|>⟩\n",
        *QWEN[2:],
    ),
    "pixtral": (
        (),
        "⟨<s>⟩⟨[INST]⟩Be brief.\n\n[1]⟨[IMG_END]⟩ or [3]⟨[IMG_END]⟩ best? ⟨[/INST]⟩",
        "*This.**⟨</s>⟩*",
        "⟨[INST]⟩Why?⟨[/INST]⟩",
        "So.⟨</s>⟩",
    ),
    "mistral-3": (
        (),
        "⟨<s>⟩⟨[SYSTEM_PROMPT]⟩Be brief.⟨[/SYSTEM_PROMPT]⟩",
        "⟨[INST]⟩[1]⟨[IMG_END]⟩ or [3]⟨[IMG_END]⟩ best? ⟨[/INST]⟩",
        "*This.**⟨</s>⟩*",
        "⟨[INST]⟩Why?⟨[/INST]⟩",
        "So.⟨</s>⟩",
    ),
    "kosmos-2": ((0, 6, 7), "⟨<s>⟩⟨<image>⟩[1]⟨</image>⟩ ⟨<image>⟩[3]⟨</image>⟩ orbest?", "*This.**⟨</s>⟩*"),
    "idefics": ((0,), "⟨<s>⟩", f"User:{F}[1]{F} or {F}[3]{F} best? {E}\n", *IDEFICS_REST),
    "idefics2": (
        (),
        "⟨<s>⟩",
        f"System: Be brief.{E}\n",
        f"User:{F}[1]{F} or {F}[3]{F} best? {E}\n",
        *IDEFICS_REST,
    ),
    "idefics3": (
        (),
        "⟨<|begin_of_text|>⟩",
        f"System: Be brief.{E}\n",
        f"User:{F}{GLOBAL}[1]{F} or {F}{GLOBAL}[3]{F} best? {E}\n",
        *IDEFICS_REST,
    ),
    "smolvlm": (
        (),
        "⟨<|im_start|>⟩",
        f"System: Be brief.{E}\n",
        f"User:{F}{GLOBAL}[1]{F} or {F}{GLOBAL}[3]{F} best? {E}\n",
        *IDEFICS_REST,
    ),
    "paligemma": ((0, 6, 7), "[1][3]⟨<bos>⟩ or  best? \n", "|*This.**⟨<eos>⟩*"),
    "blip-2": ((0, 6, 7), "[1][3]⟨</s>⟩ or  best?  ", "*This.**\n*"),
    "instructblip": ((0, 6, 7), "[1][3]⟨<s>⟩ or  best?  ", "*This.**⟨</s>⟩*"),
    "blip-2-t5": ((0, 6, 7), "[1][3] or  best? ⟨</s>⟩", "*This.**⟨</s>⟩*"),
    "gemma-3": (
        (),
        "⟨<bos>⟩",
        "⟨<start_of_turn>⟩user\nBe brief.\n\n",
        "\n\n⟨<start_of_image>⟩[1]⟨<end_of_image>⟩\n\nor\n\n⟨<start_of_image>⟩[3]⟨<end_of_image>⟩\n\nbest?⟨<end_of_turn>⟩\n",
        "⟨<start_of_turn>⟩model\n*This.**⟨<end_of_turn>⟩*\n",
        "⟨<start_of_turn>⟩user\nWhy?⟨<end_of_turn>⟩\n",
        "⟨<start_of_turn>⟩model\nSo.⟨<end_of_turn>⟩\n",
    ),
    "flamingo": (
        (0,),
        "⟨<s>⟩[1]",
        "⟨<|endofchunk|>⟩[3]Question: or  best? ",
        " Short answer:*This.*",
        "Question:Why?",
        " Short answer:So.",
        "⟨<|endofchunk|>⟩⟨</s>⟩",
    ),
    "segments": (
        (),
        "⟨[CLS]⟩",
        "Be brief.⟨[SEP]⟩",
        "[1] or ⟨[SEP]⟩[3] best? ⟨[SEP]⟩",
        "*This.**⟨[SEP]⟩*",
        "Why?⟨[SEP]⟩",
        "So.⟨[SEP]⟩",
    ),
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_a_conversation(name):
    skip, *turns = EXPECTED[name]
    assert written(CONVENTIONS[name], *TALK, skip=skip) == "".join(turns)


OPENS = {
    "generic": "Why?⟨<|end|>⟩⟨<|assistant|>⟩",
    "markers": "⟨<|text_end|>⟩⟨<|end|>⟩⟨<|assistant|>⟩",
    "llava-v0": "Why?###Assistant:",
    "llava-v1": "Why? ASSISTANT:",
    "llava-hf": "Why? ASSISTANT:",
    "llava-llama-3": "Why?⟨<|eot_id|>⟩⟨<|start_header_id|>⟩assistant⟨<|end_header_id|>⟩\n\n",
    "deepseek-vl": "User: [0]Why?\n\nAssistant:",
    "llama-3.2-vision": "Why?⟨<|eot_id|>⟩⟨<|start_header_id|>⟩assistant⟨<|end_header_id|>⟩\n\n",
    **dict.fromkeys(("chatml", "qwen-vl", "qwen3-vl", "internvl"), "Why?⟨<|im_end|>⟩\n⟨<|im_start|>⟩assistant\n"),
    **dict.fromkeys(("idefics", "idefics2", "idefics3", "smolvlm"), f"[0]{F}Why?{E}\nAssistant:"),
    **dict.fromkeys(("pixtral", "mistral-3"), "Why?⟨[/INST]⟩"),
    "kosmos-2": "⟨</image>⟩ Why?",
    "paligemma": "⟨<bos>⟩Why?\n",
    "blip-2": "⟨</s>⟩Why?",
    "instructblip": "⟨<s>⟩Why?",
    "blip-2-t5": "Why?⟨</s>⟩",
    "gemma-3": "Why?⟨<end_of_turn>⟩\n⟨<start_of_turn>⟩model\n",
    "flamingo": "Question:Why? Short answer:",
    "segments": "Why?⟨[SEP]⟩",
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_what_opens_an_answer(name):
    """It begins as the document does that has the answer, and nothing ends it."""
    question = written(CONVENTIONS[name], PICTURE, Text("Why?"), answer=True)
    assert question.endswith(OPENS[name])
    answered = written(CONVENTIONS[name], PICTURE, Text("Why?"), Text("So.", "assistant", True))
    assert answered.replace("|*", "*").startswith(question)


CAPTION = (replace(PICTURE, role="document"), Text(" A cat. ", "document", True))
CAPTIONED = {
    "generic": "⟨<|begin|>⟩⟨<|image_start|>⟩[0]⟨<|image_end|>⟩* A cat. **⟨<|end|>⟩*",
    "markers": "⟨<|begin|>⟩⟨<|image_start|>⟩[0]⟨<|image_end|>⟩⟨<|text_start|>⟩* A cat. **⟨<|text_end|>⟩**⟨<|end|>⟩*",
    "llava-v0": "⟨<s>⟩[0]\n* A cat. **⟨</s>⟩*",
    "llava-v1": "⟨<s>⟩[0]\n* A cat. **⟨</s>⟩*",
    "llava-hf": "⟨<s>⟩[0]\n* A cat. ** **⟨</s>⟩*",
    "llava-llama-3": "⟨<|begin_of_text|>⟩[0]\n* A cat. **⟨<|end_of_text|>⟩*",
    "deepseek-vl": "⟨<｜begin▁of▁sentence｜>⟩[0]* A cat. **⟨<｜end▁of▁sentence｜>⟩*",
    "llama-3.2-vision": "⟨<|image|>⟩[0]⟨<|begin_of_text|>⟩* A cat. **⟨<|end_of_text|>⟩*",
    **dict.fromkeys(("chatml", "qwen-vl", "qwen3-vl"), f"{VISION.format(0)}* A cat. **⟨<|endoftext|>⟩*"),
    "internvl": "⟨<img>⟩[0]⟨</img>⟩\n* A cat. **⟨<|endoftext|>⟩*",
    **dict.fromkeys(("pixtral", "mistral-3"), "⟨<s>⟩[0]⟨[IMG_END]⟩* A cat. **⟨</s>⟩*"),
    "kosmos-2": "⟨<s>⟩⟨<image>⟩[0]⟨</image>⟩ * A cat. **⟨</s>⟩*",
    "idefics": f"⟨<s>⟩{F}[0]{F}* A cat. **⟨</s>⟩*",
    "idefics2": f"⟨<s>⟩{F}[0]{F}* A cat. **⟨</s>⟩*",
    "idefics3": f"⟨<|begin_of_text|>⟩{F}{GLOBAL}[0]{F}* A cat. **⟨<|end_of_text|>⟩*",
    "smolvlm": f"⟨<|im_start|>⟩{F}{GLOBAL}[0]{F}* A cat. **⟨<|end_of_text|>⟩*",
    "paligemma": "[0]* A cat. **⟨<eos>⟩*",
    "blip-2": "[0]⟨</s>⟩* A cat. **\n*",
    "instructblip": "[0]⟨<s>⟩* A cat. **⟨</s>⟩*",
    "blip-2-t5": "[0]* A cat. **⟨</s>⟩*",
    "gemma-3": "⟨<bos>⟩\n\n⟨<start_of_image>⟩[0]⟨<end_of_image>⟩\n\n* A cat. **⟨<eos>⟩*",
    "flamingo": "⟨<s>⟩[0]* A cat. **⟨<|endofchunk|>⟩**⟨</s>⟩*",
    "segments": "⟨[CLS]⟩[0]* A cat. **⟨[SEP]⟩*",
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_what_is_no_conversation_is_written_as_it_is(name):
    """Without a system's text, no white space cut off, media where they are."""
    assert written(CONVENTIONS[name], *CAPTION) == CAPTIONED[name]


def test_markers_where_text_looks_at_pictures_by_cross_attention():
    assert written(
        IDEFICS, *TALK, fuse="cross", skip=(0,)
    ) == f"⟨<s>⟩User:{F}⟨<image>⟩[1]{F} or {F}⟨<image>⟩[3]{F} best? {E}\n" + "".join(IDEFICS_REST)
    assert (
        written(FLAMINGO, *TALK, fuse="cross", skip=(0, 3))
        == "⟨<s>⟩⟨<image>⟩[1]Question: or  best?  Short answer:*This.*Question:Why? Short answer:So."
        "⟨<|endofchunk|>⟩⟨</s>⟩"
    )
    # One that says nothing of it writes what comes before alone; sound stays in the sequence.
    sound = Audio(9, 1, lambda: None)
    assert written(GENERIC, PICTURE, sound, fuse="cross") == (
        "⟨<|begin|>⟩⟨<|user|>⟩⟨<|image_start|>⟩[0]⟨<|image_start|>⟩[1]⟨<|image_end|>⟩⟨<|end|>⟩"
    )


def test_a_marker_of_each_modality():
    video, sound = Video(2, 8, 8, 1.0, lambda: None), Audio(9, 1, lambda: None)
    assert written(MARKERS, PICTURE, video, sound) == (
        "⟨<|begin|>⟩⟨<|user|>⟩⟨<|image_start|>⟩[0]⟨<|image_end|>⟩⟨<|video_start|>⟩[1]⟨<|video_end|>⟩"
        "⟨<|audio_start|>⟩[2]⟨<|audio_end|>⟩⟨<|end|>⟩"
    )


def test_a_span_can_begin_a_turn():
    two = written(CHATML, Text("a"), Text("b"), Text("c", turn=True))
    assert two == "⟨<|im_start|>⟩user\nab⟨<|im_end|>⟩\n⟨<|im_start|>⟩user\nc⟨<|im_end|>⟩\n"


def test_the_end_of_a_turn_is_learnt_where_its_last_text_is():
    def said(*train):
        return written(CHATML, *(Text("a", "assistant", t) for t in train))

    opened = "⟨<|im_start|>⟩assistant\n"
    assert said(False, True) == f"{opened}a*a**⟨<|im_end|>⟩*\n"
    assert said(True, False) == f"{opened}*a*a⟨<|im_end|>⟩\n"
    shown = written(CHATML, Text("a", "assistant", True), replace(PICTURE, role="assistant"))
    assert shown == f"{opened}*a*{VISION.format(1)}⟨<|im_end|>⟩\n"


def test_where_media_stand():
    spans = (Text("a"), PICTURE, Text("b"))
    plain = Convention("plain", user=Around(("<",), (">",)))
    assert written(plain, *spans) == "<a[1]b>"
    assert written(replace(plain, media="first"), *spans) == "<[1]ab>"
    assert written(replace(plain, media="ahead"), *spans) == "[1]<ab>"


def test_what_is_stripped():
    spans = (Text(" a "), Text("\tb\n"), Text(" c "))
    plain = Convention("plain", user=Around(("<",), (">",)))
    assert written(plain, *spans) == "< a \tb\n c >"
    assert written(replace(plain, strip="turn"), *spans) == "<a \tb\n c>"
    assert written(replace(plain, strip="text"), *spans) == "<abc>"
    assert written(replace(plain, strip="turn"), Text(" \n")) == "<>"
    # A turn's white space goes through texts that are nothing else, as where a template trims all of it.
    assert written(replace(plain, strip="turn"), Text(" "), Text(" a "), Text(" ")) == "<a>"
    assert written(replace(plain, strip="turn"), Text(" "), PICTURE, Text(" ")) == "<[1]>"


def test_a_lead_stands_before_a_text_alone():
    plain = Convention("plain", user=Around(("<",), (">",)), lead=("_",))
    assert written(plain, Text("a"), PICTURE) == "<_a[1]>"
    assert written(plain, PICTURE, Text("a")) == "<[0]a>"
    assert written(plain, Text("a", "document")) == "a"


def test_a_system_text_where_a_conversation_has_none():
    question = (Text("Why?"),)
    said = QWEN_VL.default_system
    assert written(QWEN_VL, *question).startswith(f"⟨<|im_start|>⟩system\n{said}⟨<|im_end|>⟩\n⟨<|im_start|>⟩user\nWhy?")
    own = written(QWEN_VL, Text("Be brief.", "system"), *question)
    assert own.startswith("⟨<|im_start|>⟩system\nBe brief.⟨<|im_end|>⟩\n⟨<|im_start|>⟩user\nWhy?")
    assert said not in own
    assert written(LLAVA_V0, *question) == f"⟨<s>⟩{LLAVA_V0.default_system}###Human: Why?###"


def test_a_system_text_inside_the_first_question():
    parts = GEMMA3.parts(Document("d", (Text(" a ", "system"), Text(" b "))))
    assert drawn(parts) == "⟨<bos>⟩⟨<start_of_turn>⟩user\n a \n\nb⟨<end_of_turn>⟩\n"
    assert [p.span for p in parts if isinstance(p, Words)] == [-1, 0, -1, 1, -1]
    for wrong in (
        (Text("a", "system"),),
        (Text("a", "system"), Text("b", "assistant")),
        (Text("b"), Text("a", "system"), Text("b")),
    ):
        with pytest.raises(InputError, match=r"^Document 'd7' has a system turn .*gemma-3 cannot write"):
            written(GEMMA3, *wrong)


def test_one_question_and_one_answer():
    for wrong in (TALK[1:], (Text("a"), Text("b", turn=True))):
        with pytest.raises(InputError, match=r"^Document 'd7' has several turns of one role, but paligemma has one"):
            written(PALIGEMMA, *wrong)


def test_a_chunk_is_a_picture_and_what_is_said_of_it():
    """Its end is learnt where what is said is, in front of the next picture as at the end of the document."""
    said = [Text("a", "document", True), Text("b", "document")]
    shown = replace(PICTURE, role="document")
    close, end = "⟨<|endofchunk|>⟩", "⟨</s>⟩"
    assert written(FLAMINGO, shown, said[0], shown, said[1]) == f"⟨<s>⟩[0]*a**{close}*[2]b{close}{end}"
    assert written(FLAMINGO, said[1], shown, said[0]) == f"⟨<s>⟩b[1]*a**{close}**{end}*"
    talk = (PICTURE, Text("q"), Text("a", "assistant", True), PICTURE, Text("r"), Text("b", "assistant", True))
    assert written(FLAMINGO, *talk) == (
        f"⟨<s>⟩[0]Question:q Short answer:*a**{close}*[3]Question:r Short answer:*b**{close}**{end}*"
    )
    assert written(FLAMINGO, *talk[:2], answer=True) == "⟨<s>⟩[0]Question:q Short answer:"


def test_spans_that_are_left_out():
    """Turns close up where a whole one is left out; numbers stay those of the document."""
    assert written(CHATML, *TALK, skip=(0, 1, 2, 5)) == (
        f"⟨<|im_start|>⟩user\n{VISION.format(3)} best? Why?⟨<|im_end|>⟩\n{QWEN[4]}"
    )


def test_an_unknown_role_is_refused():
    tool = Text("b")
    object.__setattr__(tool, "role", "tool")  # as of a dataset's own class, which nothing checks
    with pytest.raises(InputError, match=r"^Document 'd7', span 1 has the role 'tool'; give one of system"):
        written(CHATML, Text("a"), tool)


EVERYTHING = (*TALK, Video(2, 8, 8, 1.0, lambda: None), Audio(9, 1, lambda: None))


def symbols_in(parts):
    for part in parts:
        if isinstance(part, Symbol):
            yield part.symbol
        elif isinstance(part, Medium):
            yield from symbols_in((*part.before, *part.after))


@pytest.mark.parametrize("name", CONVENTIONS)
def test_symbols_are_all_that_is_written(name):
    convention = CONVENTIONS[name]
    skip = (6, 7, 8, 9) if convention.one_turn else ()
    found = {convention.pad, convention.stop, convention.placeholder, convention.newline} - {""}
    for fuse in ("sequence", "cross"):
        for answer in (False, True):
            found |= set(symbols_in(convention.parts(Document("d", EVERYTHING), answer=answer, fuse=fuse, skip=skip)))
    found |= set(symbols_in(convention.parts(Document("d", CAPTION))))
    for rows in range(1, 7):
        for item in views(convention, 1 + rows * 6, rows) or ():
            found |= set() if isinstance(item, int) else set(symbols_in(item))
    found |= {convention.placeholder_video, convention.placeholder_audio, *convention.more} - {""}
    assert len(set(convention.symbols)) == len(convention.symbols)
    assert set(convention.symbols) == found


def test_symbols_of_tiles():
    places = {f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)}
    assert len(places) == 36
    for convention in (IDEFICS3, SMOLVLM):
        assert places <= set(convention.symbols)
        assert not any("{" in symbol for symbol in convention.symbols)


@pytest.mark.parametrize("name", CONVENTIONS)
def test_text_that_looks_like_symbols_stays_text(name):
    convention = CONVENTIONS[name]
    text = "".join(convention.symbols) + " <s> [INST] "
    spans = [Text("q"), Text("a", "assistant", True)]
    hostile = [replace(span, text=text) for span in spans]
    plain, parts = (convention.parts(Document("d", tuple(s))) for s in (spans, hostile))
    assert list(symbols_in(parts)) == list(symbols_in(plain))
    said = {p.span: p for p in parts if isinstance(p, Words) and p.span >= 0}
    expected = text if convention.strip == "nothing" else text.strip()
    assert {n: p.text for n, p in said.items()} == {0: expected, 1: expected}


INJECTIONS = ["<image>", "＜image＞", "<|im_start|>", "</s>", "<s>", "<0x41>", "ASSISTANT:", "[SEP]", "▁", "\0"]


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("name", ["generic", "markers", "segments"])
def test_text_that_looks_like_a_marker_is_text_in_ids(name, role):
    """Of the conventions that no published processor writes; the others are in tests/parity/test_conventions.py."""
    chat = Chat(text.load(drawings.tokenizer_model()), CONVENTIONS[name])
    turns = {"system": "s", "user": "u", "assistant": "a"}

    def ids(said):
        spans = [Text(said if role == r else word, r, r == "assistant") for r, word in turns.items()]
        laid = layout(Document("d", (PICTURE, *spans)), chat, Native(patch=4, min_pixels=1))
        return [i for p in laid.pieces for i in p.ids]

    controls = set(chat.controls.values())
    quiet = [i for i in ids("x") if i in controls]
    assert len(quiet) > 3
    for symbol in (*CONVENTIONS[name].symbols, *INJECTIONS):
        for hostile in (symbol, f"a {symbol} b", f"a{symbol}{symbol}\n", f"{symbol[:1]}{symbol}{symbol[1:]}"):
            found = ids(hostile)
            assert [i for i in found if i in controls] == quiet, hostile
            assert hostile in chat.decode(found), hostile


def drawn_views(convention, count, rows):
    return "".join(f"({item})" if isinstance(item, int) else drawn(item) for item in views(convention, count, rows))


def test_views_of_idefics_3():
    def tile(row, column):
        return f"{F}⟨<row_{row}_col_{column}>⟩({3 * row + column - 4})"

    assert drawn_views(IDEFICS3, 7, 2) == (
        f"{tile(1, 1)}{tile(1, 2)}{tile(1, 3)}\n{tile(2, 1)}{tile(2, 2)}{tile(2, 3)}\n\n{F}{GLOBAL}(6){F}"
    )
    assert drawn_views(IDEFICS3, 3, 2) == f"{tile(1, 1)}\n{F}⟨<row_2_col_1>⟩(1)\n\n{F}{GLOBAL}(2){F}"


def test_views_of_idefics_2_are_quarters_apart():
    assert drawn_views(IDEFICS2, 5, 2) == "".join(f"{F}({n}){F}" for n in range(5))


def test_places_of_tiles_as_words():
    """Idefics 3's own tokenizer has no tokens for them."""
    worded = replace(
        IDEFICS3,
        **{name: spelled(getattr(IDEFICS3, name), {"<row_{row}_col_{column}>"}) for name in ("image", "tiles")},
    )
    assert drawn_views(worded, 3, 1) == (f"{F}<row_1_col_1>(0){F}<row_1_col_2>(1)\n\n{F}{GLOBAL}(2){F}")
    assert worded.image == IDEFICS3.image
    assert set(IDEFICS3.symbols) - set(worded.symbols) == set(places("<row_{row}_col_{column}>"))
    with pytest.raises(InputError, match="tiles are more than the 6 × 6"):
        views(worded, 8, 7)


def test_views_of_gemma_3():
    def crop(n):
        return f"\n\n⟨<start_of_image>⟩({n})⟨<end_of_image>⟩\n\n"

    whole = (
        "Here is the original image \n\n⟨<start_of_image>⟩(0)⟨<end_of_image>⟩\n\n and here are some crops to help you "
        "see better "
    )
    assert drawn_views(GEMMA3, 7, 2) == (f"{whole}{crop(1)} {crop(2)} {crop(3)}{crop(4)} {crop(5)} {crop(6)}")
    assert drawn_views(GEMMA3, 3, 1) == f"{whole}{crop(1)} {crop(2)}"


def test_views_that_are_one_or_nothing_special():
    assert views(IDEFICS3, 1, 1) is None
    assert views(GEMMA3, 1, 0) is None
    assert views(CHATML, 7, 2) is None


def test_views_that_do_not_fit():
    assert len(views(IDEFICS3, 37, 6)) > 37
    for count, rows in ((8, 1), (8, 7)):
        with pytest.raises(InputError, match=r"tiles are more than the 6 × 6 that idefics3 has symbols"):
            views(IDEFICS3, count, rows)
    assert len(views(GEMMA3, 8, 1)) > 8  # its tiles have no places
    for convention in (IDEFICS3, GEMMA3):
        with pytest.raises(InputError, match="6 views are not the whole and 2 rows of tiles"):
            views(convention, 6, 2)


def test_a_turn_of_pictures_alone_has_no_edge_to_strip():
    assert written(LLAVA_LLAMA_3, PICTURE, answer=True) == (
        "⟨<|begin_of_text|>⟩⟨<|start_header_id|>⟩user⟨<|end_header_id|>⟩\n\n[0]\n⟨<|eot_id|>⟩"
        "⟨<|start_header_id|>⟩assistant⟨<|end_header_id|>⟩\n\n"
    )
