"""Pictures in rows: grids, patches, labels and places for the comparisons."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from mmjax.nn import patch_embed
from mmjax.sequence import intervals, windows
from mmjax.sequence.positions import grid_positions

GRIDS = [(1, 7, 5), (1, 3, 4), (1, 4, 4), (1, 2, 9)]  # frames, rows, columns of patches


@dataclass(frozen=True)
class Row:
    """Pictures packed into one row (batch 1), with two empty places and one empty picture at the end."""

    see: dict  # order, lo, hi, position, image, grid; window intervals where asked for
    slices: list[slice]  # where each picture's patches lie
    orders: list[np.ndarray]  # which of the picture's patches (row by row) lies at each place

    def patches(self, pictures: list[np.ndarray]) -> jnp.ndarray:
        """The patches of pictures given as patches in raster order [P, C], as the row has them."""
        cut = [p[o] for p, o in zip(pictures, self.orders, strict=True)]
        return jnp.asarray(np.concatenate([*cut, np.zeros((2, cut[0].shape[1]), np.float32)])[None], jnp.float32)

    def raster(self, features, n: int) -> np.ndarray:
        """Features of picture n [P, D], row by row again."""
        out = np.empty_like(np.asarray(features[0, self.slices[n]]))
        out[self.orders[n]] = features[0, self.slices[n]]
        return out


def row(grids: list[tuple[int, int, int]], *, merge: int = 1, window: int = 0, frames: bool = False) -> Row:
    """Pictures of these grids in one row.

    Args:
      grids: (frames, rows, columns) of each.
      merge, window: order of the patches (see sequence.windows); with a window, `see` has `window` intervals too.
      frames: every frame sees itself alone (Qwen-VL), not the whole video.
    """
    orders, cuts = [], []
    for grid in grids:
        order, _, sizes = windows.order(grid, merge, window)
        orders.append(order)
        cuts += sizes
    counts = [len(o) for o in orders]
    seen = [c for g, c in zip(grids, counts, strict=True) for c in ([c // g[0]] * g[0] if frames else [c])]
    stops = np.cumsum(counts)
    total, empty = int(stops[-1]), 2
    lo, hi = intervals.blocks(seen)
    of = np.repeat(np.arange(len(grids)), counts)
    place = np.concatenate([grid_positions(g)[:, 1:][o] for g, o in zip(grids, orders, strict=True)])

    def padded(x: np.ndarray, fill: int) -> jnp.ndarray:
        more = np.full((empty, *x.shape[1:]), fill)
        return jnp.asarray(np.concatenate([x, more])[None], jnp.int32)

    see = {
        "order": padded(np.arange(total), -1),
        "lo": padded(lo, 0),
        "hi": padded(hi, -1),
        "position": padded(place, 0),
        "image": padded(of, -1),
        "grid": jnp.asarray([[*grids, (0, 0, 0)]], jnp.int32),
    }
    if window:
        see["window"] = tuple(padded(x, fill) for x, fill in zip(intervals.blocks(cuts), (0, -1), strict=True))
    return Row(see, [slice(s - c, s) for s, c in zip(stops, counts, strict=True)], orders)


def images(grids: list[tuple[int, int, int]], patch: int, seed: int = 3) -> list[np.ndarray]:
    """Random normalised pictures [frames, 3, height, width], float32."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(f, 3, r * patch, c * patch)).astype(np.float32) for f, r, c in grids]


def cut(picture: np.ndarray, patch: int) -> np.ndarray:
    """Its patches in raster order, [frames × rows × columns, patch² × 3]."""
    whole = patch_embed.patchify(jnp.asarray(picture.transpose(0, 2, 3, 1)), patch)
    return np.asarray(whole).reshape(-1, whole.shape[-1])
