"""From plan to batches: Grain reads, decodes in threads and keeps ahead of the step. batch(step) is a pure function."""

import dataclasses
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mmjax.core.errors import InputError
from mmjax.data import device
from mmjax.data.index import LayoutOf, Plan
from mmjax.data.memory import Memory
from mmjax.sequence import batch as batches
from mmjax.sequence import interleave, invariants
from mmjax.sequence.batch import Batch, Values
from mmjax.sequence.document import Audio, Document, Encoded, Image, Video
from mmjax.sequence.interleave import Example
from mmjax.sequence.layout import Piece
from mmjax.sequence.media import film, load, refuse_shape, refuse_sizes, still, views_of
from mmjax.tokenizers import image as images
from mmjax.tokenizers.patches import Deferred
from mmjax.tokenizers.view import needed, size
from mmjax.tokenizers.vocab import Vocab

Medium = np.ndarray | Deferred

log = logging.getLogger("mmjax")


class Holes:
    """The documents whose media could not be read, and why; at most `budget` of them.

    Such a document keeps its place in the plan, but its media are blank and nothing in it is learnt: no other document
    moves.
    """

    def __init__(self, budget: int = 0):
        self.budget, self.reasons, self._lock = budget, {}, threading.Lock()

    def add(self, id: str, error: InputError) -> None:
        """Raises InputError where the budget is spent."""
        with self._lock:
            new = id not in self.reasons
            self.reasons[id] = str(error)
            if len(self.reasons) <= self.budget:
                if new:
                    log.warning("left out %d of at most %d: %s", len(self.reasons), self.budget, error)
                return
        if self.budget:
            raise InputError(
                f"{error} With it {len(self.reasons)} documents cannot be read, and packing.holes is {self.budget}."
            ) from error
        raise error


@runtime_checkable
class Features(Protocol):
    """Knows what the vision tower makes of pictures it has seen (train.features)."""

    def look(
        self, content: bytes | np.ndarray, medium: Image | Video, piece: Piece
    ) -> tuple[str, dict[str, np.ndarray] | None]:
        """A medium's key, from its file's bytes or its pixels, and its features where they are known."""
        ...


@dataclass(frozen=True)
class Named(Deferred):
    """A picture or clip with the key of its features; its patches are not made where these are known."""

    key: str  # "" for what could not be read
    views: int
    size: tuple[int, int]  # patches, and values of each
    features: dict[str, np.ndarray] | None = None
    patches: Deferred | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    def write(self, out: np.ndarray, merge: int = 1, window: int = 0) -> None:
        """Writes the patches into `out`, where they were made."""
        if self.patches is not None:
            self.patches.write(out, merge, window)


