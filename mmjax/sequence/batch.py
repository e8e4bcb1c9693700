"""The batch: rows of packed documents in one static shape, one descriptor per token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mmjax.core.errors import InputError
from mmjax.sequence.interleave import Example
from mmjax.sequence.layout import EMPTY, IMAGE
from mmjax.tokenizers.vocab import Vocab


@dataclass(frozen=True)
class Bucket:
    """The static sizes of a batch; every batch of a bucket runs the same compiled program."""

    rows: int
    tokens: int
    patches: int
    images: int

    @property
    def row(self) -> tuple[int, int, int]:
        """What one row holds, in the order of Layout.size."""
        return self.tokens, self.patches, self.images


Field = Any  # an array on host or device; under tree.map whatever takes its place (a shape, a sharding)


@flax.struct.dataclass
class Batch:
    """B rows of L tokens; the row's pictures lie in its own P patches and N images.

    The token at [b, l] sees exactly the tokens of its row with lo <= order <= hi; patches likewise.
    """

    tokens: Field  # i32[B, L]; media tokens carry the placeholder id, empty places the padding id
    modality: Field  # i8[B, L]; 0 empty, 1 text, 2 image
    document: Field  # i32[B, L]; which of the row's documents, -1 in empty places
    order: Field  # i32[B, L]; label, rises along the row, -1 in empty places
    lo: Field  # i32[B, L]
    hi: Field  # i32[B, L]; lo > hi sees nothing
    position: Field  # i32[B, L, 3]; time, height, width
    slot: Field  # i32[B, L]; which of the row's media tokens stands here, -1 for text
    target: Field  # i32[B, L]
    weight: Field  # f32[B, L]
    patches: Field  # u8[B, P, C]
    patch_order: Field  # i32[B, P]
    patch_lo: Field  # i32[B, P]
    patch_hi: Field  # i32[B, P]
    patch_position: Field  # i32[B, P, 2]; row, column
    patch_image: Field  # i32[B, P]; which of the row's images, -1 in empty places
    grid: Field  # i32[B, N, 3]; frames, rows, columns


def empty(bucket: Bucket, values: int, vocab: Vocab) -> Batch:
    """A batch of empty rows, as NumPy arrays. `values` is how many numbers a patch has (C)."""
    b, length, p = bucket.rows, bucket.tokens, bucket.patches

    def full(shape: tuple[int, ...], value: int = 0, dtype=np.int32) -> np.ndarray:
        return np.full((b, *shape), value, dtype)

    return Batch(
        tokens=full((length,), vocab.pad),
        modality=full((length,), EMPTY, np.int8),
        document=full((length,), -1),
        order=full((length,), -1),
        lo=full((length,)),
        hi=full((length,), -1),
        position=full((length, 3)),
        slot=full((length,), -1),
        target=full((length,)),
        weight=full((length,), 0, np.float32),
        patches=full((p, values), 0, np.uint8),
        patch_order=full((p,), -1),
        patch_lo=full((p,)),
        patch_hi=full((p,), -1),
        patch_position=full((p, 2)),
        patch_image=full((p,), -1),
        grid=full((bucket.images, 3)),
    )


def abstract(bucket: Bucket, values: int, vocab: Vocab) -> Batch:
    """The shapes and dtypes of a bucket's batches."""
    one = empty(Bucket(1, *bucket.row), values, vocab)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((bucket.rows, *x.shape[1:]), x.dtype), one)


