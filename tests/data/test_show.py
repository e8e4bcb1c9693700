"""Documents as pictures: what is told of each token, that nothing steers the terminal, and that drawings differ."""

import itertools
import re
import sys
import types

import numpy as np
import pytest
from PIL import Image as Pillow

from mmjax.core.errors import InputError
from mmjax.data import __main__ as command
from mmjax.data import drawings, show, show_cells
from mmjax.sequence import interleave
from mmjax.sequence.document import Audio, Document, Image, Text, Video
from mmjax.sequence.layout import layout
from mmjax.tokenizers import text
from mmjax.tokenizers.audio import Frames
from mmjax.tokenizers.resolution import Fixed, Native
from mmjax.tokenizers.tiles import AnyRes
from mmjax.tokenizers.video import Sampled

POLICY = Native(patch=8, min_pixels=64, max_pixels=64 * 64)
ANSWER = Text("Cat.", "assistant", True)
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")  # colours


@pytest.fixture(scope="module")
def words():
    return text.load(drawings.tokenizer_model())


def picture(height=32, width=48):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, width // 2 :] = 255
    return Image(height, width, pixels)


def laid_out(document, words, policy=POLICY, cfg=interleave.PLAIN, **kwargs):
    laid = layout(document, words, policy, **kwargs)
    return document, laid, interleave.interleave(laid, words.vocab, cfg), words


def test_answers_that_are_apart_are_told_too(words):
    """An encoder–decoder's: behind what its encoder reads stands what its decoder says."""
    document = Document("two", (Text("What?"), picture(), ANSWER))
    one, two = (
        laid_out(document, words, cfg=cfg, parted=cfg.answer > 0)
        for cfg in (interleave.PLAIN, interleave.Config(answer=9))
    )
    assert list(show_cells.cells(*two[1:])) == list(show_cells.cells(*one[1:]))
    assert "3 learnt text 6 control 1 learnt control" in ESCAPE.sub("", show.terminal(*two))


def test_every_token_is_told(words):
    given = laid_out(Document("two", (Text("What?"), picture(), ANSWER)), words)
    cells = list(show_cells.cells(*given[1:]))
    assert [c.text for c in cells if "control" in c.kind] == [
        "<|begin|>",
        "<|user|>",
        "<|image_start|>",
        "<|image_end|>",
        "<|end|>",
        "<|assistant|>",
        "<|end|>",
    ]
    assert "".join(c.text for c in cells if c.kind == "text") == "What?"
    assert "".join(c.text for c in cells if c.kind == "learnt text") == "Cat."
    assert [c.kind for c in cells][-1] == "learnt control"
    assert [(c.text, c.tokens) for c in cells if c.kind == "image"] == [("image 0: 4×6 patches, 24 tokens", 24)]
    assert sum(c.tokens for c in cells) == given[1].tokens
    counts = show_cells.counted(show_cells.kinds(given[2], words))
    assert counts["image"] == 24
    assert counts["learnt control"] == 1
    assert sum(counts.values()) == given[1].tokens


def test_the_terminal_without_colour(words):
    given = laid_out(Document("two", (Text("What?"), picture(), ANSWER)), words)
    shown = show.terminal(*given, color=False, width=90)
    assert "\x1b" not in shown
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 90
    assert lines[0].startswith(f"two: {given[1].tokens} tokens, 24 patches")
    assert "<|begin|>/c <|user|>/c" in shown
    assert "image 0: 4×6 patches, 24 tokens/i" in shown
    assert shown.count("      @@@@@@") == 4  # its rows: left black, right white
    assert "█▄" in shown
    for axis in ("time", "height", "width"):
        assert any(re.match(rf"{axis} +▁.*█ 0…", line) for line in lines)


def test_colours_are_the_kinds(words):
    """As many cells of each colour as there are cells of its kind, and one in the legend."""
    given = laid_out(Document("two", (Text("What?"), ANSWER)), words)
    shown = show.terminal(*given, width=200)
    cells = list(show_cells.cells(*given[1:]))
    for kind, colour in show_cells.COLOURS.items():
        red, green, blue = (int(colour[n : n + 2], 16) for n in (1, 3, 5))
        n = sum(cell.kind == kind for cell in cells)
        assert shown.count(f"48;2;{red};{green};{blue}m") == n + (n > 0)
    assert ESCAPE.sub("", shown) != shown
    assert "\x1b" not in ESCAPE.sub("", shown)


@pytest.mark.parametrize("color", [False, True])
def test_texts_cannot_steer_the_terminal(words, color):
    evil = "\x1b[2J\x1b]0;title\x07 \x9b31m \u202e \u200b \r\x08 [bold red]x[/] :smile: \x00 é 漢 \U0001f600"
    document = Document("\x1b[31mred\r", (Text(evil), picture(), Text(evil, "assistant", True)))
    shown = ESCAPE.sub("", show.terminal(*laid_out(document, words), color=color))
    assert all(c == "\n" or c.isprintable() for c in shown)
    assert "\\x1b[31mred\\r" in shown
    for piece in ("\\x1b", "\\x9b", "\\u202e", "\\u200b", "\\x07", "é", "漢", "\U0001f600"):
        assert piece in shown
    assert ":smile:" in shown.replace("/t", "").replace("/T", "").replace(" ", "")  # no markup either


