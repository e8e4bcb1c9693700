"""What is shown of a laid-out document, before it is drawn: tokens by kind with their text, pictures, mask."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mmjax.core.errors import InputError
from mmjax.sequence.document import Audio, Document, Video
from mmjax.sequence.interleave import HIDDEN, Example
from mmjax.sequence.layout import AUDIO, IMAGE, TEXT, VIDEO, Layout, Piece, Tokenizer
from mmjax.sequence.media import load
from mmjax.tokenizers.view import render

COLOURS = {
    "text": "#dddddd",
    "learnt text": "#9be29b",
    "control": "#b3cdf5",
    "learnt control": "#57b894",
    "image": "#f7c58a",
    "video": "#eda6cd",
    "audio": "#cbb5ec",
    "newline": "#c98652",
}
KINDS = tuple(COLOURS)
LETTERS = dict(zip(KINDS, "tTcCivan", strict=True))  # where there is no colour
BROKEN = "\ufffd"  # what a tokenizer gives for bytes that are no characters


@dataclass(frozen=True)
class Cell:
    """A token of text, or a run of one medium's tokens."""

    kind: str
    text: str
    tokens: int = 1


@dataclass(frozen=True)
class Shown:
    """One view of a picture, or a frame of a video: its pixels, its grid, and which patches have a token."""

    name: str
    pixels: np.ndarray  # u8[h, w, 3]; no pixels where it could not be read
    rows: int
    columns: int
    seen: np.ndarray  # bool[rows, columns]
    wrong: str = ""  # why it could not be read


def printable(text: str) -> str:
    """Text that does nothing to a terminal: control, format and private characters are written out."""
    return "".join(c if c.isprintable() else "↵" if c == "\n" else ascii(c)[1:-1] for c in text)


def kinds(example: Example, tokenizer: Tokenizer) -> np.ndarray:
    """i8[n]: of every token its place in KINDS."""
    example = _whole(example)
    learnt = np.append(False, example.weight[:-1] > 0)[: len(example.tokens)]
    control = np.isin(example.tokens, list(_symbols(tokenizer)))
    out = np.where(control, KINDS.index("control"), KINDS.index("text")) + learnt
    for modality, name in ((IMAGE, "image"), (VIDEO, "video"), (AUDIO, "audio")):
        here = example.modality == modality
        out = np.where(here, np.where(example.slot < 0, KINDS.index("newline"), KINDS.index(name)), out)
    return out.astype(np.int8)


def _whole(example: Example) -> Example:
    """The tokens of a document in two streams one after the other: of the second what it says, not what it reads."""
    if (said := example.answer) is None:
        return example
    weight = np.append(np.concatenate([example.weight, said.weight])[1:], 0.0)  # of the token before
    ends = {"modality": np.full(len(said.target), TEXT, np.int8), "slot": np.full(len(said.target), -1, np.int32)}
    more = {name: np.concatenate([getattr(example, name), end]) for name, end in ends.items()}
    tokens = np.concatenate([example.tokens, said.target])
    return dataclasses.replace(example, tokens=tokens, weight=weight, answer=None, **more)


def cells(laid: Layout, example: Example, tokenizer: Tokenizer) -> Iterator[Cell]:
    """The document's cells in order."""
    names = _symbols(tokenizer)
    kind, example = kinds(example, tokenizer), _whole(example)
    words = [KINDS.index(k) for k in KINDS[:4]]
    at = number = 0
    for piece in laid.pieces:
        end = at + piece.length
        if not piece.length:
            yield Cell("image", f"image {number}: {_grids(piece)} patches, beside the text", 0)
        while at < end:
            if kind[at] in words:
                stop = at + int(np.argmin(np.append(np.isin(kind[at:end], words), False)))
                told = spelled(example.tokens[at:stop].tolist(), tokenizer, names)
                yield from (Cell(KINDS[k], t) for k, t in zip(kind[at:stop], told, strict=True))
            else:
                stop = at + int(np.argmin(np.append(~np.isin(kind[at:end], words), False)))
                yield from _medium(piece, number, kind[at:stop])
            at = stop
        number += piece.modality != TEXT


def shortened(cells: list[Cell], first: int, last: int) -> list[Cell]:
    """The first and the last, and in between how many tokens are left out."""
    if len(cells) <= first + last:
        return cells
    left = sum(cell.tokens for cell in cells[first:-last])
    return [*cells[:first], Cell("", f"… {left:,} tokens left out …", left), *cells[-last:]]


def _medium(piece: Piece, number: int, kind: np.ndarray) -> Iterator[Cell]:
    newlines = int(np.sum(kind == KINDS.index("newline")))
    made = len(kind) - newlines
    if made:
        name = KINDS[int(kind[kind != KINDS.index("newline")][0])]
        what = f"{piece.grid[0]:,} frames" if piece.modality == AUDIO else f"{_grids(piece)} patches"
        yield Cell(name, f"{name} {number}: {what}, {made:,} tokens", made)
    if newlines:
        yield Cell("newline", f"{newlines:,} newlines", newlines)


def _grids(piece: Piece) -> str:
    """Its grids, those that are alike counted."""
    sizes = [(len(list(same)), grid) for grid, same in itertools.groupby(piece.views)]
    shown = ["×".join(map(str, grid if grid[0] > 1 else grid[1:])) for _, grid in sizes]
    return " + ".join((f"{n} of " if n > 1 else "") + size for (n, _), size in zip(sizes, shown, strict=True))


