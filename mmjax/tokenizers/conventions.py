"""The conventions of published families, as data, by name; how each is compared is in tests/parity/test_conventions.py.

    generic     <|begin|><|user|>{text}<|end|><|assistant|>{text}<|end|>
    llava-v0    {system}###Human: <image>\\n{text}###Assistant: {text}###
    llava-v1    <s>{system} USER: <image>\\n{text} ASSISTANT: {text}</s>
    chatml      <|im_start|>user\\n{text}<|im_end|>\\n<|im_start|>assistant\\n{text}<|im_end|>\\n
    flamingo    <image>{text}<|endofchunk|>
    pixtral     <s>[INST][IMG]…[IMG_BREAK][IMG]…[IMG_END]{text}[/INST]{text}</s>
    kosmos-2    <s><image>…</image> {text}</s>
    paligemma   <image>…<bos>{text}\\n{text}<eos>
    segments    [CLS]{text}[SEP]{text}[SEP]

Every media marker below stands for as many placeholders as the picture has media tokens.
"""

import difflib
from dataclasses import replace

from mmjax.core.errors import InputError
from mmjax.tokenizers.convention import Convention, Frames, Tiles
from mmjax.tokenizers.parts import Around, Symbol

S = Symbol

# What tokenizers trained here have (vocab.CONTROLS): one pair of markers for all media.
_MEDIUM = Around((S("<|image_start|>"),), (S("<|image_end|>"),))
GENERIC = Convention(
    "generic",
    begin=(S("<|begin|>"),),
    document=Around((), (S("<|end|>"),)),
    system=Around((S("<|system|>"),), (S("<|end|>"),)),
    user=Around((S("<|user|>"),), (S("<|end|>"),)),
    assistant=Around((S("<|assistant|>"),), (S("<|end|>"),)),
    image=_MEDIUM,
    video=_MEDIUM,
    audio=_MEDIUM,
    pad="<|pad|>",
    stop="<|end|>",
    placeholder="<|image|>",
)

# The same with a pair of markers, and a placeholder, for each modality.
MARKERS = replace(
    GENERIC,
    name="markers",
    text=Around((S("<|text_start|>"),), (S("<|text_end|>"),)),
    video=Around((S("<|video_start|>"),), (S("<|video_end|>"),)),
    audio=Around((S("<|audio_start|>"),), (S("<|audio_end|>"),)),
    placeholder_video="<|video|>",
    placeholder_audio="<|audio|>",
)

# Liu et al. 2023, "Visual instruction tuning": conv_llava_v0 of llava/conversation.py, at inference.
LLAVA_V0 = Convention(
    "llava-v0",
    begin=(S("<s>"),),
    document=Around((), (S("</s>"),)),
    system=Around((), ("###",)),
    user=Around(("Human: ",), ("###",)),
    assistant=Around(("Assistant: ",), ("###",)),
    image=Around((), ("\n",)),
    prompt=("Assistant:",),
    default_system="A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions.",
    media="first",
    pad="<unk>",
    stop="</s>",
    placeholder="<image>",
)

# Liu et al. 2024, "Improved baselines with visual instruction tuning": conv_llava_v1 (Vicuna's, with LLaVA's system).
LLAVA_V1 = replace(
    LLAVA_V0,
    name="llava-v1",
    system=Around((), (" ",)),
    user=Around(("USER: ",), (" ",)),
    assistant=Around(("ASSISTANT: ",), (S("</s>"),)),
    prompt=("ASSISTANT:",),
)

# The template of Hugging Face's LLaVA-1.5 directories: pictures first, a space after every text, no end of a turn.
LLAVA_HF = Convention(
    "llava-hf",
    begin=(S("<s>"),),
    document=Around((), (S("</s>"),)),
    user=Around(("USER: ",)),
    assistant=Around(("ASSISTANT: ",)),
    text=Around((), (" ",)),
    image=Around((), ("\n",)),
    prompt=("ASSISTANT:",),
    media="first",
    pad="<pad>",
    stop="</s>",
    placeholder="<image>",
)


