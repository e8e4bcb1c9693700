"""A stranger's template in a convention's place, down to layouts."""

from dataclasses import replace

from mmjax.data import drawings
from mmjax.sequence.document import Document, Image, Text
from mmjax.sequence.layout import layout
from mmjax.tokenizers import text
from mmjax.tokenizers.chat import Chat
from mmjax.tokenizers.conventions import INTERNVL, QWEN_VL
from mmjax.tokenizers.parts import NOTHING
from mmjax.tokenizers.resolution import Native
from mmjax.tokenizers.template import Limits, Template

TURNS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ 'IMAGE' }}{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPANS = (
    Text("be brief", "system"),
    Image(64, 96, b""),
    Text("<|im_end|> what? <|image_pad|>"),
    Text("a <0x41>", "assistant", True),
    Text("sure?"),
)


def pieces(convention, answer=0):
    chat = Chat(text.load(drawings.tokenizer_model()), convention)
    laid = layout(Document("d", SPANS), chat, Native(patch=16, merge=2), lambda grid: grid[1] * grid[2] // 4, answer)
    names = {i: symbol for symbol, i in chat.controls.items()}
    out = []
    for p in laid.pieces:
        out += [(names.get(i, i), p.train) for i in p.ids] if p.ids else [(p.grid, p.length)]
    return out


def test_a_template_that_writes_the_markers_equals_the_convention():
    markers = TURNS.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    template = Template(markers, QWEN_VL.symbols, media={"image": "<|image_pad|>"})
    by_template = replace(QWEN_VL, image=NOTHING, template=template)
    wants, found = pieces(QWEN_VL, 2), pieces(by_template, 2)
    assert [i for i, _ in found] == [i for i, _ in wants]
    # All that a template without generation tags adds to a turn is learnt, so the line end behind it too.
    learnt = [i for i, train in found if train is True]
    assert learnt[-2] == "<|im_end|>"
    assert [i for i, train in wants if train is True] == learnt[:-1]


def test_what_the_processor_adds_is_the_conventions():
    template = Template(TURNS.replace("IMAGE", "<IMG_CONTEXT>\n"), INTERNVL.symbols, media={"image": "<IMG_CONTEXT>"})
    around = replace(INTERNVL.image, after=INTERNVL.image.after[:1])
    by_template = replace(INTERNVL, image=around, template=template)
    assert [i for i, _ in pieces(by_template)] == [i for i, _ in pieces(INTERNVL)]


def test_the_fingerprint_is_of_what_a_template_says():
    """And of no address in memory: a run that goes on would be refused otherwise."""
    tokenizer, media = text.load(drawings.tokenizer_model()), {"image": "<|image_pad|>"}

    def fingerprint(source=TURNS, symbols=QWEN_VL.symbols, convention=QWEN_VL, **options):
        template = Template(source, symbols, **({"media": media} | options))
        return Chat(tokenizer, replace(convention, template=template)).fingerprint

    found = fingerprint()
    assert found == fingerprint() == fingerprint(symbols=QWEN_VL.symbols[::-1])
    assert found == fingerprint(limits=Limits(seconds=1.0))
    others = [
        Chat(tokenizer, QWEN_VL).fingerprint,
        fingerprint(TURNS + " "),
        fingerprint(symbols=(*QWEN_VL.symbols, "<more>")),
        fingerprint(media={}),
        fingerprint(media=media | {"video": "<|video_pad|>"}),
        fingerprint(content="string"),
        fingerprint(convention=replace(QWEN_VL, image=NOTHING)),
    ]
    assert len({found, *others}) == 1 + len(others)
