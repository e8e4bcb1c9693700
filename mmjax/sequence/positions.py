"""Rotary positions (time, height, width) of every token: M-RoPE (Wang et al. 2024, Qwen2-VL, section 2.1, figure 3).

Twice the same numbers: `mrope` on the host, from a document's pieces, for the loader; `mrope_ids` on the device, from
the descriptors of packed rows, in fixed shapes, for those who have a row and no loader.
"""

import itertools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mmjax.core.errors import InputError
from mmjax.sequence.layout import AUDIO, TEXT, VIDEO, Grid, Piece


@dataclass(frozen=True)
class MRope:
    """How a family counts.

    merge: rows and columns of patches that one media token stands for (Qwen merges 2 × 2).
    advance: where text goes on after a medium that starts at s:
      "sides": s + its longer side in tokens, however many frames it has. What transformers 5 does for every Qwen.
      "all": one past its largest number, time included. What the paper says, and Qwen's own first code does; only
        videos with more time steps than rows and columns differ.
    """

    merge: int = 1
    advance: Literal["sides", "all"] = "sides"


ONE = MRope()  # a media token for each patch
# Qwen3-VL sets a time stamp before every frame of a video: there a video is so many media of one frame (see `frames`).
QWEN_VL = MRope(merge=2)


def frames(grid: Grid) -> list[Grid]:
    """A video as one medium per frame (Qwen3-VL)."""
    return [(1, *grid[1:])] * grid[0]


def grid_positions(grid: Grid) -> Int[np.ndarray, "n 3"]:
    """(frame, row, column) of every patch of a grid, in raster order."""
    return np.indices(grid, dtype=np.int32).reshape(3, -1).T


def mrope(pieces: tuple[Piece, ...], cfg: MRope = ONE) -> Int[np.ndarray, "n 3"]:
    """Positions of a document's tokens.

    Text counts on, the same number three times, and so does sound. A medium of f × r × c tokens that starts at s has
    (s + time, s + row, s + column), where time is the frame's number times the piece's `interval`, rounded down. Then
    text goes on where cfg.advance says: for a picture after as many numbers as its longer side has, not its area.
    A video whose frames have text between them is so many media of one frame (Qwen3-VL).

    Raises:
      InputError: a piece whose length is not what its grid gives.
    """
    out, at = [], 0
    for piece in (part for whole in pieces for part in _runs(whole, cfg.merge)):
        if piece.modality in (TEXT, AUDIO):
            out.append(np.repeat(np.arange(at, at + piece.length, dtype=np.int32)[:, None], 3, axis=1))
            at += piece.length
            continue
        if piece.tiles:
            raise InputError(
                f"A picture in {1 + len(piece.tiles)} views has no rows and columns to count by M-RoPE; use sequential "
                f"positions."
            )
        time, rows, columns = piece.grid[0], piece.grid[1] // cfg.merge, piece.grid[2] // cfg.merge
        if time * rows * columns != piece.length:
            raise InputError(
                f"A medium of {piece.grid} patches has {piece.length} tokens, but M-RoPE that merges {cfg.merge} × "
                f"{cfg.merge} patches counts {time * rows * columns}; use the connector's own `merge`."
            )
        place = grid_positions((time, rows, columns))
        place[:, 0] = place[:, 0].astype(np.float32) * np.float32(piece.interval)
        out.append(place + np.int32(at))
        last = int(place[-1, 0]) + 1 if cfg.advance == "all" else 0
        at += max(rows, columns, last)
    return np.concatenate(out)


