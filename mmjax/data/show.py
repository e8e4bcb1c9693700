"""A document as the model gets it, for people: tokens by kind, patches on their pictures, who sees whom, positions.

python -m mmjax.data show PATH [N | ID] [--png OUT.png] [--config quickstart | --resolution qwen2-vl]
python -m mmjax.data show drawings 3
"""

import argparse
import dataclasses
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.core import config as configs
from mmjax.core.errors import InputError
from mmjax.data import drawings, sets, show_cells
from mmjax.data.show_cells import COLOURS, LETTERS, Cell, Shown, printable
from mmjax.data.show_png import png
from mmjax.sequence import interleave
from mmjax.sequence.document import Document
from mmjax.sequence.interleave import Example
from mmjax.sequence.layout import Layout, Tokenizer, layout, patches_of
from mmjax.sequence.positions import MRope
from mmjax.tokenizers import chat, conventions, text
from mmjax.tokenizers.audio import Frames
from mmjax.tokenizers.conventions import CONVENTIONS
from mmjax.tokenizers.published import PUBLISHED
from mmjax.tokenizers.resolution import Native, Policy
from mmjax.tokenizers.video import Sampled

FIRST, LAST = 400, 100  # cells that are shown of a long document
VIEWS, HIGH = 24, 24  # views that are drawn, and rows of each; half of them where there are many
MASK = 64  # rows and columns of the mask
SHADES = " .:-=+*#%@"
BARS = "▁▂▃▄▅▆▇█"
NARROW = 20  # characters a picture takes at least
__all__ = ["main", "png", "terminal"]


def terminal(
    document: Document,
    laid: Layout,
    example: Example,
    tokenizer: Tokenizer,
    *,
    width: int = 100,
    color: bool = True,
) -> str:
    """The document in so many columns of a terminal; nothing in it can steer the terminal.

    Without colour, every token has the letter of its kind behind it, and pictures are grey levels.
    """
    if width < NARROW:
        raise InputError(f"width is {width}; a document needs at least {NARROW} columns.")
    from rich.console import Console
    from rich.text import Text

    file = io.StringIO()
    console = Console(
        file=file,
        width=width,
        force_terminal=color,
        color_system="truecolor" if color else None,
        legacy_windows=False,
        _environ={},  # what NO_COLOR and COLUMNS say is the caller's to ask
    )

    def say(*parts: tuple[str, str]) -> None:
        console.print(Text.assemble(*parts, no_wrap=True, overflow="crop"), soft_wrap=False)

    kind = show_cells.kinds(example, tokenizer)
    say((f"{printable(document.id)}: {len(kind):,} tokens, {len(example.patch_lo):,} patches", "bold"))
    counts = show_cells.counted(kind).items()
    for line in _filled([Cell(name, f"{n:,} {name}", n) for name, n in counts], width, color):
        say(*line)
    say(("", ""))
    for line in _filled(
        show_cells.shortened(list(show_cells.cells(laid, example, tokenizer)), FIRST, LAST), width, color
    ):
        say(*line)
    for drawn in _pictures(list(show_cells.pictures(document, laid, example)), width, color):
        say(*drawn)
    for name, samples, wrong in show_cells.sounds(document, laid):
        say((f"\n{name}: {wrong or _bars(np.abs(samples), width - len(name) - 2)}", ""))
    say(("\nwho (a row) sees whom (a column)", "bold"))
    for line in _mask(example, min(MASK, width)):
        say((line, ""))
    say(("\npositions", "bold"))
    for axis, name in enumerate(("time", "height", "width")):
        values = example.position[:, axis]
        ends = f"{values.min():g}…{values.max():g}" if len(values) else "none"
        say((f"{name:<7}{_bars(values - values.min(initial=0), width - 22)} {ends}", ""))
    return file.getvalue()


def _filled(cells: Sequence[Cell], width: int, color: bool) -> Iterator[list[tuple[str, str]]]:
    """Lines of cells, as many as fit."""
    from rich.cells import cell_len, set_cell_size

    line, used = [], 0
    for cell in cells:
        said = cell.text or "∅"
        mark = "" if color or not cell.kind else f"/{LETTERS[cell.kind]}"
        if cell_len(said) + len(mark) > width - 1:
            said = set_cell_size(said, width - len(mark) - 2) + "…"
        size = cell_len(said) + len(mark) + 1
        if used + size > width and line:
            yield line
            line, used = [], 0
        line += [(said + mark, f"#000000 on {COLOURS[cell.kind]}" if cell.kind else ""), (" ", "")]
        used += size
    if line:
        yield line