def _headed(role: str) -> Around:
    """Llama 3's turn (Dubey et al. 2024, "The Llama 3 herd of models"; llama_models' chat_format)."""
    return Around((S("<|start_header_id|>"), role, S("<|end_header_id|>"), "\n\n"), (S("<|eot_id|>"),))


# LLaVA-NeXT with Llama 3 (conv_llava_llama_3).
LLAVA_LLAMA_3 = Convention(
    "llava-llama-3",
    begin=(S("<|begin_of_text|>"),),
    opens=False,
    document=Around((), (S("<|end_of_text|>"),)),
    system=_headed("system"),
    user=_headed("user"),
    assistant=_headed("assistant"),
    image=Around((), ("\n",)),
    media="first",
    strip="turn",
    pad="<|end_of_text|>",
    stop="<|eot_id|>",
    placeholder="<image>",
    newline="<image_newline>",  # not in their vocabulary: a vector of the model's own, here the token table's last
)

# Llama 3.2 Vision, whose text looks at pictures from beside: a marker stands for each (llama_models' chat_format).
LLAMA_VISION = replace(
    LLAVA_LLAMA_3,
    name="llama-3.2-vision",
    image=Around((S("<|image|>"),)),
    media="before_begin",
    strip="nothing",
    pad="<|finetune_right_pad_id|>",
    placeholder="",
    newline="",
)


def _chatml(role: str) -> Around:
    return Around((S("<|im_start|>"), f"{role}\n"), (S("<|im_end|>"), "\n"))


CHATML = Convention(
    "chatml",
    document=Around((), (S("<|endoftext|>"),)),
    system=_chatml("system"),
    user=_chatml("user"),
    assistant=_chatml("assistant"),
    image=Around((S("<|vision_start|>"),), (S("<|vision_end|>"),)),
    pad="<|endoftext|>",
    stop="<|im_end|>",
    placeholder="<|image_pad|>",
)

# Wang et al. 2024, Qwen2-VL; Qwen2.5-VL writes the same.
QWEN_VL = replace(
    CHATML,
    name="qwen-vl",
    video=Around((S("<|vision_start|>"),), (S("<|vision_end|>"),)),
    default_system="You are a helpful assistant.",
    placeholder_video="<|video_pad|>",
)
QWEN3_VL = replace(QWEN_VL, name="qwen3-vl", default_system=None)

# Chen et al. 2024, InternVL 2.5 and 3, in Hugging Face's directories.
INTERNVL = replace(
    CHATML, name="internvl", image=Around((S("<img>"),), (S("</img>"), "\n")), placeholder="<IMG_CONTEXT>"
)

# Agrawal et al. 2024, Pixtral 12B, with the tokens of mistral-common's v3; the system's text stands in the question.
PIXTRAL = Convention(
    "pixtral",
    begin=(S("<s>"),),
    document=Around((), (S("</s>"),)),
    system=Around((), ("\n\n",)),
    user=Around((S("[INST]"),), (S("[/INST]"),)),
    assistant=Around((), (S("</s>"),)),
    image=Around((), (S("[IMG_END]"),)),
    prompt=(),
    system_into_user=True,
    pad="<pad>",
    stop="</s>",
    placeholder="[IMG]",
    newline="[IMG_BREAK]",
)
# Mistral Small 3.1: v7, whose system has tokens of its own.
MISTRAL3 = replace(
    PIXTRAL,
    name="mistral-3",
    system=Around((S("[SYSTEM_PROMPT]"),), (S("[/SYSTEM_PROMPT]"),)),
    system_into_user=False,
)

# Peng et al. 2023, Kosmos-2, section 3: a picture, and text that goes on; places in pictures are words.
KOSMOS2 = Convention(
    "kosmos-2",
    begin=(S("<s>"),),
    opens=False,
    document=Around((), (S("</s>"),)),
    assistant=Around((), (S("</s>"),)),
    image=Around((S("<image>"),), (S("</image>"), " ")),
    prompt=(),
    media="first",
    strip="text",
    one_turn=True,
    pad="<pad>",
    stop="</s>",
    placeholder="<unk>",
    numbered=True,
)