def spelled(ids: Sequence[int], tokenizer: Tokenizer, names: dict[int, str] | None = None) -> list[str]:
    """Each token's own text. The first of several tokens that are one character has it, the others have "·"."""
    names = _symbols(tokenizer) if names is None else names
    decode = getattr(tokenizer, "decode", lambda tokens: f"[{tokens[0]}]" if len(tokens) == 1 else BROKEN)
    out = [names[t] if t in names else printable(decode([t])) for t in ids]
    at = 0
    while at < len(ids):
        if BROKEN in out[at]:
            for n in (2, 3, 4):
                whole = decode(ids[at : at + n])
                if at + n <= len(ids) and BROKEN not in whole:
                    out[at : at + n] = [printable(whole)] + ["·"] * (n - 1)
                    break
        at += 1
    return out


def _symbols(tokenizer: Tokenizer) -> dict[int, str]:
    """The control tokens' symbols by id."""
    if hasattr(tokenizer, "controls"):
        return {token: printable(symbol) for symbol, token in tokenizer.controls.items()}
    fields = dataclasses.fields(tokenizer.vocab)
    found = {f.name: getattr(tokenizer.vocab, f.name) for f in fields if f.name != "size"}
    return {token: f"<{name}>" for name, token in found.items() if isinstance(token, int)}


def pictures(document: Document, laid: Layout, example: Example) -> Iterator[Shown]:
    """Every view of every picture, and every frame of every video, as the vision encoder gets it."""
    raster, shown = example.patch_raster, np.ones(len(example.patch_kind), bool)
    shown[raster] = example.patch_kind != HIDDEN
    at = number = 0
    for piece in laid.pieces:
        if piece.views:
            rendered, wrong = _rendered(document, piece)
            name = f"{'video' if piece.modality == VIDEO else 'image'} {number}"
            part = ", frame " if piece.modality == VIDEO else ", view "
            parts = [(rows, columns) for frames, rows, columns in piece.views for _ in range(frames)]
            if wrong:  # said once, not for every view
                yield Shown(name, np.zeros((0, 0, 3), np.uint8), *parts[0], np.zeros(parts[0], bool), wrong)
            for n, (rows, columns) in enumerate(parts):
                # A picture beside the text (cross-attention) has no places, but all its patches are looked at.
                seen = shown[at : at + rows * columns].reshape(rows, columns) | (piece.length == 0)
                if rendered:
                    yield Shown(name + (f"{part}{n}" if len(parts) > 1 else ""), rendered[n], rows, columns, seen)
                at += rows * columns
        number += piece.modality != TEXT


def _rendered(document: Document, piece: Piece) -> tuple[list[np.ndarray], str]:
    """The pixels of a medium's views, or why there are none."""
    medium = document.spans[piece.span]
    try:
        if not hasattr(piece.policy, "views"):
            raise InputError("its policy does not say what is done to pixels")
        views = piece.policy.views(medium.height, medium.width)
        pixels = load(medium)
        frames = [pixels]
        if isinstance(medium, Video):
            frames = [pixels[n] for n in np.round(np.linspace(0, len(pixels) - 1, piece.grid[0])).astype(int)]
        if any(frame.shape != (medium.height, medium.width, 3) for frame in frames):
            raise InputError(f"declared as {medium.height}×{medium.width} but is {'×'.join(map(str, pixels.shape))}")
        return [view for frame in frames for view in render(frame, views)], ""
    except Exception as error:  # whatever a dataset's own function raises, the rest can be seen
        return [], printable(str(error) or type(error).__name__)


def sounds(document: Document, laid: Layout) -> Iterator[tuple[str, np.ndarray, str]]:
    """(name, samples, why it could not be read) of every sound."""
    number = 0
    for piece in laid.pieces:
        if piece.modality == AUDIO:
            sound = document.spans[piece.span]
            samples, wrong = np.zeros(0, np.float32), ""
            try:
                if not isinstance(sound, Audio):
                    raise InputError("the layout is of another document")
                samples = np.asarray(sound.source if isinstance(sound.source, np.ndarray) else sound.source())
            except Exception as error:
                wrong = printable(str(error) or type(error).__name__)
            yield f"audio {number}", samples, wrong
        number += piece.modality != TEXT


def mask(lo: np.ndarray, hi: np.ndarray, most: int) -> np.ndarray:
    """f64[m, m]: who sees whom, m = min(n, most): of each block of queries and keys, the share that is seen."""
    n = len(lo)
    edges = np.unique(np.linspace(0, n, min(n, most) + 1).round().astype(np.int64))
    starts, stops = edges[:-1], edges[1:]
    out = np.zeros((len(starts), len(starts)))
    for row, (a, b) in enumerate(zip(starts, stops, strict=True)):
        first = np.maximum(lo[a:b, None], starts)
        last = np.minimum(hi[a:b, None].astype(np.int64) + 1, stops)
        out[row] = np.maximum(last - first, 0).sum(0) / ((b - a) * (stops - starts))
    return out


def counted(kind: np.ndarray) -> dict[str, int]:
    """Tokens of every kind there is."""
    counts = np.bincount(kind, minlength=len(KINDS)).tolist()
    return {name: n for name, n in zip(KINDS, counts, strict=True) if n}