def _pictures(found: Sequence[Shown], width: int, color: bool) -> Iterator[list[tuple[str, str]]]:
    """Views side by side, two characters for each patch; patches without a token are crossed out."""
    most = HIGH if len(found) <= 2 else HIGH // 2
    line, used = [], 0
    for view in found[:VIEWS]:
        block, wide = _block(view, most, width, color)
        if used + wide > width and line:
            yield from _beside(line)
            line, used = [], 0
        line.append((block, wide))
        used += wide + 2
    yield from _beside(line)
    if len(found) > VIEWS:
        yield [(f"\n… {len(found) - VIEWS:,} views left out …", "")]


def _block(view: Shown, most: int, width: int, color: bool) -> tuple[list[list[tuple[str, str]]], int]:
    """A view's lines, and how wide they are; of large grids, several patches are one."""
    title = f"{view.name}: {view.rows}×{view.columns}"
    if not view.pixels.size:
        return [[(title, "bold")], [(f"a hole: {view.wrong or 'it has no pixels'}", "")]], width
    step = max(1, -(-view.rows // most), -(-2 * view.columns // width))
    title += f" ({step}×{step} as one)" if step > 1 else ""
    lines = [[(title[:width], "bold")]]
    rows, columns = -(-view.rows // step), -(-view.columns // step)
    for row in range(rows):
        line = []
        for half in range(2 * columns):  # two colours a patch: a character is twice as high as wide
            down, across = _part(row, step, view.rows), _part(half, step, 2 * view.columns)
            pixels = view.pixels[_pixels(down, view.rows, len(view.pixels)), :]
            pixels = pixels[:, _pixels(across, 2 * view.columns, view.pixels.shape[1])]
            seen = view.seen[slice(*down), half // 2 * step : (half // 2 + 1) * step].any()
            line.append(_pixel(pixels, bool(seen), color))
        lines.append(line)
    return lines, max(2 * columns, len(title[:width]))


def _part(number: int, step: int, most: int) -> tuple[int, int]:
    return number * step, min((number + 1) * step, most)


def _pixels(part: tuple[int, int], parts: int, size: int) -> slice:
    """The pixels of some of so many parts of a side; at least one."""
    begin = min(part[0] * size // parts, size - 1)
    return slice(begin, max(part[1] * size // parts, begin + 1))


def _beside(blocks: Sequence[tuple[list, int]]) -> Iterator[list[tuple[str, str]]]:
    """Blocks as lines of all of them."""
    if blocks:
        yield [("", "")]
    for row in range(max((len(block) for block, _ in blocks), default=0)):
        line = []
        for block, wide in blocks:
            here = block[row] if row < len(block) else []
            line += [*here, (" " * max(0, wide - sum(len(said) for said, _ in here) + 2), "")]
        yield line


def _pixel(pixels: np.ndarray, seen: bool, color: bool) -> tuple[str, str]:
    red, green, blue = pixels.reshape(-1, 3).mean(0).astype(int).tolist()
    if not color:
        return ("x" if not seen else SHADES[(red + green + blue) * (len(SHADES) - 1) // 765], "")
    ink = "#000000" if red + green + blue > 382 else "#ffffff"
    return (" " if seen else "╳", f"{ink} on #{red:02x}{green:02x}{blue:02x}")


def _mask(example: Example, most: int) -> Iterator[str]:
    """Two rows a line; of long documents, what at least half of a block sees."""
    seen = show_cells.mask(example.lo, example.hi, most) >= 0.5
    seen = np.pad(seen, ((0, len(seen) % 2), (0, 0)))
    for above, below in zip(seen[::2], seen[1::2], strict=True):
        yield "".join("·▄▀█"[2 * a + b] for a, b in zip(above.tolist(), below.tolist(), strict=True))


def _bars(values: np.ndarray, most: int) -> str:
    """A strip of bars, the highest of every part."""
    if not len(values) or most < 1:
        return ""
    edges = np.linspace(0, len(values), min(len(values), most) + 1).round().astype(int)[:-1]
    parts = np.maximum.reduceat(values.astype(np.float64), edges)
    return "".join(BARS[int(x)] for x in parts / max(parts.max(), 1e-9) * (len(BARS) - 1))


def main(arguments: Sequence[str]) -> int:
    """What follows `python -m mmjax.data show`; 0 when the document was shown.

    Raises:
      InputError: arguments, a dataset or a document that cannot be used.
    """
    parser = argparse.ArgumentParser(prog="python -m mmjax.data show", description=__doc__.splitlines()[0])
    parser.add_argument("path", help="a dataset, or `drawings`: the built-in one")
    parser.add_argument("document", nargs="?", default="0", help="its number or its id")
    parser.add_argument("--png", type=Path, help="draw it into this file")
    parser.add_argument("--config", help="a config of mmjax, by name or path: its resolution, sequence and connector")
    parser.add_argument("--tokenizer", help="a model file or a folder of one; the built-in dataset's if not given")
    parser.add_argument("--convention", help=f"how it writes conversations, one of {', '.join(CONVENTIONS)}")
    parser.add_argument("--resolution", help=f"instead of the config's, one of {', '.join(PUBLISHED)}")
    parser.add_argument("--width", type=int, default=0, help="columns; the terminal's if not given")
    parser.add_argument("--plain", action="store_true", help="without colours")
    args = parser.parse_args(arguments)
    cfg = configs.load(args.config) if args.config else None
    documents = _dataset(args.path, cfg)
    document = _found(documents, args.document)
    tokenizer = _tokenizer(cfg, args.tokenizer, args.convention)
    laid, example = _laid(document, tokenizer, *_settings(cfg, args.resolution))
    plain = args.plain or not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR"))
    width = args.width or _columns()
    print(terminal(document, laid, example, tokenizer, width=width, color=not plain), end="")
    if args.png:
        png(document, laid, example, tokenizer, args.png)
        print(f"drawn in {args.png}")
    return 0


def _columns() -> int:
    import shutil

    return max(NARROW, shutil.get_terminal_size((100, 24)).columns)


def _dataset(path: str, cfg: Any) -> Sequence[Document]:
    if path == "drawings":
        own = isinstance(getattr(cfg, "data", None), drawings.Config)
        data, seed = (cfg.data, cfg.seed) if own else (drawings.Config(), 0)
        return drawings.Training(data, 1000, seed)
    from mmjax.data.formats import open_dataset

    return open_dataset(path)


def _tokenizer(cfg: Any, path: str | None, convention: str | None) -> Tokenizer:
    """That of the arguments, else the config's, else the built-in one."""
    mixed = cfg is not None and isinstance(cfg.data, sets.Mixed)
    model = path or (cfg.data.tokenizer if mixed else drawings.tokenizer_model())
    name = convention or (cfg.data.convention if mixed else None)
    found = text.load(model)
    return found if name is None else chat.Chat(found, conventions.find(name))


def _found(documents: Sequence[Document], which: str) -> Document:
    """By number, or by id, for which all are looked through."""
    if which.isdecimal():
        if int(which) >= len(documents):
            raise InputError(f"There is no document {which}; the dataset has {len(documents):,}, counted from 0.")
        return documents[int(which)]
    found = next((d for d in (documents[n] for n in range(len(documents))) if d.id == which), None)
    if found is None:
        raise InputError(f"There is no document {which!r} among {len(documents):,}; give its number or its id.")
    return found


def _settings(cfg: Any, resolution: str | None) -> tuple[Policy, interleave.Config, Callable, str]:
    """Resolution, sequence, media tokens of a grid, and where media enter."""
    if resolution is None and cfg is None:
        return Native(patch=16), interleave.PLAIN, patches_of, "sequence"
    if resolution is None:
        fuse = "sequence" if cfg.model.decoder.cross is None else "cross"
        tokens = cfg.model.connector.tokens if cfg.model.sees else patches_of
        return cfg.resolution, cfg.sequence, tokens, fuse
    if cfg is not None:
        raise InputError("Both --config and --resolution say how pictures are cut; give one of them.")
    if resolution not in PUBLISHED:
        raise InputError(f"There is no resolution {resolution!r}; give one of {', '.join(PUBLISHED)}.")
    entry = PUBLISHED[resolution]
    if entry.latents:
        return entry.policy, interleave.Config(position="sequential"), lambda grid: entry.latents * grid[0], "sequence"
    position = "mrope" if isinstance(entry.policy, Native) else "sequential"
    sequence = interleave.Config(merge=entry.merge, position=position, rope=MRope(merge=entry.merge))
    return entry.policy, sequence, lambda grid: patches_of(grid) // entry.merge**2, "sequence"


def _laid(
    document: Document,
    tokenizer: Tokenizer,
    policy: Policy,
    sequence: interleave.Config,
    media_tokens: Callable,
    fuse: str,
) -> tuple[Layout, Example]:
    """The one place where a document is laid out here."""
    if tokenizer.vocab.image is None and fuse == "sequence":  # a family whose text looks at pictures from beside
        fuse, sequence = "cross", dataclasses.replace(sequence, cross="last_image")
    how = {"clips": Sampled(policy), "sounds": Frames(_rate(document)), "fuse": fuse, "parted": sequence.answer > 0}
    laid = layout(document, tokenizer, policy, media_tokens, **how)
    return laid, interleave.interleave(laid, tokenizer.vocab, sequence)


def _rate(document: Document) -> int:
    """The document's own, because nothing is done to sound here."""
    return next((span.rate for span in document.spans if hasattr(span, "rate")), Frames().rate)
