"""The batch: rows of packed documents in one static shape, one descriptor per token."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import numpy as np

from mmjax.core.errors import InputError
from mmjax.sequence.interleave import PLAIN, Config, Example, refuse_instruction
from mmjax.sequence.layout import AUDIO, DIMENSIONS, EMPTY, TEXT, Size, described
from mmjax.tokenizers.patches import Deferred
from mmjax.tokenizers.vocab import Vocab


@dataclass(frozen=True)
class Bucket:
    """The static sizes of a batch; every batch of a bucket runs the same compiled program."""

    rows: int
    tokens: int
    patches: int
    images: int
    frames: int = 0  # of sound
    answers: int = 0  # tokens of the second stream of an encoder–decoder

    @property
    def row(self) -> Size:
        """What one row holds, in the order of Layout.size."""
        return self.tokens, self.patches, self.images, self.frames, self.answers


Field = Any  # an array on host or device; under tree.map whatever takes its place (a shape, a sharding)


@flax.struct.dataclass
class Batch:
    """B rows of L tokens; the row's pictures lie in its own P patches and N images, its sound in its F frames.

    The token at [b, l] sees exactly the tokens of its row with lo <= order <= hi; patches and frames likewise. A field
    that no part of the model asks for is None.
    """

    tokens: Field  # i32[B, L]; media tokens carry the placeholder id, empty places the padding id
    modality: Field  # i8[B, L]; 0 empty, 1 text, 2 image, 3 audio, 4 video
    document: Field  # i32[B, L]; which of the row's documents, -1 in empty places
    order: Field  # i32[B, L]; label, rises along the row, -1 in empty places
    lo: Field  # i32[B, L]
    hi: Field  # i32[B, L]; lo > hi sees nothing
    media_lo: Field  # i32[B, L]; the media tokens that text looks at by cross-attention, counted through the row
    media_hi: Field  # i32[B, L]
    position: Field  # i32[B, L, 3]; time, height, width
    slot: Field  # i32[B, L]; which of the row's media tokens stands here (sound: of its sound's), -1 for text
    target: Field  # i32[B, L]
    weight: Field  # f32[B, L]
    patches: Field  # u8[B, P, C]
    patch_order: Field  # i32[B, P]
    patch_lo: Field  # i32[B, P]
    patch_hi: Field  # i32[B, P]
    window_lo: Field  # i32[B, P]; the same for layers that see their window alone
    window_hi: Field  # i32[B, P]
    patch_position: Field  # i32[B, P, 2]; row, column
    patch_image: Field  # i32[B, P]; which of the row's images, -1 in empty places
    patch_kind: Field  # i8[B, P]; 0 empty, 1 its token stands in the sequence, 2 it does not
    grid: Field  # i32[B, N, 3]; frames, rows, columns
    frames: Field  # f32[B, F, S]; sound
    frame_order: Field  # i32[B, F]
    frame_lo: Field  # i32[B, F]
    frame_hi: Field  # i32[B, F]
    mix_slot: Field = None  # i32[B, L, 3]; media tokens that the one at `slot` is mixed with, -1 for none
    mix_share: Field = None  # f32[B, L, 4]; the shares of all four
    # What the connector reads beside the row's pictures: tokens, order and, as document, the number of the picture.
    instruction: Field = None  # a Batch of nothing else
    # The second stream of an encoder–decoder: all about its tokens; media_lo and media_hi are labels of the first.
    answer: Field = None


def axes(batch: Batch) -> Batch:
    """The logical axes of every field (core.meshes): rows, and the row's length where it is tokens, patches, frames.

    Every other dimension is whole, and so are the few numbers of each picture, which patches on all devices look up.
    """

    def of(name: str, x: Field) -> Any:
        if isinstance(x, Batch):
            return axes(x)
        along = None if name == "grid" else "length"
        return None if x is None else ("batch", along) + (None,) * (x.ndim - 2)

    return Batch(**{f.name: of(f.name, getattr(batch, f.name)) for f in dataclasses.fields(batch)})


@dataclass(frozen=True)
class Values:
    """How many numbers one patch and one frame of sound have."""

    patch: int
    frame: int = 0


def empty(bucket: Bucket, values: int | Values, vocab: Vocab, cfg: Config = PLAIN) -> Batch:
    """A batch of empty rows, as NumPy arrays.

    Args:
      bucket: the sizes.
      values: numbers in a patch (C), and in a frame of sound (S) where the bucket has room for sound.
      vocab: for padding.
      cfg: which descriptors there are.

    Raises:
      InputError: the model reads a second stream and the bucket has no room for it, or the other way round.
    """
    if bool(cfg.answer) != bool(bucket.answers):
        raise InputError(
            f"A bucket has room for {bucket.answers} tokens of answers in a row, but sequence.answer is {cfg.answer}; "
            f"give both or neither."
        )
    values = values if isinstance(values, Values) else Values(values)
    b, length, p, f = bucket.rows, bucket.tokens, bucket.patches, bucket.frames

    def full(shape: tuple[int, ...], value: int = 0, dtype=np.int32) -> np.ndarray:
        return np.full((b, *shape), value, dtype)

    cross, window = cfg.cross != "none", bool(cfg.window)
    return Batch(
        tokens=full((length,), vocab.pad),
        modality=full((length,), EMPTY, np.int8),
        document=full((length,), -1),
        order=full((length,), -1),
        lo=full((length,)),
        hi=full((length,), -1),
        media_lo=full((length,)) if cross else None,
        media_hi=full((length,), -1) if cross else None,
        position=full((length, 3)),
        slot=full((length,), -1),
        target=full((length,)),
        weight=full((length,), 0, np.float32),
        patches=full((p, values.patch), 0, np.uint8),
        patch_order=full((p,), -1),
        patch_lo=full((p,)),
        patch_hi=full((p,), -1),
        window_lo=full((p,)) if window else None,
        window_hi=full((p,), -1) if window else None,
        patch_position=full((p, 2)),
        patch_image=full((p,), -1),
        patch_kind=full((p,), 0, np.int8),
        grid=full((bucket.images, 3)),
        frames=full((f, values.frame), 0, np.float32) if f else None,
        frame_order=full((f,), -1) if f else None,
        frame_lo=full((f,)) if f else None,
        frame_hi=full((f,), -1) if f else None,
        mix_slot=full((length, 3), -1) if cfg.mixes else None,
        mix_share=full((length, 4), 0, np.float32) if cfg.mixes else None,
        instruction=_texts(full, bucket.images * cfg.instruction) if cfg.instruction else None,
        answer=_answers(full, bucket.answers, vocab) if cfg.answer else None,
    )


def _texts(full: Callable, length: int) -> Batch:
    """Empty rows of a second stream of text."""
    nothing = dict.fromkeys(field.name for field in dataclasses.fields(Batch))
    stream = {"tokens": full((length,)), "document": full((length,), -1), "order": full((length,), -1)}
    return Batch(**nothing | stream)


def _answers(full: Callable, length: int, vocab: Vocab) -> Batch:
    """Empty rows of the second stream of an encoder–decoder."""
    return _texts(full, length).replace(
        tokens=full((length,), vocab.pad),
        modality=full((length,), EMPTY, np.int8),
        lo=full((length,)),
        hi=full((length,), -1),
        media_lo=full((length,)),
        media_hi=full((length,), -1),
        position=full((length, 3)),
        target=full((length,)),
        weight=full((length,), 0, np.float32),
    )


def abstract(bucket: Bucket, values: int | Values, vocab: Vocab, cfg: Config = PLAIN) -> Batch:
    """The shapes and dtypes of a bucket's batches."""
    one = empty(Bucket(1, *bucket.row), values, vocab, cfg)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((bucket.rows, *x.shape[1:]), x.dtype), one)


