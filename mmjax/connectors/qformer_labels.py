"""Who sees whom in a Q-Former whose rows are packed: queries, texts and pictures of any number and length.

Labels alternate, queries of picture 0, its text, queries of picture 1, its text …, so that all that a token sees is one
interval (`intervals.qformer_contrastive`, `_generation` and `_matching`, picture by picture).

    labels         q q t t  q q t      picture 0 has two queries and two tokens of text, picture 1 two and one
                   0 1 2 3  4 5 6
    contrastive    q 0–1, t 2–3        queries and text apart (Li et al. 2023, BLIP-2, figure 2)
    generation     q 0–1, t 0–itself   text sees the queries and what it said so far
    matching       0–3                 everything sees everything; InstructBLIP's too (Dai et al. 2023, section 2.3)
"""

from typing import Any, Literal

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Int

from mmjax.core import sharding
from mmjax.sequence.behind import ends as ends

Pattern = Literal["contrastive", "generation", "matching"]


@flax.struct.dataclass
class Text:
    """The texts of a row's pictures, packed as the pictures are: picture 0's, then picture 1's, …

    A text may stand where there is no picture: it has nothing but itself to look at.

    tokens: i32[B, T], ids in range; or [B, T, width], embeddings before their norm, where the config has no words.
    image: i32[B, T], whose text it is. order: i32[B, T], labels counted through the row, -1 in empty places.
    """

    tokens: Any
    image: Any
    order: Any


def labels(
    grid: Int[Array, "b n 3"], queries: int, text: Text | None = None, pattern: Pattern = "matching"
) -> tuple[Int[Array, "b s"], Int[Array, "b s"], Int[Array, "b s"]]:
    """Who sees whom among [queries; text] of packed pictures, all queries first.

    Args:
      grid: i32[B, N, 3]; a picture of zeros has no queries.
      queries: of each picture.
      text: the pictures' texts, if any.
      pattern: see above.

    Returns:
      order, lo and hi [B, S = N × queries + T].
    """
    b, n, _ = grid.shape
    some = grid.prod(-1) > 0
    if text is None:
        start = stop = jnp.zeros_like(grid[..., 0])
    else:
        start, stop = ends(text.image, text.order, n)
    number = jnp.arange(n, dtype=jnp.int32)[None]
    first, last = start + number * queries, stop + (number + 1) * queries - 1

    parts = []
    if queries:
        own = first[:, :, None] + jnp.arange(queries, dtype=jnp.int32)[None, None]
        hi = last if pattern == "matching" else first + queries - 1
        bounds = (jnp.repeat(jnp.where(some, x, e), queries, axis=1) for x, e in ((first, 0), (hi, -1)))
        parts.append((jnp.where(some[:, :, None], own, -1).reshape(b, n * queries), *bounds))
    if text is not None:
        valid = text.order >= 0
        label = jnp.where(valid, text.order + (text.image + 1) * queries, -1)
        bounds = sharding.take_rows(jnp.stack([first, last], axis=-1), text.image)
        lo = bounds[:, :, 0] + (queries if pattern == "contrastive" else 0)
        hi = label if pattern == "generation" else bounds[:, :, 1]
        parts.append((label, jnp.where(valid, lo, 0), jnp.where(valid, hi, -1)))
    return tuple(jnp.concatenate(part, axis=1) for part in zip(*parts, strict=True))


def looks(
    image: Int[Array, "b p"], order: Int[Array, "b p"], pictures: int, queries: int
) -> tuple[Int[Array, "b m"], Int[Array, "b m"]]:
    """lo and hi of the queries' look at the features, whose labels are `order`: each sees its own picture's."""
    start, stop = ends(image, order, pictures)
    return jnp.repeat(start, queries, axis=1), jnp.repeat(stop - 1, queries, axis=1)