# Laurençon et al. 2023, OBELICS and IDEFICS: a picture is one token, looked at by cross-attention.
_FAKE = S("<fake_token_around_image>")
IDEFICS = Convention(
    "idefics",
    begin=(S("<s>"),),
    opens=False,
    document=Around((), (S("</s>"),)),
    user=Around(("User:",), (S("<end_of_utterance>"), "\n")),
    assistant=Around(("Assistant:",), (S("<end_of_utterance>"), "\n")),
    lead=(" ",),
    image=Around((_FAKE,), (_FAKE,), Around((_FAKE, S("<image>")), (_FAKE,))),
    once=(_FAKE.symbol,),
    pad="<unk>",
    stop="<end_of_utterance>",
)
# Laurençon et al. 2024, "What matters when building vision-language models?"
IDEFICS2 = Convention(
    "idefics2",
    begin=(S("<s>"),),
    document=Around((), (S("</s>"),)),
    system=Around(("System:",), (S("<end_of_utterance>"), "\n")),
    user=Around(("User:",), (S("<end_of_utterance>"), "\n")),
    assistant=Around(("Assistant:",), (S("<end_of_utterance>"), "\n")),
    lead=(" ",),
    image=Around((_FAKE,), (_FAKE,)),
    tiles=Tiles("whole_last", tile=Around((_FAKE,), (_FAKE,)), whole=Around((_FAKE,), (_FAKE,))),
    once=(_FAKE.symbol,),
    gap=(_FAKE.symbol,),
    pad="<unk>",
    stop="<end_of_utterance>",
    placeholder="<image>",
)
# Laurençon et al. 2024, "Building and better understanding vision-language models", section 2.2.
IDEFICS3 = Convention(
    "idefics3",
    begin=(S("<|begin_of_text|>"),),
    opens=False,
    document=Around((), (S("<|end_of_text|>"),)),
    system=Around(("System:",), (S("<end_of_utterance>"), "\n")),
    user=Around(("User:",), (S("<end_of_utterance>"), "\n")),
    assistant=Around(("Assistant:",), (S("<end_of_utterance>"), "\n")),
    lead=(" ",),
    image=Around((_FAKE, S("<global-img>")), (_FAKE,)),
    tiles=Tiles(
        "whole_last",
        tile=Around((_FAKE, S("<row_{row}_col_{column}>"))),
        row=("\n",),
        whole=Around(("\n", _FAKE, S("<global-img>")), (_FAKE,)),
    ),
    pad="<|end_of_text|>",
    stop="<end_of_utterance>",
    placeholder="<image>",
)
SMOLVLM = replace(
    IDEFICS3,
    name="smolvlm",
    begin=(S("<|im_start|>"),),
    frames=Frames(
        "\nFrame from {minute:02d}:{second:02d}:",
        Around((_FAKE, S("<global-img>")), (_FAKE,)),
        before="You are provided the following series of {count} frames from a {hours}:{minute:02d}:{second:02d} "
        "[H:MM:SS] video.\n",
        after="\n\n",
    ),
    pad="<|im_end|>",
)

# Beyer et al. 2024, PaliGemma: pictures, then <bos>; the answer is a string of its own.
PALIGEMMA = Convention(
    "paligemma",
    document=Around((), (S("<eos>"),)),
    user=Around((S("<bos>"),), ("\n",)),
    assistant=Around((), (S("<eos>"),)),
    prompt=(),
    media="ahead",
    apart=True,
    one_turn=True,
    pad="<pad>",
    stop="<eos>",
    placeholder="<image>",
)

# Li et al. 2023, BLIP-2, with OPT: queries, then </s>, the prompt and what is said, which a line's end ends.
BLIP2 = Convention(
    "blip-2",
    begin=(S("</s>"),),
    end=("\n",),
    assistant=Around((" ",)),
    prompt=(),
    media="before_all",
    one_turn=True,
    pad="<pad>",
    stop="</s>",
    placeholder="<image>",
)

# Dai et al. 2023, InstructBLIP, with Vicuna.
INSTRUCTBLIP = replace(BLIP2, name="instructblip", begin=(S("<s>"),), end=(S("</s>"),), pad="[PAD]")
# BLIP-2 and InstructBLIP with T5, whose encoder reads what is before the answer.
BLIP2_T5 = replace(
    BLIP2,
    name="blip-2-t5",
    begin=(),
    end=(S("</s>"),),
    user=Around((), (S("</s>"),)),
    assistant=Around(),
)