def _runs(piece: Piece, merge: int) -> list[Piece]:
    """A video that is written frame by frame as the media and the text that it is; everything else as it is."""
    if piece.modality != VIDEO or not piece.ids:
        return [piece]
    _, rows, columns = piece.grid
    frame = (rows // merge) * (columns // merge)
    out = []
    for written, run in itertools.groupby(piece.slots, lambda slot: slot < 0):
        n = len(list(run))
        out.append(Piece(TEXT, n) if written else Piece(VIDEO, n, (), (n // frame, rows, columns)))
    return out


def mrope_ids(
    document: Int[Array, "b l"],
    slot: Int[Array, "b l"],
    grid: Int[Array, "b n 3"],
    cfg: MRope = ONE,
    *,
    interval: Float[Array, "b n"] | None = None,
) -> Int[Array, "b l 3"]:
    """The same positions under jit, for packed rows: every document starts at 0, whatever lies before it.

    Args:
      document: i32[B, L], which document a token belongs to, equal along a run; -1 in empty places (position 0).
      slot: i32[B, L], which of the row's media tokens stands here, counted through all media of the row; -1 for text
        (and sound, which counts as text does).
      grid: i32[B, N, 3], (frames, rows, columns) of patches of each of the row's media, zeros where there is none.
      cfg: the family.
      interval: f32[B, N], numbers per frame: seconds between frames × tokens per second (Qwen2.5-VL); 1 if left out.
    """
    time, rows, columns = grid[..., 0], grid[..., 1] // cfg.merge, grid[..., 2] // cfg.merge
    interval = jnp.ones(grid.shape[:2], jnp.float32) if interval is None else interval.astype(jnp.float32)
    longest = jnp.maximum(rows, columns)
    if cfg.advance == "all":
        last = ((time - 1).astype(jnp.float32) * interval).astype(jnp.int32) + 1
        longest = jnp.maximum(longest, last)
    count = time * rows * columns
    stop = jnp.cumsum(count, axis=1)

    def row(document, slot, rows, columns, interval, longest, stop):
        media = slot >= 0
        which = jnp.clip(jnp.searchsorted(stop, slot, side="right"), 0, stop.shape[0] - 1).astype(jnp.int32)
        rows, columns, longest = (jnp.maximum(x[which], 1) for x in (rows, columns, longest))
        # By its place in the sequence, not by its slot: media tokens may lie in another order (windows).
        index = jnp.arange(slot.shape[0], dtype=jnp.int32)
        other = jnp.concatenate([jnp.ones(1, bool), (which[1:] != which[:-1]) | ~media[:-1]])
        within = index - jax.lax.cummax(jnp.where(other, index, 0))
        frame = within // (rows * columns)
        place = jnp.stack(
            [
                (frame.astype(jnp.float32) * interval[which]).astype(jnp.int32),
                within // columns % rows,
                within % columns,
            ],
            axis=-1,
        )
        # What every token moves the count on by: a medium does it at once, with its first token.
        step = jnp.where(media, jnp.where(within == 0, longest, 0), (document >= 0).astype(jnp.int32))
        total = jnp.cumsum(step)
        before = total - step
        first = jnp.concatenate([jnp.ones(1, bool), document[1:] != document[:-1]])
        origin = jax.lax.cummax(jnp.where(first, before, 0))
        base = total - origin - jnp.where(media, longest, 1)
        out = base[:, None] + jnp.where(media[:, None], place, 0)
        return jnp.where(document[:, None] >= 0, out, 0)

    return jax.vmap(row)(document, slot, rows, columns, interval, longest, stop)


def lengths(document: Int[Array, "b l"], position: Int[Array, "b l axes"]) -> Int[Array, "b l"]:
    """How long each token's document is, as length-dependent rotary scalings count: its largest position plus one.

    Args:
      document: i32[B, L], -1 in empty places (length 0).
      position: i32[B, L, axes].
    """

    def row(document: jax.Array, position: jax.Array) -> jax.Array:
        segment = jnp.where(document < 0, document.shape[0], document)
        longest = jax.ops.segment_max(position.max(-1), segment, num_segments=document.shape[0] + 1)
        return jnp.where(document < 0, 0, longest[segment] + 1)

    return jax.vmap(row)(document, position)
