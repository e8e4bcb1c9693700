"""What must hold of every batch: checked on the host before it leaves, and counted again inside the jitted step.

JAX clamps, wraps and drops bad indices without a word; counting them is what makes a mismatch loud.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.core import sharding
from mmjax.core.errors import InputError
from mmjax.sequence.batch import Batch
from mmjax.sequence.interleave import PIXEL
from mmjax.sequence.layout import AUDIO, EMPTY, IMAGE, NAMES, TEXT, VIDEO
from mmjax.tokenizers.vocab import Vocab

# In the order of the counts.
KINDS = (
    "ids or targets outside the vocabulary",
    "placeholders without a media token, or media tokens without a placeholder",
    "places of media tokens that do not exist",
    "media tokens that no place shows",
    "labels that do not rise along the row",
    "trained tokens that see nothing, or that nothing can be learnt from",
    "tokens that see past their document",
    "tokens that look at media that do not exist",
    "patches or frames that see past their picture or clip",
)


Placeholder = int | tuple[int, ...] | None


def violations(
    batch: Batch,
    vocab_size: int,
    placeholder: Placeholder = None,
    media: Any = None,
    newline: bool = False,
    said: int | None = None,
) -> jax.Array:
    """How often every row breaks each of KINDS: i32[B, len(KINDS)], zeros in a sound batch; for the jitted step.

    Args:
      batch: as it came.
      vocab_size: ids must lie below it.
      placeholder: the ids that stand where media tokens go (vocab.placeholders); None leaves them unchecked.
      media: bool[B, M], which media tokens the connector makes; None for one per patch.
      newline: whether the ends of a picture's rows may carry a placeholder (see `Vocab.image_newline`).
      said: targets must lie below it; left out, below vocab_size too.
    """
    # What is counted runs along the row, and is a few numbers per token: every device counts whole rows.
    batch, media = sharding.unsplit((batch, media))
    return _count(batch, vocab_size, placeholder, media, _Device, newline, said)


def check(batch: Batch, vocab: Vocab, ids: Sequence[Sequence[str]] = (), media: np.ndarray | None = None) -> None:
    """The same on the host, for a batch of NumPy arrays.

    Raises:
      InputError: what is broken, in which row, and which documents (`ids`, by row) it holds.
    """
    known = None if vocab.numbered else vocab.placeholders
    found = _count(batch, vocab.size, known, media, _Host, vocab.image_newline in vocab.placeholders)
    if found.any():
        raise InputError(describe(found, ids))


def describe(found: np.ndarray, ids: Sequence[Sequence[str]] = ()) -> str:
    """One sentence about the first broken row of the counts i32[B, len(KINDS)]."""
    row = int(found.any(1).argmax())
    what = " and ".join(f"{n} {kind}" for n, kind in zip(found[row], KINDS, strict=True) if n)
    names = f" (the documents {', '.join(ids[row])})" if row < len(ids) else ""
    return f"Row {row}{names} breaks the batch's invariants: {what}; make the batch with sequence.batch.build."


class _Device:
    """JAX's names for what NumPy and JAX do not call the same."""

    xp = jnp

    @staticmethod
    def running_max(x: jax.Array) -> jax.Array:
        return jax.lax.cummax(x, axis=1)

    @staticmethod
    def later_min(x: jax.Array) -> jax.Array:
        return jax.lax.cummin(x, axis=1, reverse=True)

    @staticmethod
    def marked(shape: tuple[int, int], index: jax.Array, some: jax.Array) -> jax.Array:
        # Row by row, so that it stays local on any mesh.
        return jax.vmap(lambda i, s: jnp.zeros(shape[1], bool).at[i].max(s))(index, some)


class _Host:
    xp = np

    @staticmethod
    def running_max(x: np.ndarray) -> np.ndarray:
        return np.maximum.accumulate(x, axis=1)

    @staticmethod
    def later_min(x: np.ndarray) -> np.ndarray:
        return np.minimum.accumulate(x[:, ::-1], axis=1)[:, ::-1]

    @staticmethod
    def marked(shape: tuple[int, int], index: np.ndarray, some: np.ndarray) -> np.ndarray:
        out = np.zeros(shape, bool)
        if shape[1]:
            np.logical_or.at(out, (np.arange(shape[0])[:, None], index), some)
        return out