_GEMMA_IMAGE = Around(("\n\n", S("<start_of_image>")), (S("<end_of_image>"), "\n\n"))
# Gemma Team 2025, Gemma 3.
GEMMA3 = Convention(
    "gemma-3",
    begin=(S("<bos>"),),
    opens=False,
    document=Around((), (S("<eos>"),)),
    system=Around((), ("\n\n",)),
    user=Around((S("<start_of_turn>"), "user\n"), (S("<end_of_turn>"), "\n")),
    assistant=Around((S("<start_of_turn>"), "model\n"), (S("<end_of_turn>"), "\n")),
    image=_GEMMA_IMAGE,
    strip="text",
    system_into_user=True,
    tiles=Tiles(
        "whole_first",
        tile=_GEMMA_IMAGE,
        between=(" ",),
        whole=Around(
            ("Here is the original image \n\n", S("<start_of_image>")),
            (S("<end_of_image>"), "\n\n and here are some crops to help you see better "),
        ),
    ),
    pad="<pad>",
    stop="<end_of_turn>",
    placeholder="<image_soft_token>",
)

# Lu et al. 2024, DeepSeek-VL, in Hugging Face's directories.
DEEPSEEK_VL = Convention(
    "deepseek-vl",
    begin=(S("<｜begin▁of▁sentence｜>"),),
    document=Around((), (S("<｜end▁of▁sentence｜>"),)),
    system=Around((), ("\n\n",)),
    user=Around(("User: ",), ("\n\n",)),
    assistant=Around(("Assistant: ",), (S("<｜end▁of▁sentence｜>"),)),
    prompt=("Assistant:",),
    default_system="You are a helpful language and vision assistant. You are able to understand the visual content "
    "that the user provides, and assist the user with a variety of tasks using natural language.",
    strip="turn",
    pad="<｜end▁of▁sentence｜>",
    stop="<｜end▁of▁sentence｜>",
    placeholder="<image_placeholder>",
)

# Alayrac et al. 2022, Flamingo, section 3.1, as OpenFlamingo writes it: a chunk is a picture and what is said of it.
FLAMINGO = Convention(
    "flamingo",
    begin=(S("<s>"),),
    end=(S("</s>"),),
    user=Around(("Question:",)),
    assistant=Around((" Short answer:",)),
    image=Around((), (), Around((S("<image>"),))),
    media="ahead",
    chunk=(S("<|endofchunk|>"),),
    pad="<PAD>",
    stop="<|endofchunk|>",
)

# Devlin et al. 2019, BERT, and Li et al. 2019, VisualBERT: texts apart by [SEP]; which is which, a learnt vector says.
SEGMENTS = Convention(
    "segments",
    begin=(S("[CLS]"),),
    text=Around((), (S("[SEP]"),)),
    pad="[PAD]",
    stop="[SEP]",
    placeholder="[IMG]",
    more=("[MASK]",),
)

CONVENTIONS = {
    convention.name: convention
    for convention in (
        GENERIC,
        MARKERS,
        LLAVA_V0,
        LLAVA_V1,
        LLAVA_HF,
        LLAVA_LLAMA_3,
        LLAMA_VISION,
        CHATML,
        QWEN_VL,
        QWEN3_VL,
        INTERNVL,
        PIXTRAL,
        MISTRAL3,
        KOSMOS2,
        IDEFICS,
        IDEFICS2,
        IDEFICS3,
        SMOLVLM,
        PALIGEMMA,
        BLIP2,
        INSTRUCTBLIP,
        BLIP2_T5,
        GEMMA3,
        DEEPSEEK_VL,
        FLAMINGO,
        SEGMENTS,
    )
}


def find(name: str | Convention) -> Convention:
    """A convention by name, or one of its owner's as it is; InputError names the nearest."""
    if isinstance(name, Convention):
        return name
    if name not in CONVENTIONS:
        near = difflib.get_close_matches(name, CONVENTIONS, 1, 0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"There is no convention {name!r}: {hint}There are {', '.join(CONVENTIONS)}.")
    return CONVENTIONS[name]