def build(
    rows: Sequence[Sequence[tuple[Example, Sequence[np.ndarray]]]], bucket: Bucket, values: int, vocab: Vocab
) -> Batch:
    """Packs documents into rows.

    Args:
      rows: for every row, its documents: (example, patches u8[rows × columns, C] of each picture). Fewer rows than
        the bucket's leave the rest empty.
      bucket: the sizes to fill.
      values: C.
      vocab: for padding and ranges.

    Raises:
      InputError: documents that do not fit their row, pictures whose patches are not what the layout promised. The
        message names the document.
    """
    batch = empty(bucket, values, vocab)
    if len(rows) > bucket.rows:
        raise InputError(f"{len(rows)} rows were given to a bucket of {bucket.rows}; split them over more batches.")
    for r, documents in enumerate(rows):
        at = patch_at = image_at = 0
        for d, (x, pictures) in enumerate(documents):
            n, p, g = len(x.tokens), len(x.patch_lo), len(x.grid)
            if at + n > bucket.tokens or patch_at + p > bucket.patches or image_at + g > bucket.images:
                raise InputError(
                    f"Document {x.id!r} ({n} tokens, {p} patches, {g} images) does not fit its row: {at}, {patch_at} "
                    f"and {image_at} of {bucket.tokens}, {bucket.patches} and {bucket.images} are taken; use a larger "
                    f"bucket or a lower resolution."
                )
            _check_pictures(x, pictures, values)
            t, q = slice(at, at + n), slice(patch_at, patch_at + p)
            batch.tokens[r, t], batch.modality[r, t], batch.document[r, t] = x.tokens, x.modality, d
            batch.order[r, t] = np.arange(at, at + n)
            batch.lo[r, t], batch.hi[r, t] = x.lo + at, x.hi + at
            batch.position[r, t] = x.position
            batch.slot[r, t] = np.where(x.slot >= 0, x.slot + patch_at, -1)
            batch.target[r, t], batch.weight[r, t] = x.target, x.weight
            if g:
                batch.patches[r, q] = np.concatenate(pictures)
                batch.patch_order[r, q] = np.arange(patch_at, patch_at + p)
                batch.patch_lo[r, q], batch.patch_hi[r, q] = x.patch_lo + patch_at, x.patch_hi + patch_at
                batch.patch_position[r, q] = x.patch_position
                batch.patch_image[r, q] = x.patch_image + image_at
                batch.grid[r, image_at : image_at + g] = x.grid
            at, patch_at, image_at = at + n, patch_at + p, image_at + g
    return batch


def _check_pictures(x: Example, pictures: Sequence[np.ndarray], values: int) -> None:
    expected = [(int(np.prod(grid)), values) for grid in x.grid]
    given = [tuple(p.shape) for p in pictures]
    if expected != given or any(p.dtype != np.uint8 for p in pictures):
        given = [(*p.shape, str(p.dtype)) for p in pictures]
        raise InputError(
            f"Document {x.id!r} was laid out for uint8 pictures of (patches, values) {expected} but got {given}; the "
            f"picture changed since the index was made, or another resolution policy was used."
        )


def violations(batch: Batch, vocab_size: int) -> jax.Array:
    """How often every row breaks an invariant: i32[B], zeros in a sound batch. Runs inside the jitted step.

    JAX clamps, wraps and drops bad indices without a word; this is what makes a mismatch loud. Counted: ids or targets
    out of range, media tokens without a patch or text with one, media tokens whose patch is empty, labels that do not
    rise, trained tokens that see nothing, tokens that see past their document, patches that no token shows.
    """
    filled = batch.modality != EMPTY
    image = batch.modality == IMAGE
    patches = batch.patch_order.shape[1]
    patch_filled = batch.patch_order >= 0
    slot = jnp.clip(batch.slot, 0, patches - 1)
    present = jnp.take_along_axis(patch_filled, slot, axis=1)
    previous = jax.lax.cummax(jnp.pad(batch.order, ((0, 0), (1, 0)), constant_values=-1)[:, :-1], axis=1)
    wrong = [
        (batch.tokens < 0) | (batch.tokens >= vocab_size) | (batch.target < 0) | (batch.target >= vocab_size),
        image != (batch.slot >= 0),
        image & ((batch.slot >= patches) | ~present),
        filled != (batch.order >= 0),
        filled & (batch.order <= previous),
        (batch.weight > 0) & ((batch.lo > batch.hi) | ~filled),
    ]
    # A token may reach the labels of its own document, and no others.
    begins = batch.document != jnp.pad(batch.document, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    ends = batch.document != jnp.pad(batch.document, ((0, 0), (0, 1)), constant_values=-1)[:, 1:]
    first = jax.lax.cummax(jnp.where(begins, batch.order, -1), axis=1)
    last = jax.lax.cummin(jnp.where(ends, batch.order, jnp.iinfo(jnp.int32).max), axis=1, reverse=True)
    wrong.append(filled & (batch.lo <= batch.hi) & ((batch.lo < first) | (batch.hi > last)))
    # Row by row, so that it stays local on any mesh.
    shown = jax.vmap(lambda seen, s, i: seen.at[s].max(i))(jnp.zeros_like(patch_filled), slot, image)
    unshown = (patch_filled & ~shown).sum(1)
    return sum(w.sum(1) for w in wrong) + unshown
