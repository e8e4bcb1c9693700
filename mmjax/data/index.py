"""The index pass: lengths of all documents, from text and image headers alone, and the plan of every step."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from mmjax.core.errors import InputError
from mmjax.data.mixture import permute
from mmjax.sequence import buckets
from mmjax.sequence.batch import Bucket
from mmjax.sequence.document import Document
from mmjax.sequence.layout import DIMENSIONS, Layout
from mmjax.sequence.pack import pack_shapes
from mmjax.sequence.split import split

WINDOW = 2048  # documents that are packed together: the look-ahead
KEEP = 4  # one part in so many of a window waits for the next one, for the last rows of a heap fill badly
NO_LIMIT = 2**40
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
    used: tuple[tuple[int, ...], ...]  # per bucket, over all its steps: how much of each dimension is not padding
    parts: tuple[Document, ...] = ()  # of documents that were split, numbered from the number of documents on

    def document(self, documents: Sequence[Document], number: int) -> Document:
        """The document of a number in a row."""
        return documents[number] if number < len(documents) else self.parts[number - len(documents)]

    @property
    def steps_of(self) -> tuple[int, ...]:
        """How many steps use each bucket."""
        return tuple(int(n) for n in np.bincount([s.bucket for s in self.steps], minlength=len(self.buckets)))

    @property
    def fills(self) -> Float[np.ndarray, "d"]:
        """The share of every dimension (layout.DIMENSIONS) that is not padding."""
        room = sum(np.multiply(b.row, b.rows * n) for b, n in zip(self.buckets, self.steps_of, strict=True))
        return np.sum(self.used, axis=0) / np.maximum(room, 1)

    @property
    def fill_tokens(self) -> float:
        return float(self.fills[0])

    @property
    def fill_patches(self) -> float:
        return float(self.fills[1])

    @property
    def fill(self) -> float:
        """The harmonic mean of the fills of tokens and patches."""
        return buckets.harmonic(self.fill_tokens, self.fill_patches)

    def table(self) -> str:
        """What will be compiled and how full it is, a line per bucket: to be read before training starts."""
        # Answers have a column where they are apart.
        shown = len(DIMENSIONS) - (not any(b.answers for b in self.buckets))
        names = [f"{name:>{max(9, len(name) + 2)}}" for name in DIMENSIONS[:shown]]
        title = f"bucket (rows × {', '.join(DIMENSIONS[:shown])})"
        wide = max(50, len(title))
        head = f"{title:<{wide}}{'steps':>8}" + "".join(names)
        lines = [head]
        for bucket, steps, used in zip(self.buckets, self.steps_of, self.used, strict=True):
            size = f"{bucket.rows} × " + ", ".join(map(str, bucket.row[:shown]))
            room = np.multiply(bucket.row, bucket.rows * steps)
            shares = [f"{u / r:.1%}" if r else "-" for u, r in zip(used, room, strict=True)]
            full = "".join(f"{share:>{len(name)}}" for share, name in zip(shares, names, strict=False))
            lines.append(f"{size:<{wide}}{steps:>8}{full}")
        lines.append(
            f"{len(self.buckets)} programs to compile; expected fill {self.fill:.1%} (tokens {self.fill_tokens:.1%}, "
            f"patches {self.fill_patches:.1%}), the rest is padding"
        )
        return "\n".join(lines)


LayoutOf = Callable[[Document], Layout]


def measure(documents: Sequence[Document], numbers: Iterable[int], layout: LayoutOf) -> Int[np.ndarray, "n 5"]:
    """What the documents with these numbers take up (see Layout.size)."""
    return np.array([layout(documents[n]).size for n in numbers], np.int64).reshape(-1, len(DIMENSIONS))


def training(
    documents: Sequence[Document],
    layout: LayoutOf,
    *,
    steps: int | None,
    k: int,
    tokens: int,
    rows: int,
    seed: int,
    patches: int = 0,
    fixed: tuple[Bucket, ...] = (),
    long: Literal["refuse", "split"] = "refuse",
    answers: int = 0,
) -> Plan:
    """Plans `steps` training steps over the documents in order, window by window.

    A window's documents are packed together with those that waited from the one before, and its rows shuffled. Rows
    that do not fill a step wait for the next window: until the last step every document is used at most once.

    Args:
      documents: number → document; no pixels are read.
      layout: gives a document's lengths.
      steps: how many batches; None: as many as it takes to use every document exactly once (the last of each bucket
        may have empty rows).
      k: how many bucket shapes at most.
      tokens, rows: the shape of every batch.
      seed: of the shuffles.
      patches: of the largest document that may come; 0: as many as the sample has from which shapes are chosen.
      fixed: the bucket shapes, where none are to be chosen.
      long: what happens to a document that is longer than a row (see sequence.split).
      answers: tokens of a row's answers, where they are a second stream (sequence.answer).

    Raises:
      InputError: too few documents for so many steps; a document that does not fit a row.
    """
    done: list[Step] = []
    shapes: tuple[Bucket, ...] = ()
    numbers, sizes = np.zeros(0, np.int64), np.zeros((0, len(DIMENSIONS)), np.int64)
    taken, parts = {}, []
    for start in range(0, len(documents), WINDOW):
        window = np.arange(start, min(start + WINDOW, len(documents)))
        new = measure(documents, window.tolist(), layout)
        if long == "split":
            room = max((b.row for b in fixed), default=(tokens, patches or NO_LIMIT, NO_LIMIT, NO_LIMIT, answers))
            window, new = _split(documents, window, new, layout, room, parts)
        names = _names(documents, parts, window)
        if not shapes:
            shapes = fixed or buckets.choose(new[:SAMPLE], k, tokens, rows, patches, names, answers)
            waiting: list[list[tuple[int, ...]]] = [[] for _ in shapes]
        buckets.refuse_too_large(new, shapes, names)
        numbers, sizes = np.append(numbers, window), np.concatenate([sizes, new])
        last = start + WINDOW >= len(documents)
        packed, left = pack_shapes(sizes, [s.row for s in shapes], 0 if last else WINDOW // KEEP)
        taken |= {int(numbers[i]): sizes[i] for _, row in packed for i in row}
        ready = []
        for j in _shuffled(len(packed), f"{seed}/{start}/rows"):
            b, row = packed[j]
            waiting[b].append(tuple(int(numbers[i]) for i in row))
            if len(waiting[b]) == rows:
                ready.append(Step(b, tuple(waiting[b])))
                waiting[b] = []
        done += [ready[i] for i in _shuffled(len(ready), f"{seed}/{start}/steps")]
        numbers, sizes = numbers[left], sizes[left]
        if steps is not None and len(done) >= steps:
            return _plan(shapes, done[:steps], taken, parts)
    if steps is None and shapes:
        return _plan(shapes, done + [Step(b, tuple(left)) for b, left in enumerate(waiting) if left], taken, parts)
    raise InputError(
        f"{len(documents)} documents fill {len(done)} steps of {rows} rows × {tokens} tokens, not {steps or 'one'}; "
        f"ask for fewer steps or give more documents."
    )


def _shuffled(size: int, name: str) -> list[int]:
    """All numbers below `size`, in an order that is the name's in every version of everything (see mixture.permute)."""
    key = hashlib.blake2b(name.encode(), digest_size=32).digest()
    return [permute(i, size, key) for i in range(size)]