def _count(
    batch: Batch,
    vocab_size: int,
    placeholder: Placeholder,
    media: Any,
    of: type,
    newline: bool = False,
    said: int | None = None,
) -> Any:
    xp, said = of.xp, vocab_size if said is None else said
    if media is None:
        media = batch.patch_kind > 0
        wanted = batch.patch_kind == PIXEL
    else:
        wanted = media if batch.media_lo is None else xp.zeros_like(media)
    filled = batch.modality != EMPTY
    sound = batch.modality == AUDIO
    shows = (batch.slot >= 0) & ~sound
    present = _there(batch.slot, media, xp) & _mixable(batch, media, xp)
    heard = _sounds(batch, sound, of)
    is_placeholder = batch.slot >= 0
    if placeholder is not None:
        ids = (placeholder,) if isinstance(placeholder, int) else placeholder
        is_placeholder = sum((batch.tokens == i for i in ids), xp.zeros_like(filled))
    if newline:
        is_placeholder = is_placeholder & ((batch.slot >= 0) | ((batch.modality != IMAGE) & (batch.modality != VIDEO)))
    strange = (batch.modality < 0) | (batch.modality >= len(NAMES))
    visible = batch.lo <= batch.hi
    falls, past = _misled(batch, filled, of)
    wrong = [
        (batch.tokens < 0) | (batch.tokens >= vocab_size) | (batch.target < 0) | (batch.target >= said) | strange,
        (is_placeholder != (batch.slot >= 0)) | ((batch.slot >= 0) & ((batch.modality == TEXT) | ~filled)),
        (shows & ~present) | heard,
        wanted & ~of.marked(media.shape, xp.clip(batch.slot, 0, media.shape[1] - 1), shows),
        falls,
        (batch.weight != 0) & (~visible | ~filled | ~xp.isfinite(batch.weight)),
        past,
    ]
    if batch.media_lo is None:
        wrong.append(xp.zeros_like(filled))
    else:
        count = media.sum(1)[:, None]
        # Of a token that sees none, what lies between: a layer may show it that (nn.cross_attention.Config.blind).
        blind = batch.media_lo > batch.media_hi
        lo = xp.where(blind, batch.media_hi + 1, batch.media_lo)
        hi = xp.where(blind, batch.media_lo - 1, batch.media_hi)
        wrong.append(filled & (lo <= hi) & ((lo < 0) | (hi >= count)))
    sees = [(batch.patch_lo, batch.patch_hi)]
    if batch.window_lo is not None:
        sees.append((batch.window_lo, batch.window_hi))
    wrong.append(
        _past(batch.patch_image, batch.patch_order, sees, of) | ((batch.patch_kind > 0) != (batch.patch_order >= 0))
    )
    counts = [w.sum(1) for w in wrong]
    if batch.answer is not None:
        for kind, which in _second(batch.answer, vocab_size, of).items():
            counts[kind] = counts[kind] + which.sum(1)
    return xp.stack(counts, axis=1).astype(xp.int32)


def _misled(stream: Batch, filled: Any, of: type) -> tuple[Any, Any]:
    """Places whose label does not rise, and those that see past their document."""
    first, last = _ends(stream.document, stream.order, of)
    previous = of.running_max(_shifted(stream.order, of.xp))
    falls = (filled != (stream.order >= 0)) | (filled & (stream.order <= previous))
    return falls, filled & (stream.lo <= stream.hi) & ((stream.lo < first) | (stream.hi > last))


def _second(answer: Batch, vocab_size: int, of: type) -> dict[int, Any]:
    """Of the second stream of an encoder–decoder: which places break which of KINDS."""
    ids = (answer.tokens < 0) | (answer.tokens >= vocab_size) | (answer.target < 0) | (answer.target >= vocab_size)
    visible = (answer.lo <= answer.hi) & (answer.media_lo <= answer.media_hi) & (answer.order >= 0)
    falls, past = _misled(answer, answer.modality != EMPTY, of)
    return {0: ids, 4: falls, 5: (answer.weight != 0) & (~visible | ~of.xp.isfinite(answer.weight)), 6: past}


def _shifted(x: Any, xp: Any, by: int = 1) -> Any:
    """x moved on along the row, -1 before its first."""
    return xp.pad(x, ((0, 0), (by, 0)), constant_values=-1)[:, :-by]


def _ends(run: Any, order: Any, of: type) -> tuple[Any, Any]:
    """The first and the last label of the run (document, picture) that each place is in."""
    xp = of.xp
    begins = run != _shifted(run, xp)
    ends = run != xp.pad(run, ((0, 0), (0, 1)), constant_values=-1)[:, 1:]
    first = of.running_max(xp.where(begins, order, -1))
    return first, of.later_min(xp.where(ends, order, np.iinfo(np.int32).max))


def _past(run: Any, order: Any, sees: Sequence[tuple[Any, Any]], of: type) -> Any:
    first, last = _ends(run, order, of)
    out = of.xp.zeros_like(order, dtype=bool)
    for lo, hi in sees:
        out = out | ((order >= 0) & ((lo > hi) | (lo < first) | (hi > last)))
    return out


def _there(slot: Any, media: Any, xp: Any) -> Any:
    """Which places name a media token that the row has, if they name any."""
    if not media.shape[1]:  # a row with no room for any
        return xp.zeros_like(slot, dtype=bool)
    return xp.take_along_axis(media, xp.clip(slot, 0, media.shape[1] - 1), axis=1) & (slot < media.shape[1])


def _mixable(batch: Batch, media: Any, xp: Any) -> Any:
    """Places whose token is mixed with none that the row does not have."""
    if batch.mix_slot is None:
        return xp.ones(batch.slot.shape, bool)
    others = batch.mix_slot.reshape(batch.slot.shape[0], -1)
    return (_there(others, media, xp) | (others < 0)).reshape(batch.mix_slot.shape).all(-1)


def _sounds(batch: Batch, sound: Any, of: type) -> Any:
    """Places of sound that the row has no frames for."""
    if batch.frames is None:
        return sound
    return sound & ((batch.slot < 0) | (batch.slot >= batch.frame_order.shape[1]))