def build(
    rows: Sequence[Iterable[tuple[Example, Sequence[np.ndarray | Deferred]]]],
    bucket: Bucket,
    values: int | Values,
    vocab: Vocab,
    cfg: Config = PLAIN,
) -> Batch:
    """Packs documents into rows.

    Args:
      rows: for every row, its documents: (example, its media in reading order). A picture or video is
        u8[patches, C], row by row, view after view, or Deferred (as tokenizers.patches.Pixels), which are cut straight
        into their place; sound is f32[frames, S]. Documents are asked for one after the other. Fewer rows than the
        bucket's leave the rest empty.
      bucket: the sizes to fill.
      values: C (and S).
      vocab: for padding and ranges.
      cfg: what the examples were made with.

    Raises:
      InputError: documents that do not fit their row, media that are not what the layout promised. The message names
        the document.
    """
    values = values if isinstance(values, Values) else Values(values)
    batch = empty(bucket, values, vocab, cfg)
    if len(rows) > bucket.rows:
        raise InputError(f"{len(rows)} rows were given to a bucket of {bucket.rows}; split them over more batches.")
    for r, documents in enumerate(rows):
        at = np.zeros(len(DIMENSIONS), np.int64)
        media = sounds = 0
        for d, (x, given) in enumerate(documents):
            if (at + x.size > bucket.row).any():
                wants, taken, room = map(described, (x.size, at, bucket.row))
                raise InputError(
                    f"Document {x.id!r} ({wants}) does not fit its row: {taken} of {room} are taken; use a larger "
                    f"bucket or a lower resolution."
                )
            pictures, clips = _checked(x, given, values)
            _place(batch, r, d, x, at.tolist(), (media, sounds))
            _cut(pictures, batch.patches[r, at[1] : at[1] + x.size[1]], x.patch_raster, cfg)
            if clips:
                batch.frames[r, at[3] : at[3] + x.size[3]] = np.concatenate(clips)
            at += x.size
            media, sounds = media + x.media, sounds + x.sounds
    return batch


def _cut(pictures: Sequence[np.ndarray | Deferred], out: np.ndarray, raster: np.ndarray, cfg: Config) -> None:
    """Writes a document's pictures into its share of the row's patches."""
    at = 0
    for picture in pictures:
        n = len(picture)
        if isinstance(picture, Deferred):
            picture.write(out[at : at + n], cfg.merge, cfg.window)
        else:
            out[at : at + n] = picture[raster[at : at + n] - at]
        at += n


