"""What the published resolution policies make of pictures: a table of tokens, distortion and pixels per token.

    python -m mmjax.tokenizers.compare photo.jpg page.png … [--picture policies.jpg]

The table is Markdown. The picture shows the views that a model would see, policy by policy.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mmjax.core.errors import InputError
from mmjax.tokenizers import image as images
from mmjax.tokenizers.adaptive import Adaptive
from mmjax.tokenizers.published import PUBLISHED, Published
from mmjax.tokenizers.resolution import Fixed
from mmjax.tokenizers.view import render, resized

CELL, LABEL, GAP = 150, 190, 3  # pixels of the sheet
WHOLE, ADAPTIVE = Fixed(14, 336, 336), Adaptive(14, (5.75, 4.0))  # APT looks at pixels, so it is no policy by size


def tokens(entry: Published, height: int, width: int) -> int:
    """Media tokens that reach the language model, newlines among them."""
    policy = entry.policy
    if not hasattr(policy, "picture"):
        rows, columns = policy.grid(height, width)
        return entry.latents or rows * columns // entry.merge**2
    picture = policy.picture(height, width)
    if picture.slots is not None:
        return len(picture.slots)
    return sum(entry.latents or rows * columns // entry.merge**2 for rows, columns in picture.views)


def distortion(entry: Published, height: int, width: int) -> float:
    """By how much shapes are changed in the most detailed view: 0.5 is half as wide, or as tall, again."""
    scales = [resized(view, height, width) for view in entry.policy.views(height, width)]
    down, across = max(scales, key=lambda scale: scale[0] * scale[1])
    return max(down / across, across / down) - 1


def table(pictures: dict[str, np.ndarray]) -> str:
    """Markdown: a row for each policy; tokens of each picture, the largest distortion, mean pixels per token."""
    sizes = {name: pixels.shape[:2] for name, pixels in pictures.items()}
    names = " | ".join(f"{name} {height}×{width}" for name, (height, width) in sizes.items())
    lines = [f"| policy | {names} | distortion | pixels per token |", "|---" + "|--:" * (len(sizes) + 2) + "|"]

    def add(name: str, counts: Sequence[int], twisted: float) -> None:
        share = np.mean([height * width / n for (height, width), n in zip(sizes.values(), counts, strict=True)])
        cells = " | ".join(f"{n:,}" for n in counts)
        lines.append(f"| {name} | {cells} | {twisted:.0%} | {share:,.0f} |")

    for name, entry in PUBLISHED.items():
        twisted = max(distortion(entry, *size) for size in sizes.values())
        add(name, [tokens(entry, *size) for size in sizes.values()], twisted)
    cells = [len(ADAPTIVE.cells(render(pixels, WHOLE.views(*pixels.shape[:2]))[0])) for pixels in pictures.values()]
    add("apt-14-336", cells, max(distortion(Published(WHOLE), *size) for size in sizes.values()))
    return "\n".join(lines)


def sheet(pictures: Sequence[np.ndarray]) -> Image.Image:
    """All views of every picture, side by side and small: a row for each policy."""
    size = LABEL + len(pictures) * (CELL + 10), (len(PUBLISHED) + 1) * (CELL + 10)
    out = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(out)
    for row, (name, entry) in enumerate(PUBLISHED.items()):
        top = row * (CELL + 10) + 5
        draw.text((8, top + CELL // 2), name, "black")
        for column, pixels in enumerate(pictures):
            views = render(pixels, entry.policy.views(*pixels.shape[:2]))
            out.paste(_montage(views), (LABEL + column * (CELL + 10), top))
    top = len(PUBLISHED) * (CELL + 10) + 5
    draw.text((8, top + CELL // 2), "apt-14-336", "black")
    for column, pixels in enumerate(pictures):
        out.paste(_cells(pixels), (LABEL + column * (CELL + 10), top))
    return out


def _cells(pixels: np.ndarray) -> Image.Image:
    """The resized picture with its adaptive patches outlined."""
    (view,) = render(pixels, WHOLE.views(*pixels.shape[:2]))
    picture = Image.fromarray(view.copy())
    draw = ImageDraw.Draw(picture)
    for row, column, side in (ADAPTIVE.cells(view) * ADAPTIVE.patch).tolist():
        draw.rectangle((column, row, column + side, row + side), outline="white")
    return picture.resize((CELL, CELL))


def _montage(views: Sequence[np.ndarray]) -> Image.Image:
    """Views in as square an arrangement as there is, on one scale."""
    columns = int(np.ceil(np.sqrt(len(views))))
    rows = -(-len(views) // columns)
    side = min((CELL - GAP * columns) // columns, (CELL - GAP * rows) // rows)
    scale = side / max(max(view.shape[:2]) for view in views)
    out = Image.new("RGB", (CELL, CELL), "white")
    for i, view in enumerate(views):
        size = [max(1, int(n * scale)) for n in view.shape[1::-1]]
        out.paste(Image.fromarray(view).resize(size), (i % columns * (side + GAP), i // columns * (side + GAP)))
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mmjax.tokenizers.compare", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--picture", type=Path, help="where to draw the views (.jpg or .png)")
    args = parser.parse_args(arguments)
    try:
        pictures = [images.decode(file) for file in args.files]
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table({file.stem: pixels for file, pixels in zip(args.files, pictures, strict=True)}))
    if args.picture:
        sheet(pictures).save(args.picture, quality=70)
    return 0


if __name__ == "__main__":
    sys.exit(main())