def test_a_character_of_several_tokens(words):
    ids = words.encode("a漢b")
    assert show_cells.spelled(ids, words) == ["a", "漢", "·", "·", "b"]
    assert "".join(show_cells.spelled(ids[:3], words)).count("\ufffd") == 2


def test_unreadable_pictures_are_holes(words):
    def broken():
        raise OSError("gone\x1b[2J")

    spans = (Image(16, 16, b"<html>"), Image(16, 16, broken), Image(16, 16, np.zeros((8, 8, 3), np.uint8)), ANSWER)
    shown = show.terminal(*laid_out(Document("d", spans), words), color=False)
    assert shown.count("a hole: ") == 3
    assert "is not a JPEG" in shown
    assert "gone\\x1b[2J" in shown
    assert "declared as 16×16" in shown


def test_views_newlines_and_hidden_patches(words):
    import dataclasses

    class WithNewline:
        vocab = dataclasses.replace(words.vocab, image_newline=words.vocab.pad)
        controls, encode, decode = words.controls, words.encode, words.decode

    policy = AnyRes(14, 28, ((1, 2), (2, 1)))
    cfg = interleave.Config(position="sequential")
    given = laid_out(Document("d", (picture(20, 80), ANSWER)), WithNewline(), policy, cfg)
    kinds = [c.kind for c in show_cells.cells(*given[1:])]
    assert kinds.count("newline") == kinds.count("image") == 1
    views = list(show_cells.pictures(*given[:3]))
    assert [v.name for v in views] == ["image 0, view 0", "image 0, view 1", "image 0, view 2"]
    assert [(v.rows, v.columns) for v in views] == [(2, 2)] * 3
    hidden = sum(int((~v.seen).sum()) for v in views)
    assert hidden == int((given[2].patch_kind == interleave.HIDDEN).sum())
    shown = show.terminal(*given, color=False)
    assert "image 0, view 2: 2×2" in shown
    assert len(re.findall("x", shown.split("view 0")[1].split("who")[0])) == 2 * hidden


def test_videos_sound_and_no_media_at_all(words):
    frames = np.arange(4 * 16 * 16 * 3, dtype=np.uint8).reshape(4, 16, 16, 3)
    clip, sound = Video(4, 16, 16, 2.0, frames), Audio(900, 16_000, np.sin(np.arange(900, dtype=np.float32)))
    cfg = interleave.Config(position="sequential")
    given = laid_out(Document("d", (clip, sound, ANSWER)), words, cfg=cfg, clips=Sampled(POLICY), sounds=Frames())
    shown = show.terminal(*given, color=False)
    assert "video 0: 4×2×2 patches, 16 tokens/v" in shown
    assert "video 0, frame 3: 2×2" in shown
    assert "audio 1: 3 frames, 3 tokens/a" in shown
    assert re.search("audio 1: [▁-█]{20}", shown)
    only = show.terminal(*laid_out(Document("d", (Text(""), ANSWER)), words), color=False, width=20)
    assert "learnt" in only


def test_pictures_beside_the_text(words):
    cfg = interleave.Config(position="sequential", cross="last_image")
    shown = show.terminal(*laid_out(Document("d", (picture(), ANSWER)), words, cfg=cfg, fuse="cross"), color=False)
    assert "image 0: 4×6 patches, beside the text" in shown
    assert "      @@@@@@" in shown


def test_long_documents_are_shortened(words, tmp_path):
    given = laid_out(Document("long", (Text("a b " * 25_000), ANSWER)), words)
    cells = list(show_cells.cells(*given[1:]))
    assert len(cells) > 50_000
    shown = show.terminal(*given, color=False)
    left = len(cells) - show.FIRST - show.LAST
    assert f"… {left:,} tokens left out …" in shown
    assert "Cat" in shown.replace("/T ", "")
    assert len(shown) < 20_000
    show.png(*given, tmp_path / "long.png")
    with Pillow.open(tmp_path / "long.png") as made:
        assert made.height < 2000


@pytest.mark.parametrize("most", [3, 7, 64])
def test_the_mask_is_what_the_intervals_say(rng, most):
    n = 20
    lo = rng.integers(0, n, n)
    hi = lo + rng.integers(-1, n, n)
    dense = (lo[:, None] <= np.arange(n)) & (np.arange(n) <= hi[:, None])
    edges = np.unique(np.linspace(0, n, min(n, most) + 1).round().astype(int))
    cut = list(itertools.pairwise(edges))
    expected = [[dense[a:b, c:d].mean() for c, d in cut] for a, b in cut]
    np.testing.assert_allclose(show_cells.mask(lo, hi, most), expected)