def _place(batch: Batch, r: int, d: int, x: Example, at: list[int], made: tuple[int, int]) -> None:
    """Writes the descriptors of a row's next document, moved on by what is there already."""
    (token, patch, image, frame, answer), (tokens, patches, images, frames, _) = at, x.size
    media, sounds = made
    t, p, f = slice(token, token + tokens), slice(patch, patch + patches), slice(frame, frame + frames)
    batch.tokens[r, t], batch.modality[r, t], batch.document[r, t] = x.tokens, x.modality, d
    batch.order[r, t] = np.arange(token, token + tokens)
    batch.lo[r, t], batch.hi[r, t] = x.lo + token, x.hi + token
    if batch.media_lo is not None:
        batch.media_lo[r, t], batch.media_hi[r, t] = x.media_lo + media, x.media_hi + media
    batch.position[r, t] = x.position
    batch.slot[r, t] = np.where(x.slot < 0, -1, x.slot + np.where(x.modality == AUDIO, sounds, media))
    if batch.mix_slot is not None:
        batch.mix_slot[r, t] = np.where(x.mix_slot < 0, -1, x.mix_slot + media)
        batch.mix_share[r, t] = x.mix_share
    batch.target[r, t], batch.weight[r, t] = x.target, x.weight
    if batch.answer is not None:
        _answer(batch.answer, r, d, x, answer, token)
    if patches:
        batch.patch_order[r, p] = np.arange(patch, patch + patches)
        batch.patch_lo[r, p], batch.patch_hi[r, p] = x.patch_lo + patch, x.patch_hi + patch
        if batch.window_lo is not None:
            batch.window_lo[r, p], batch.window_hi[r, p] = x.window_lo + patch, x.window_hi + patch
        batch.patch_position[r, p] = x.patch_position
        batch.patch_image[r, p] = x.patch_image + image
        batch.patch_kind[r, p] = x.patch_kind
        batch.grid[r, image : image + images] = x.grid
        if batch.instruction is not None:
            _instruct(batch.instruction, r, x, image, len(batch.grid[r]))
    if frames:
        batch.frame_order[r, f] = np.arange(frame, frame + frames)
        batch.frame_lo[r, f], batch.frame_hi[r, f] = x.frame_lo + frame, x.frame_hi + frame


def _answer(stream: Batch, r: int, d: int, x: Example, at: int, first: int) -> None:
    """Writes a document's answer from place `at` on; it looks at the document's tokens, from label `first` on."""
    t, order = slice(at, at + len(x.answer.tokens)), np.arange(at, at + len(x.answer.tokens))
    stream.tokens[r, t], stream.modality[r, t], stream.document[r, t] = x.answer.tokens, TEXT, d
    stream.order[r, t], stream.lo[r, t], stream.hi[r, t] = order, at, order
    stream.media_lo[r, t], stream.media_hi[r, t] = first, first + len(x.tokens) - 1
    stream.position[r, t] = (order - at)[:, None]
    stream.target[r, t], stream.weight[r, t] = x.answer.target, x.answer.weight


def _instruct(stream: Batch, r: int, x: Example, first: int, pictures: int) -> None:
    """Writes what is read beside a document's pictures, the row's from `first` on, each into a place of its own."""
    room, said = stream.tokens.shape[1] // pictures, x.instruction
    refuse_instruction(x.id, said, room)
    for n, ids in enumerate(said):
        ids, before = ids[ids >= 0], stream.order[r].max(initial=-1) + 1
        at = slice((first + n) * room, (first + n) * room + len(ids))
        stream.tokens[r, at], stream.document[r, at] = ids, first + n
        stream.order[r, at] = before + np.arange(len(ids))


def _checked(
    x: Example, given: Sequence[np.ndarray | Deferred], values: Values
) -> tuple[list[np.ndarray | Deferred], list[np.ndarray]]:
    """Pictures and sounds, if they are what the layout promised."""
    pictures = [m for m in given if m.dtype == np.uint8 and m.ndim == 2]
    sounds = [m for m in given if m.dtype == np.float32 and m.ndim == 2]
    promised = (int(np.prod(x.grid, axis=1).sum()), values.patch), (len(x.frame_lo), values.frame)
    found = [
        (sum(len(m) for m in media), media[0].shape[1] if media else own[1])
        for media, own in zip((pictures, sounds), promised, strict=True)
    ]
    even = all(len({m.shape[1] for m in media}) < 2 for media in (pictures, sounds))
    # A picture ends where one of its views does.
    ends = itertools.accumulate(len(m) for m in pictures)
    even = even and set(np.cumsum(np.prod(x.grid, axis=1)).tolist()).issuperset(ends)
    if tuple(found) != promised or not even or len(pictures) + len(sounds) != len(given):
        shapes = [(*m.shape, str(m.dtype)) for m in given]
        raise InputError(
            f"Document {x.id!r} was laid out for {promised[0][0]} patches of {promised[0][1]} bytes and "
            f"{promised[1][0]} frames of {promised[1][1]} numbers but got {shapes}; a medium changed since the index "
            f"was made, or another resolution policy was used."
        )
    return pictures, sounds