def once(
    documents: Sequence[Document],
    layout: LayoutOf,
    *,
    tokens: int,
    rows: int,
    answers: int = 0,
    shape: Bucket | None = None,
) -> Plan:
    """Plans every document exactly once in one bucket shape; the last batch may have empty rows. For evaluation.

    shape: the bucket, where it is known already, in place of tokens, rows and answers; InputError if a document does
    not fit it.
    """
    sizes = measure(documents, range(len(documents)), layout)
    names = _names(documents, (), range(len(sizes)))
    shapes = (shape,) if shape else buckets.choose(sizes, 1, tokens, rows, names=names, answers=answers)
    buckets.refuse_too_large(sizes, shapes, names)
    packed = [tuple(row) for _, row in pack_shapes(sizes, [s.row for s in shapes])[0]]
    each = shapes[0].rows
    steps = [Step(0, tuple(packed[i : i + each])) for i in range(0, len(packed), each)]
    return _plan(shapes, steps, dict(enumerate(sizes)))


def _names(
    documents: Sequence[Document], parts: Sequence[Document], numbers: Sequence[int] | np.ndarray
) -> Callable[[int], str]:
    """What messages call the documents with these numbers; they are read only where there is a message."""

    def name(i: int) -> str:
        n = int(numbers[i])
        document = documents[n] if n < len(documents) else parts[n - len(documents)]
        return f"number {n} ({document.id!r})"

    return name


def _split(
    documents: Sequence[Document],
    window: np.ndarray,
    sizes: np.ndarray,
    layout: LayoutOf,
    room: tuple[int, ...],
    parts: list[Document],
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and sizes of a window in which documents larger than `room` are replaced by their parts."""
    large = (sizes > np.asarray(room)).any(1)
    if not large.any():
        return window, sizes
    first = len(documents) + len(parts)
    for n in window[large]:
        parts += split(documents[int(n)], layout, room)
    new = range(first, len(documents) + len(parts))
    counted = measure(parts, range(first - len(documents), len(parts)), layout)
    return np.append(window[~large], new), np.concatenate([sizes[~large], counted])


def _plan(
    shapes: tuple[Bucket, ...], steps: list[Step], sizes: dict[int, np.ndarray], parts: Sequence[Document] = ()
) -> Plan:
    # A bucket that no step uses is not compiled: leave it out, and number the others anew.
    kept = sorted({step.bucket for step in steps})
    steps = [Step(kept.index(step.bucket), step.rows) for step in steps]
    used = np.zeros((len(kept), len(DIMENSIONS)), np.int64)
    for step in steps:
        for row in step.rows:
            used[step.bucket] += sum(sizes[n] for n in row)
    return Plan(tuple(shapes[b] for b in kept), tuple(steps), tuple(tuple(map(int, u)) for u in used), tuple(parts))