def test_png_is_a_picture_of_its_parts(words, tmp_path):
    document = Document("d \x1b $x^$", (Text("What $y^$ 漢?"), picture(), ANSWER))
    made = {}
    for see in ("causal", "prefix"):
        given = laid_out(document, words, cfg=interleave.Config(see=see))
        show.png(*given, tmp_path / f"{see}.png")
        with Pillow.open(tmp_path / f"{see}.png") as opened:
            assert opened.format == "PNG"
            made[see] = np.asarray(opened.convert("RGB")).astype(int)
    assert made["causal"].shape == made["prefix"].shape
    assert made["causal"].shape[1] == 1200
    assert 600 < made["causal"].shape[0] < 900
    differ = np.argwhere((made["causal"] != made["prefix"]).any(-1))
    plots = made["causal"].shape[0] - 360
    # The mask alone: in the lower left corner, and only what prefix sees and causal does not.
    assert len(differ) > 1000
    assert differ[:, 0].min() >= plots
    assert differ[:, 1].max() < 340
    assert made["causal"][tuple(differ.T)].mean() > made["prefix"][tuple(differ.T)].mean() + 50
    colours = {tuple(c) for c in made["causal"].reshape(-1, 3).tolist()}
    for kind in ("text", "learnt text", "control", "learnt control", "image"):
        assert tuple(int(show_cells.COLOURS[kind][n : n + 2], 16) for n in (1, 3, 5)) in colours
    assert not list(tmp_path.glob(".*"))
    # A hole, and other pixels, are seen.
    for name, source in (("hole", b"<html>"), ("white", np.full((32, 48, 3), 255, np.uint8))):
        spans = (document.spans[0], Image(32, 48, source), ANSWER)
        show.png(*laid_out(Document(document.id, spans), words), tmp_path / f"{name}.png")
        with Pillow.open(tmp_path / f"{name}.png") as opened:
            other = np.asarray(opened.convert("RGB")).astype(int)
        differ = np.argwhere((other != made["causal"]).any(-1))
        assert len(differ) > 1000
        assert differ[:, 0].max() < plots


def test_the_command_on_the_drawings(tmp_path, capsys):
    assert command.main(["show", "drawings", "3", "--config", "quickstart", "--png", str(tmp_path / "a.png")]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("drawings/0/3: 39 tokens, 25 patches")
    assert "5×5 patches" in shown
    assert "\x1b" not in shown  # no terminal
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert command.main(["show", "drawings", "drawings/0/3", "--resolution", "qwen2-vl", "--width", "70"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("drawings/0/3: ")
    assert max(map(len, lines)) <= 70
    for arguments, status in ((["--help"], 0), ([], 2), (["draw"], 2)):
        with pytest.raises(SystemExit) as ended:
            command.main(arguments)
        assert ended.value.code == status
    for wrong, match in (
        (["show", "drawings", "1000"], "has 1,000"),
        (["show", "drawings", "x"], "no document 'x'"),
        (["show", "drawings", "--resolution", "x"], "no resolution 'x'"),
        (["show", "drawings", "--resolution", "qwen2-vl", "--config", "quickstart"], "give one of them"),
        (["show", "drawings", "--width", "3"], "at least 20"),
    ):
        with pytest.raises(InputError, match=match):
            command.main(wrong)


@pytest.mark.parametrize("name", sorted(show.PUBLISHED))
def test_every_published_resolution_can_be_shown(name, words):
    document = Document("d", (picture(40, 64), ANSWER))
    if name in ("llava-next", "llava-onevision", "pixtral-12b", "mistral-small-3.1"):
        with pytest.raises(InputError, match="newline tokens, but the tokenizer has none"):
            show._laid(document, words, *show._settings(None, name))
        return
    laid, example = show._laid(document, words, *show._settings(None, name))
    views = list(show_cells.pictures(document, laid, example))
    assert all(not view.wrong and view.pixels.size for view in views)
    assert len(views) == len(example.grid)


def test_other_datasets_are_opened(monkeypatch, capsys, words, tmp_path):
    module = types.ModuleType("mmjax.data.formats")
    asked = []
    module.open_dataset = lambda path: asked.append(path) or [Document("mine", (Text("hi"), picture(), ANSWER))]
    monkeypatch.setitem(sys.modules, "mmjax.data.formats", module)
    (tmp_path / "text.model").write_bytes(words.model)
    assert command.main(["show", "some.jsonl", "mine", "--tokenizer", str(tmp_path / "text.model"), "--plain"]) == 0
    assert asked == ["some.jsonl"]
    assert capsys.readouterr().out.startswith("mine: ")


def test_a_fixed_size_policy_with_cropped_patches_is_drawn(words):
    given = laid_out(Document("d", (picture(30, 30), ANSWER)), words, Fixed(14, 384, 384, drop=True))
    (view,) = show_cells.pictures(*given[:3])
    assert (view.rows, view.columns) == (27, 27)
    assert not view.wrong
