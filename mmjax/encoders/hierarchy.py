"""What hierarchical encoders share: whole pictures in, maps of several scales out."""

from typing import Any, Literal

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from mmjax.core import sharding
from mmjax.core.spec import ParamSpec, Spec, fan_in
from mmjax.nn import linear, patch_embed, position_embed

Grid = tuple[int, int]  # rows and columns of a map


@flax.struct.dataclass
class Features:
    """What a hierarchical encoder sees in pictures of one size."""

    maps: tuple  # [B, rows, columns, D] of each stage: the first is the largest
    tokens: Any  # [B, L, D], the last stage's, after the final norm; a class token comes first
    pooled: Any  # [B, D], one vector per picture
    logits: Any  # [B, classes], where there is a classifier; else None
    stem: Any = None  # [B, rows, columns, D], the embedded patches before the first stage (Swin)


def floats(images: Num[Array, "b h w c"], cfg: patch_embed.Config) -> Float[Array, "b h w c"]:
    """Bytes 0…255 as normalised floats; floats are left as they are."""
    flat = images.reshape(*images.shape[:2], -1)
    return patch_embed.normalise(flat, cfg).reshape(images.shape)


def as_map(x: Float[Array, "b l d"], grid: Grid) -> Float[Array, "b rows columns d"]:
    return x.reshape(x.shape[0], *grid, x.shape[-1])


def squares(x: Float[Array, "b h w d"], side: int) -> Float[Array, "b rows columns side side d"]:
    """A map cut into squares, row by row; its sides must be multiples."""
    b, height, width, d = x.shape
    # One axis after the other: arrays whose sharding is part of their type cannot be split along two at once.
    x = x.reshape(b, height // side, side, width, d).reshape(b, height // side, side, width // side, side, d)
    return x.transpose(0, 1, 3, 2, 4, 5)


def unsquares(x: Float[Array, "b rows columns side side d"]) -> Float[Array, "b h w d"]:
    """The inverse of `squares`."""
    b, rows, columns, side, _, d = x.shape
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows * side, columns, side, d)
    return x.reshape(b, rows * side, columns * side, d)


def flat_squares(x: Float[Array, "b h w d"], side: int) -> Float[Array, "b l values"]:
    """The same as vectors of (row, column, channel): patches of a picture, or of a map."""
    x = squares(x, side)
    b, rows, columns, *inner = x.shape
    return x.reshape(b, rows * columns, *inner).reshape(b, rows * columns, -1)


def resized(
    table: Float[Array, "r c d"], grid: Grid, method: Literal["bilinear", "bicubic"]
) -> Float[Array, "rows columns d"]:
    """A table of learned positions for another grid, one axis after the other, as torch's `interpolate` does it."""
    table = sharding.constrain(table, (None, None, None))
    if table.shape[:2] == grid:
        return table
    for size in grid:
        places = jnp.stack([jnp.arange(size, dtype=jnp.int32), jnp.zeros(size, jnp.int32)], axis=-1)[None]
        sizes = jnp.broadcast_to(jnp.array([size, 1], jnp.int32), places.shape)
        lines = table.reshape(table.shape[0], 1, -1)
        out = position_embed.interpolate(lines, places, sizes, method=method)[0]
        table = out.reshape(size, *table.shape[1:]).swapaxes(0, 1)
    return table


def attention_spec(width: int, heads: int, bias: bool) -> Spec:
    """Queries, keys and values of each head with biases if wanted, and the projection back, which always has one."""
    head = width // heads

    def project() -> Spec:
        out = {"kernel": ParamSpec((width, heads, head), ("embed", "heads", None), fan_in(width))}
        return out | ({"bias": ParamSpec((heads, head), ("heads", None))} if bias else {})

    back = ParamSpec((heads, head, width), ("heads", None, "embed"), fan_in(width))
    out = {"kernel": back, "bias": ParamSpec((width,), (None,))}
    return {"q": project(), "k": project(), "v": project(), "out": out}


def heads(params: dict, x: Float[Array, "b l d"]) -> Float[Array, "b l h e"]:
    """One of q, k, v."""
    y = sharding.dense(x, params["kernel"], ("batch", None, "heads", None))
    return linear.plus(y, params["bias"]) if "bias" in params else y


def back(params: dict, x: Float[Array, "b l h e"]) -> Float[Array, "b l d"]:
    """The projection `out`."""
    return linear.plus(sharding.dense(x, params["kernel"], ("batch", None, None)), params["bias"])


def classifier(width: int, classes: int | None) -> linear.Config:
    return linear.Config(width, classes or 0, True, ("embed", None))


def classify(params: dict, pooled: Float[Array, "b d"], classes: int | None) -> Float[Array, "b classes"] | None:
    """Logits of a classifier, where there is one."""
    if not classes:
        return None
    return linear.apply(params["classifier"], pooled[:, None], classifier(pooled.shape[-1], classes))[:, 0]