@dataclass(frozen=True)
class Source:
    """The batches of a plan; `source[step]` is a Batch of NumPy arrays, the same on every call.

    Where several hosts share the rows of every step, they are cut into `of` equal parts, one after the other, and this
    source makes those that `parts` names: all hosts run the same bucket, and all parts are the batch of a single host.
    """

    documents: Sequence[Document]
    layout: LayoutOf
    plan: Plan
    vocab: Vocab
    patch: int
    cfg: interleave.Config = interleave.PLAIN
    latents: int = 0  # media tokens per picture; 0: one per patch, or per square of `merge` × `merge` patches
    sound: int = 0  # samples in a frame of sound
    stack: int = 1  # pictures of a clip in a patch (Qwen-VL: 2); others are there so many times
    merge: int = 1  # patches a side of what the connector makes one media token of
    holes: Holes = field(default_factory=Holes, compare=False)
    # What the connector reads beside each of so many pictures of a document (interleave.Example.instruction).
    said: Callable[[Document, int], np.ndarray] | None = field(default=None, compare=False)
    limits: images.Limits = images.LIMITS  # of a picture
    memory: Memory = field(default_factory=Memory, compare=False)  # that all threads together decode in
    reduced: bool = False  # decode large JPEG at a lower scale, no lower than what they are resized to
    canvases: device.Canvases | None = None  # resize on device: `patches` is then an array there
    parts: tuple[int, ...] = (0,)
    of: int = 1
    checks: bool = True  # of every batch, before it leaves (0.1 ms; the train step counts again)
    features: Features | None = None  # pictures whose features it knows are not decoded: see `named`

    @property
    def values(self) -> Values:
        return Values(self.patch * self.patch * 3 * self.stack, self.sound)

    def __len__(self) -> int:
        return len(self.plan.steps)

    def __getitem__(self, step: int) -> Batch:
        return self.named(step)[0]

    def named(self, step: int) -> tuple[Batch, list[list[Named]]]:
        """The batch, and with `features` the pictures and clips of every row, with what is known of them.

        The patches of those whose features are known are zeros.
        """
        planned = self.plan.steps[step]
        whole = self.plan.buckets[planned.bucket]
        share = whole.rows // self.of
        if share * self.of != whole.rows:
            raise InputError(f"{whole.rows} rows cannot be shared by {self.of} evenly; use a multiple of that.")
        mine = [planned.rows[r] if r < len(planned.rows) else () for p in self.parts for r in _range(p, share)]
        ids: list[list[str]] = []
        parts: list[tuple[int, int, device.OnDevice]] = []
        named: list[list[Named]] = []
        rows = [self._row(r, row, ids, parts, named) for r, row in enumerate(mine)]
        bucket = dataclasses.replace(whole, rows=len(rows))
        batch = batches.build(rows, bucket, self.values, self.vocab, self.cfg)
        if self.checks:
            media = np.repeat(batch.grid.prod(-1) > 0, self.latents, axis=1) if self.latents else None
            if self.merge > 1:
                kind = batch.patch_kind[:, :: self.merge**2]
                media = kind == interleave.PIXEL if batch.media_lo is None else kind > 0
            invariants.check(batch, self.vocab, ids, media)
        if self.canvases:
            batch = batch.replace(patches=device.finish(batch.patches, parts, self.cfg.merge, self.cfg.window))
        return batch, named

    def _row(
        self,
        row: int,
        numbers: Sequence[int],
        ids: list[list[str]],
        parts: list[tuple[int, int, device.OnDevice]],
        named: list[list[Named]],
    ) -> Iterator[tuple[Example, list[Medium]]]:
        """A row's documents, each read when it is asked for and cut into the batch before the next is read.

        Fills `ids` with their names, `parts` with what is on device already and its place, and `named` with what has
        a key.
        """
        ids.append([])
        named.append([])
        at = 0
        for number in numbers:
            x, media = self.example(self.plan.document(self.documents, number))
            ids[-1].append(x.id)
            for medium in media:
                named[-1] += [medium] if isinstance(medium, Named) else []
                made = medium.patches if isinstance(medium, Named) else medium
                if isinstance(made, device.OnDevice):
                    parts.append((row, at, made))
                at += len(medium) if medium.dtype == np.uint8 else 0
            yield x, media

    def example(self, document: Document) -> tuple[Example, list[Medium]]:
        """One document's descriptor, and its media in reading order.

        Raises:
          InputError: a medium that cannot be read, beyond what `holes` allows; the message names document and span.
        """
        layout = self.layout(document)
        x = interleave.interleave(layout, self.vocab, self.cfg)
        if self.said is not None:
            x = dataclasses.replace(x, instruction=self.said(document, len(x.grid)))
        media = [p for p in layout.pieces if p.grid is not None]
        try:
            return x, [self._read(document, p) for p in media]
        except InputError as error:
            self.holes.add(document.id, error)
        blank = [self._blank(p) for p in media]
        return interleave.unlearnt(x), blank

    def _blank(self, piece: Piece) -> Medium:
        if not piece.views:
            return np.zeros((piece.grid[0], self.sound), np.float32)
        return (
            Named("", len(piece.views), self._shape(piece)) if self.features else np.zeros(self._shape(piece), np.uint8)
        )

    def _shape(self, piece: Piece) -> tuple[int, int]:
        return sum(math.prod(view) for view in piece.views), self.values.patch

    def _known(
        self, content: bytes | Path | np.ndarray, medium: Image | Video, piece: Piece, make: Callable[[], Deferred]
    ) -> Deferred:
        """What `make` makes of a medium; with `features`, under its key, and only where it is not known."""
        if self.features is None:
            return make()
        key, features = self.features.look(content, medium, piece)
        return Named(key, len(piece.views), self._shape(piece), features, make() if features is None else None)

    def _read(self, document: Document, piece: Piece) -> Medium:
        medium = document.spans[piece.span]
        where = f"Document {document.id!r}, span {piece.span}"
        try:
            if isinstance(medium, Audio):
                return self._sound(medium, piece.grid[0])
            return self._frames(medium, piece) if isinstance(medium, Video) else self._picture(medium, piece)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        except Exception as error:  # a dataset's own function: whatever it raises, the example's name is wanted
            raise InputError(f"{where}: could not be read ({type(error).__name__}: {error}).") from error

    def _picture(self, picture: Image, piece: Piece) -> Deferred:
        source = picture.source.read() if isinstance(picture.source, Encoded) else picture.source
        if isinstance(source, Path) and self.features:  # read once: its key is that of the bytes which are decoded
            source = images.read_bytes(source, self.limits)
        if isinstance(source, bytes | Path | np.ndarray):
            return self._known(source, picture, piece, lambda: self._decoded(source, picture, piece))
        with self.memory.hold(images.ARRAY_BYTES * picture.height * picture.width):
            pixels = source()
            refuse_shape(pixels.shape, (picture.height, picture.width))
            return self._known(pixels, picture, piece, lambda: still(pixels, picture, piece, self.patch, self.stack))

    def _decoded(self, source: bytes | Path | np.ndarray, picture: Image, piece: Piece) -> Deferred:
        views = views_of(piece, picture)
        found = images.find(source, self.limits)
        refuse_shape((*found.size, 3), (picture.height, picture.width))
        canvas = self.canvases and self.canvases.of(found.size)
        if canvas and self.stack == 1 and device.possible(views):
            refuse_sizes([size(view, *found.size) for view in views], piece, self.patch)
            with self.memory.hold(found.memory + 3 * math.prod(canvas)):
                return device.cut(found, views, self.patch, self.canvases)
        least = needed(views) if self.reduced else None
        with self.memory.hold(found.memory):
            return still(found.load(least=least), picture, piece, self.patch, self.stack)

    def _frames(self, video: Video, piece: Piece) -> Deferred:
        # The clip, and one frame on its way.
        with self.memory.hold((3 * video.frames + images.ARRAY_BYTES) * video.height * video.width):
            frames = load(video)
            return self._known(frames, video, piece, lambda: film(frames, video, piece, self.patch, self.stack))

    def _sound(self, clip: Audio, frames: int) -> np.ndarray:
        samples = clip.source if isinstance(clip.source, np.ndarray) else clip.source()
        if samples.shape != (clip.samples,):
            raise InputError(f"declared as {clip.samples} samples but is {samples.shape}; make the index again.")
        if not (frames - 1) * self.sound < len(samples) <= frames * self.sound:
            raise InputError(
                f"{len(samples)} samples were laid out as {frames} frames, but frames have {self.sound} samples here; "
                f"give the source the policy's own `hop`."
            )
        out = np.zeros(frames * self.sound, np.float32)
        out[: len(samples)] = samples
        return out.reshape(frames, self.sound)

    def ids(self, step: int, row: int) -> list[str]:
        """The documents of one row, for messages."""
        return [self.plan.document(self.documents, n).id for n in self.plan.steps[step].rows[row]]


def _range(part: int, share: int) -> range:
    return range(part * share, (part + 1) * share)


def read(
    source: Source | Sequence, start: int, stop: int | None = None, *, threads: int = 2, ahead: int = 8
) -> Iterator[Any]:
    """The batches (what `source` has for each step) from step `start` on, up to `stop`, read by Grain in threads.

    `ahead` of them are read at most before they are asked for.
    """
    import grain  # 3 seconds: not for those who only ask for --help

    return iter(
        grain.MapDataset.source(source)
        .slice(slice(start, stop))
        .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
    )
