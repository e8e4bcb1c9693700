"""Pictures in tiles with text between them, and media with placeholders of their own: from document to batch."""

from dataclasses import replace

import numpy as np
import pytest

from mmjax.core.errors import InputError
from mmjax.sequence.batch import Bucket, Values, build
from mmjax.sequence.document import Audio, Document, Image, Text, Video
from mmjax.sequence.interleave import Config, interleave
from mmjax.sequence.invariants import check
from mmjax.sequence.layout import AUDIO, IMAGE, TEXT, VIDEO, layout
from mmjax.tokenizers.audio import Frames
from mmjax.tokenizers.chat import Chat
from mmjax.tokenizers.conventions import GEMMA3, GENERIC, IDEFICS, IDEFICS3, MARKERS
from mmjax.tokenizers.resolution import Fixed
from mmjax.tokenizers.tiles import AnyRes, PanAndScan, Splits, Tiles
from mmjax.tokenizers.video import Sampled

PATCH, VALUES, LETTERS = 4, 48, 128
SEQUENTIAL = Config(position="sequential")


class Letters:
    """A token for every ASCII letter; control tokens behind them."""

    exact, fingerprint = True, "letters"

    def __init__(self, symbols=()):
        self.controls = {symbol: LETTERS + n for n, symbol in enumerate(symbols)}
        self.size = LETTERS + len(symbols)

    def with_controls(self, symbols):
        return Letters(symbols)

    def encode(self, text, *, start=True):
        return list(text.encode("ascii"))

    def offsets(self, text, *, start=True):
        return self.encode(text), [(n, n + 1) for n in range(len(text))]

    def decode(self, ids):
        return bytes(ids).decode("ascii")


def chat(convention):
    return Chat(Letters(), convention)


def told(x, tokenizer):
    """A document's tokens as a string: letters, ⟨symbols⟩, and · where a media token goes."""
    symbols = {n: f"⟨{symbol}⟩" for symbol, n in tokenizer.controls.items()}
    return "".join(
        "·" if slot >= 0 else symbols.get(token) or chr(token)
        for token, slot in zip(x.tokens.tolist(), x.slot, strict=True)
    )


TALK = Document(
    "d7",
    (Image(16, 24, b""), Text("hi"), Image(8, 8, b""), Text("yes", "assistant", True), Text("so", "assistant", True)),
)
F, E = "⟨<fake_token_around_image>⟩", "⟨<end_of_utterance>⟩"
TILES = "\n".join("".join(f"{F}⟨<row_{r}_col_{c}>⟩····" for c in (1, 2, 3)) for r in (1, 2))
CROP = "\n\n⟨<start_of_image>⟩····⟨<end_of_image>⟩\n\n"
WHOLE = (
    "Here is the original image \n\n⟨<start_of_image>⟩····⟨<end_of_image>⟩\n\n and here are some crops to help you see "
    "better "
)
# Convention, policy, the tokens, and the places of media tokens that stand together.
FAMILIES = {
    "idefics3": (
        IDEFICS3,
        Splits(PATCH, 8, 24),  # 2 × 3 tiles of 2 × 2 patches; the small picture is stretched to 3 × 3
        f"⟨<|begin_of_text|>⟩User:{TILES}\n\n{F}⟨<global-img>⟩····{F}hi"
        + "\n".join("".join(f"{F}⟨<row_{r}_col_{c}>⟩····" for c in (1, 2, 3)) for r in (1, 2, 3))
        + f"\n\n{F}⟨<global-img>⟩····{F}{E}\nAssistant: yesso{E}\n",
        7 + 10,
    ),
    "gemma-3": (
        GEMMA3,
        PanAndScan(PATCH, 8, 4, 3),  # two crops, and no crop of a square
        f"⟨<bos>⟩⟨<start_of_turn>⟩user\n{WHOLE}{CROP} {CROP}hi{CROP}⟨<end_of_turn>⟩\n⟨<start_of_turn>⟩model\n"
        "yesso⟨<end_of_turn>⟩\n",
        3 + 1,
    ),
}


def laid(name, document=TALK, **options):
    convention, policy, *_ = FAMILIES[name]
    tokenizer = chat(convention)
    return layout(document, tokenizer, policy, **options), tokenizer


@pytest.mark.parametrize("name", FAMILIES)
def test_from_document_to_batch(name):
    _, _, tokens, views = FAMILIES[name]
    made, tokenizer = laid(name)
    x = interleave(made, tokenizer.vocab, SEQUENTIAL)
    assert told(x, tokenizer) == tokens
    assert (made.images, made.patches) == (views, 4 * views)
    # What is written between views is text like any other, and every media token stands there once, in order.
    shown = x.tokens == tokenizer.vocab.image
    np.testing.assert_array_equal(x.modality, np.where(shown, IMAGE, TEXT))
    np.testing.assert_array_equal(x.slot[shown], np.arange(4 * views))
    assert (x.slot[~shown] == -1).all()
    assert x.media == 4 * views
    assert (x.patch_kind == 1).all()
    np.testing.assert_array_equal(x.grid, [(1, 2, 2)] * views)
    pieces = [p for p in made.pieces if p.modality == IMAGE]
    assert all(len(p.ids) == p.slots.count(-2) == p.length - p.media for p in pieces if p.slots)
    assert pieces[0].ids
    learnt = x.target[x.weight > 0].tolist()
    assert learnt == [*b"yesso", tokenizer.vocab.end]
    patches = [np.full((4 * len(p.views), VALUES), n, np.uint8) for n, p in enumerate(pieces)]
    batch = build([[(x, patches), (x, patches)]], Bucket(2, 600, 200, 40), VALUES, tokenizer.vocab, SEQUENTIAL)
    check(batch, tokenizer.vocab, [["d7", "d7"]])
    wrong = batch.tokens.copy()
    wrong[0, int(np.flatnonzero(np.array(x.slot) == 3)[0])] = 65  # between the first view and the next
    with pytest.raises(InputError, match="1 placeholders without a media token"):
        check(batch.replace(tokens=wrong), tokenizer.vocab, [["d7", "d7"]])


