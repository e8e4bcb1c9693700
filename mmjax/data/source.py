"""From plan to batches: Grain reads, decodes in threads and keeps ahead of the step. batch(step) is a pure function."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmjax.core.errors import InputError
from mmjax.data.index import LayoutOf, Plan
from mmjax.sequence import batch as batches
from mmjax.sequence.batch import Batch
from mmjax.sequence.document import Document, Image
from mmjax.sequence.interleave import Example, See, interleave
from mmjax.tokenizers import image as images
from mmjax.tokenizers.vocab import Vocab


@dataclass(frozen=True)
class Source:
    """The batches of a plan; `source[step]` is a Batch of NumPy arrays, the same on every call."""

    documents: Sequence[Document]
    layout: LayoutOf
    plan: Plan
    vocab: Vocab
    patch: int
    see: See = "causal"

    @property
    def values(self) -> int:
        return self.patch * self.patch * 3

    def __len__(self) -> int:
        return len(self.plan.steps)

    def __getitem__(self, step: int) -> Batch:
        planned = self.plan.steps[step]
        rows = [[self.example(self.documents[n]) for n in row] for row in planned.rows]
        return batches.build(rows, self.plan.buckets[planned.bucket], self.values, self.vocab)

    def example(self, document: Document) -> tuple[Example, list[np.ndarray]]:
        """One document's descriptor and the patches of its pictures.

        Raises:
          InputError: a picture that cannot be decoded; the message names document and span.
        """
        x = interleave(self.layout(document), self.vocab, self.see)
        return x, [self._patches(document, i, grid) for i, grid in enumerate(x.grid)]

    def _patches(self, document: Document, number: int, grid: np.ndarray) -> np.ndarray:
        picture = document.images[number]
        try:
            pixels = load(picture)
        except InputError as error:
            raise InputError(f"Document {document.id!r}, picture {number}: {error}") from error
        if pixels.shape[:2] != (picture.height, picture.width):
            raise InputError(
                f"Document {document.id!r}, picture {number}: declared as {picture.height}x{picture.width} but is "
                f"{pixels.shape[0]}x{pixels.shape[1]} pixels; make the index again."
            )
        pixels = images.resize(pixels, int(grid[1]) * self.patch, int(grid[2]) * self.patch)
        return images.patchify(pixels, self.patch)

    def ids(self, step: int, row: int) -> list[str]:
        """The documents of one row, for messages."""
        return [self.documents[n].id for n in self.plan.steps[step].rows[row]]


def load(picture: Image) -> np.ndarray:
    """A picture's pixels u8[height, width, 3], from whatever its source is."""
    if isinstance(picture.source, bytes | Path | np.ndarray):
        return images.decode(picture.source)
    return picture.source()


def read(source: Source, start: int, *, threads: int = 2, ahead: int = 8) -> Iterator[Batch]:
    """The batches from step `start` on, read by Grain in threads, `ahead` of them at most before they are asked for."""
    import grain  # 3 seconds: not for those who only ask for --help

    return iter(
        grain.MapDataset.source(source)
        .slice(slice(start, None))
        .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
    )
