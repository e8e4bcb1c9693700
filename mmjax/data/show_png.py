"""A laid-out document as a PNG: see `show`."""

import io
import math
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.core.files import write_atomic
from mmjax.data import show_cells
from mmjax.data.show_cells import COLOURS, KINDS, Cell, Shown
from mmjax.sequence.document import Document
from mmjax.sequence.interleave import Example
from mmjax.sequence.layout import Layout, Tokenizer

DPI, WIDTH = 100, 1200  # pixels
LINE, LETTER, SIZE = 20, 7.0, 8.0  # pixels of a line and of a letter of that many points
FIRST, LAST = 300, 60  # cells that are shown of a long document
VIEWS, ACROSS, SIDE = 18, 6, 190  # views that are drawn, in a row, and pixels of each
PLOTS = 360  # pixels of the mask and the positions
SOUND = 90
MASK = 240  # rows and columns of the mask
EDGE = 12


def png(document: Document, laid: Layout, example: Example, tokenizer: Tokenizer, path: str | Path) -> None:
    """Draws a document into a PNG file of 1,200 pixels' width.

    From above: its tokens, coloured by kind; every view with the grid of its patches (those without a token crossed
    out); sounds; who sees whom, with the kinds along the edges; the positions in time, height and width.

    Raises:
      InputError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    kind = show_cells.kinds(example, tokenizer)
    lines = _lines(show_cells.shortened(list(show_cells.cells(laid, example, tokenizer)), FIRST, LAST))
    legend = _lines([Cell(name, f"{n:,} {name}", n) for name, n in show_cells.counted(kind).items()])
    views = list(show_cells.pictures(document, laid, example))
    sounds = list(show_cells.sounds(document, laid))
    rows = math.ceil(min(len(views), VIEWS) / ACROSS)
    heights = [LINE * (len(legend) + 1), LINE * len(lines) + EDGE, rows * (SIDE + LINE), SOUND * len(sounds), PLOTS]
    height = sum(heights) + 2 * EDGE
    figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI)
    page = _Page(figure, height)
    title = f"{document.id}: {len(kind):,} tokens, {len(example.patch_lo):,} patches, {len(example.grid):,} views"
    page.write(EDGE, EDGE, show_cells.printable(title), weight="bold")
    page.cells(legend, EDGE + LINE)
    top = EDGE + heights[0] + EDGE // 2
    page.cells(lines, top)
    top += heights[1]
    for n, view in enumerate(views[:VIEWS]):
        _view(page, view, EDGE + n % ACROSS * (SIDE + 8), top + n // ACROSS * (SIDE + LINE))
    if len(views) > VIEWS:
        page.write(EDGE, top - LINE, f"… {len(views) - VIEWS:,} views left out …")
    top += heights[2]
    for n, sound in enumerate(sounds):
        _sound(page, *sound, top + n * SOUND)
    _mask(page, example, kind, height - PLOTS)
    _positions(page, example, height - PLOTS)
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph", category=UserWarning)  # a script the font has not
        figure.savefig(out, format="png", dpi=DPI)
    write_atomic(path, out.getvalue())


class _Page:
    """A figure in pixels from its upper left corner."""

    def __init__(self, figure: Any, height: int):
        self.figure, self.height = figure, height
        self.paper = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
        self.paper.axis("off")

    def axes(self, left: float | int, top: float | int, width: float | int, height: float | int, **kwargs: Any) -> Any:
        place = (left / WIDTH, 1 - (top + height) / self.height, width / WIDTH, height / self.height)
        return self.figure.add_axes(place, **kwargs)

    def write(self, left: float | int, top: float | int, text: str, **kwargs: Any) -> None:
        # Text of strangers: dollars in it are no formulas.
        self.paper.text(
            left, top + LINE / 2, text, fontsize=SIZE, family="monospace", va="center", parse_math=False, **kwargs
        )

    def cells(self, lines: Sequence[Sequence[Cell]], top: float | int) -> None:
        from matplotlib.patches import Rectangle

        for row, line in enumerate(lines):
            left, down = EDGE, top + row * LINE
            for cell in line:
                wide = _letters(cell.text) * LETTER + 4
                if cell.kind:
                    self.paper.add_patch(Rectangle((left, down + 1), wide, LINE - 3, color=COLOURS[cell.kind]))
                self.write(left + 2, down, cell.text)
                left += wide + 3


def _letters(text: str) -> int:
    """How many columns a text takes; wide scripts take two."""
    from rich.cells import cell_len

    return cell_len(text)


def _lines(cells: Sequence[Cell]) -> list[list[Cell]]:
    room = WIDTH - 2 * EDGE
    longest = int(room / LETTER) - 2
    out, used = [[]], 0.0
    for cell in cells:
        said = cell.text or "∅"
        shown = Cell(cell.kind, said if len(said) <= longest // 2 else said[: longest // 2 - 1] + "…", cell.tokens)
        wide = _letters(shown.text) * LETTER + 7
        if used + wide > room and out[-1]:
            out.append([])
            used = 0.0
        out[-1].append(shown)
        used += wide
    return out


def _view(page: _Page, view: Shown, left: float | int, top: float | int) -> None:
    page.write(left, top, f"{view.name}: {view.rows}×{view.columns}")
    room = SIDE - 4
    if not view.pixels.size:
        axes = page.axes(left, top + LINE, room, room, xticks=[], yticks=[], facecolor="#eeeeee")
        why = "\n".join(textwrap.wrap(view.wrong, 26)[:8])
        axes.text(0.5, 0.5, f"a hole:\n{why or 'no pixels'}", ha="center", va="center", fontsize=SIZE, parse_math=False)
        return
    high, wide = view.pixels.shape[:2]
    scale = room / max(high, wide)
    axes = page.axes(left, top + LINE, wide * scale, high * scale, xticks=[], yticks=[])
    axes.imshow(view.pixels, extent=(0, view.columns, view.rows, 0), aspect="auto", interpolation="nearest")
    fine = 0.6 if max(view.rows, view.columns) <= 40 else 0.25
    for n in range(1, view.columns):
        axes.axvline(n, color="white", linewidth=fine, alpha=0.8)
    for n in range(1, view.rows):
        axes.axhline(n, color="white", linewidth=fine, alpha=0.8)
    down, across = np.nonzero(~view.seen)
    axes.plot(across + 0.5, down + 0.5, "x", color="red", markersize=min(6, 0.4 * room / max(view.rows, view.columns)))


def _sound(page: _Page, name: str, samples: np.ndarray, wrong: str, top: float | int) -> None:
    page.write(EDGE, top, f"{name}: {wrong}" if wrong else name)
    axes = page.axes(EDGE, top + LINE, WIDTH - 2 * EDGE, SOUND - LINE - 6, xticks=[], yticks=[])
    # The line would be as wide as the picture: of so many samples, the highest and lowest of each part.
    edges = np.linspace(0, len(samples), min(len(samples), WIDTH) + 1).round().astype(int)[:-1]
    if len(edges):
        ends = [reduce.reduceat(samples, edges) for reduce in (np.minimum, np.maximum)]
        axes.fill_between(np.arange(len(edges)), *ends, step="mid", color=COLOURS["audio"])


def _mask(page: _Page, example: Example, kind: np.ndarray, top: float | int) -> None:
    from matplotlib.colors import ListedColormap

    n, side = len(kind), PLOTS - 3 * LINE
    page.write(EDGE, top, "who (a row) sees whom (a column)", weight="bold")
    left, down = EDGE + 14, top + LINE + 14
    axes = page.axes(left, down, side, side, xticks=[], yticks=[])
    axes.imshow(
        show_cells.mask(example.lo, example.hi, MASK),
        extent=(0, n, n, 0),
        cmap="Greys",
        vmin=0,
        vmax=1.3,
        interpolation="nearest",
    )
    colours = ListedColormap([COLOURS[name] for name in KINDS])
    strips = ((left, down - 14, side, 10, kind[None]), (left - 14, down, 10, side, kind[:, None]))
    for x, y, wide, high, values in strips:
        strip = page.axes(x, y, wide, high)
        strip.axis("off")
        strip.imshow(values, cmap=colours, vmin=0, vmax=len(KINDS) - 1, aspect="auto", interpolation="nearest")


def _positions(page: _Page, example: Example, top: float | int) -> None:
    left = PLOTS + 70
    page.write(left, top, "positions of the tokens", weight="bold")
    axes = page.axes(left + 30, top + LINE + 6, WIDTH - left - 30 - EDGE, PLOTS - 4 * LINE)
    for axis, (name, style) in enumerate((("time", "-"), ("height", "--"), ("width", ":"))):
        axes.plot(example.position[:, axis], style, label=name, linewidth=1.4)
    axes.legend(fontsize=SIZE)
    axes.set_xlabel("token", fontsize=SIZE)
    axes.tick_params(labelsize=SIZE)