@pytest.mark.parametrize("name", FAMILIES)
def test_text_between_views_parts_what_sees_each_other(name):
    made, tokenizer = laid(name)
    x = interleave(made, tokenizer.vocab, replace(SEQUENTIAL, see="bidirectional_images"))
    place = np.arange(len(x.tokens))
    view = x.slot // 4
    last = {v: place[view == v].max() for v in set(view[x.slot >= 0].tolist())}
    assert len(last) == FAMILIES[name][-1]
    np.testing.assert_array_equal(x.hi, [last[v] if s >= 0 else n for n, s, v in zip(place, x.slot, view, strict=True)])
    assert (x.lo == 0).all()


def test_a_connector_that_makes_fewer_tokens():
    made, tokenizer = laid("idefics3", media_tokens=lambda grid: 1)
    x = interleave(made, tokenizer.vocab, SEQUENTIAL)
    assert told(x, tokenizer) == FAMILIES["idefics3"][2].replace("····", "·")
    np.testing.assert_array_equal(x.slot[x.slot >= 0], np.arange(17))
    assert made.patches == 4 * 17


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_and_columns_of_such_a_picture_are_not_counted(name):
    made, tokenizer = laid(name)
    with pytest.raises(InputError, match=r"^Document 'd7': A picture in \d views has no rows and columns"):
        interleave(made, tokenizer.vocab)


def test_policies_that_do_not_fit_the_convention():
    picture = Document("d7", (Text("hi"), Image(8, 24, b"")))
    ordered = AnyRes(PATCH, 8, ((1, 2), (2, 1)), newline=False)
    with pytest.raises(InputError, match=r"^Document 'd7', span 1: AnyRes.* but idefics3 writes between them"):
        layout(picture, chat(IDEFICS3), ordered)
    assert layout(picture, chat(GENERIC), ordered).images == 3
    with pytest.raises(InputError, match=r"^Document 'd7', span 1: 1 × 7 tiles are more than the 6 × 6 that idefics3"):
        layout(Document("d7", (Text("hi"), Image(8, 56, b""))), chat(IDEFICS3), Splits(PATCH, 8, 56))


def test_tiles_whose_tokens_follow_each_other():
    """A convention with nothing to write between views takes every policy."""
    tokenizer = chat(GENERIC)
    made = layout(Document("d", (Image(8, 16, b""),)), tokenizer, Tiles(PATCH, 8, 2, 2))
    x = interleave(made, tokenizer.vocab, SEQUENTIAL)
    assert told(x, tokenizer) == f"⟨<|begin|>⟩⟨<|user|>⟩⟨<|image_start|>⟩{'·' * 12}⟨<|image_end|>⟩⟨<|end|>⟩"


@pytest.mark.parametrize("convention", [GENERIC, MARKERS])
def test_placeholders_of_each_modality(convention):
    tokenizer = chat(convention)
    spans = (
        Image(8, 8, b""),
        Video(2, 8, 8, 1.0, lambda: None),
        Audio(12, 100, lambda: None),
        Text("so", "assistant", True),
    )
    policy = Fixed(PATCH, 8, 8)
    made = layout(
        Document("d7", spans), tokenizer, policy, clips=Sampled(policy, fps=1.0), sounds=Frames(rate=100, hop=4)
    )
    x = interleave(made, tokenizer.vocab, SEQUENTIAL)
    symbols = tokenizer.controls
    own = convention is MARKERS
    expected = {
        IMAGE: "<|image|>",
        VIDEO: "<|video|>" if own else "<|image|>",
        AUDIO: "<|audio|>" if own else "<|image|>",
    }
    for modality, count in ((IMAGE, 4), (VIDEO, 8), (AUDIO, 3)):
        assert x.tokens[x.modality == modality].tolist() == [symbols[expected[modality]]] * count
    media = [np.zeros((4, VALUES), np.uint8), np.zeros((8, VALUES), np.uint8), np.zeros((3, 5), np.float32)]
    batch = build([[(x, media)]], Bucket(1, 60, 20, 4, 4), Values(VALUES, 5), tokenizer.vocab, SEQUENTIAL)
    check(batch, tokenizer.vocab)
    assert tokenizer.vocab.placeholders == tuple(dict.fromkeys(symbols[s] for s in expected.values()))


def test_a_family_without_placeholders_needs_cross_attention():
    tokenizer = chat(IDEFICS)
    picture = Document("d7", (Image(8, 8, b""), Text("hi")))
    shown = layout(picture, tokenizer, Fixed(PATCH, 8, 8), fuse="cross")
    x = interleave(shown, tokenizer.vocab, replace(SEQUENTIAL, cross="last_image"))
    assert told(x, tokenizer) == f"⟨<s>⟩User:{F}⟨<image>⟩{F}hi{E}\n"
    # It is seen from the marker on, and text before it sees nothing.
    assert (x.media_lo <= x.media_hi).tolist() == [False] * 7 + [True] * 6
    with pytest.raises(InputError, match=r"^Document 'd7', span 0: idefics has no token that stands where media go"):
        interleave(layout(picture, tokenizer, Fixed(PATCH, 8, 8)), tokenizer.vocab, SEQUENTIAL)
