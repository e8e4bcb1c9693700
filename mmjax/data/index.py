"""The index pass: lengths of all documents, from text and image headers alone, and the plan of every step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from mmjax.core.errors import InputError
from mmjax.sequence import buckets
from mmjax.sequence.batch import Bucket
from mmjax.sequence.document import Document
from mmjax.sequence.layout import Layout
from mmjax.sequence.pack import pack

WINDOW = 2048  # documents packed together: the look-ahead
SAMPLE = 1024  # of the first window, from which the bucket shapes are chosen


@dataclass(frozen=True)
class Step:
    """One step's batch: its bucket, and the documents (by number) of every row."""

    bucket: int
    rows: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Plan:
    """All steps of a run, made before the first: so a batch is a function of its step, and resuming is one integer."""

    buckets: tuple[Bucket, ...]
    steps: tuple[Step, ...]
    fill_tokens: float  # share of the planned tokens that are not padding
    fill_patches: float

    @property
    def fill(self) -> float:
        """The harmonic mean of both fills."""
        both = [f for f in (self.fill_tokens, self.fill_patches) if f > 0]
        return len(both) / sum(1 / f for f in both) if both else 0.0


LayoutOf = Callable[[Document], Layout]


def measure(documents: Sequence[Document], numbers: range, layout: LayoutOf) -> Int[np.ndarray, "n 3"]:
    """(tokens, patches, images) of the documents with these numbers."""
    return np.array([layout(documents[n]).size for n in numbers], np.int64).reshape(-1, 3)


def training(
    documents: Sequence[Document], layout: LayoutOf, *, steps: int, k: int, tokens: int, rows: int, seed: int
) -> Plan:
    """Plans `steps` training steps over the documents in order, window by window.

    A window's documents are packed together and its rows shuffled. Rows that do not fill a step wait for the next
    window: until the last step every document is used exactly once.

    Args:
      documents: number → document; no pixels are read.
      layout: gives a document's lengths.
      steps: how many batches.
      k: how many bucket shapes at most.
      tokens, rows: the shape of every batch.
      seed: of the shuffles.

    Raises:
      InputError: too few documents for so many steps; a document that does not fit a row.
    """
    done: list[Step] = []
    measured = []
    shapes: tuple[Bucket, ...] = ()
    for start in range(0, len(documents), WINDOW):
        numbers = range(start, min(start + WINDOW, len(documents)))
        sizes = measure(documents, numbers, layout)
        if not shapes:
            shapes = buckets.choose(sizes[:SAMPLE], k, tokens, rows)
            waiting: list[list[tuple[int, ...]]] = [[] for _ in shapes]
        rng = np.random.default_rng((seed, start))
        ready = []
        for b, packed in enumerate(_rows(sizes, shapes, start)):
            waiting[b] += [tuple(start + i for i in packed[j]) for j in rng.permutation(len(packed))]
            while len(waiting[b]) >= rows:
                ready.append(Step(b, tuple(waiting[b][:rows])))
                del waiting[b][:rows]
        done += [ready[i] for i in rng.permutation(len(ready))]
        measured.append(sizes)
        if len(done) >= steps:
            return _plan(shapes, done[:steps], np.concatenate(measured))
    raise InputError(
        f"{len(documents)} documents fill {len(done)} steps of {rows} rows × {tokens} tokens, not {steps}; ask for "
        f"fewer steps or give more documents."
    )


def once(documents: Sequence[Document], layout: LayoutOf, *, tokens: int, rows: int) -> Plan:
    """Plans every document exactly once in one bucket shape; the last batch may have empty rows. For evaluation."""
    sizes = measure(documents, range(len(documents)), layout)
    shapes = buckets.choose(sizes, 1, tokens, rows)
    (packed,) = _rows(sizes, shapes)
    steps = [Step(0, tuple(map(tuple, packed[i : i + rows]))) for i in range(0, len(packed), rows)]
    return _plan(shapes, steps, sizes)


def _rows(sizes: np.ndarray, shapes: tuple[Bucket, ...], first: int = 0) -> list[list[list[int]]]:
    """For every bucket its packed rows."""
    bucket = buckets.assign(sizes, shapes, first)
    out = []
    for b, shape in enumerate(shapes):
        members = np.flatnonzero(bucket == b)
        out.append([[int(members[i]) for i in row] for row in pack(sizes[members], shape.row)])
    return out


def _plan(shapes: tuple[Bucket, ...], steps: list[Step], sizes: np.ndarray) -> Plan:
    room = np.sum([np.multiply(shapes[s.bucket].row, shapes[s.bucket].rows) for s in steps], axis=0)
    used = sizes[[n for s in steps for row in s.rows for n in row]].sum(0)
    # A bucket that no step uses is not compiled: leave it out, and number the others anew.
    kept = sorted({step.bucket for step in steps})
    steps = [Step(kept.index(step.bucket), step.rows) for step in steps]
    fills = used / np.maximum(room, 1)
    return Plan(tuple(shapes[b] for b in kept), tuple(steps), float(fills[0]), float(fills[1]))
