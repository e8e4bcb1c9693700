"""Attention by intervals: a query sees exactly the keys with lo <= order <= hi.

    key order   0 1 2 3 4 5 6 7 -1        two packed documents (0-3, 4-7) and an empty slot
    query 0     x                         lo 0 hi 0
    query 1     x x                       lo 0 hi 1
    query 4             x                 lo 4 hi 4
    query 6             x x x             lo 4 hi 6
    query -                               lo 0 hi -1: sees nothing, gives zeros

A label of -1 is never seen, because lo >= 0 wherever lo <= hi. Mask memory is O(L): no [L, S] array exists, forwards or
backwards, and tiles of scores that no interval reaches are not computed. The kernel is that of the platform a program
is compiled for (nn.kernels; `nn.kernels.backend.use` chooses another). On a mesh every device works on its own rows,
heads and queries. Where rows are split along their length, short ones' keys and values are gathered for the moment of
use, and long ones' go round the devices (nn.ring); else there is no communication.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from mmjax.core import meshes, sharding
from mmjax.core.errors import InputError
from mmjax.nn import ring
from mmjax.nn.kernels import backend, xla
from mmjax.nn.kernels.inputs import Inputs, Static
from mmjax.nn.ring import merge as merge  # part of what this file offers

Context = Literal["auto", "gather", "ring", "dealt"]
# "auto": keys and values go round where gathered they would take more bytes than this on a device. They are as many
# bytes on the way either way, and on a ring those of one part more. Gathered, a layer waits for all of them, once, and
# holds them, the backward pass with float32 cotangents as large again or twice; on a ring it computes meanwhile, in as
# many smaller steps as devices.
GATHERED = 2**27
FEW = 8  # queries of a row whose scores over a whole cache are computed at once
RESULTS = ("attention_out", "attention_lse")  # what jax.checkpoint_policies know attend's results by


@flax.struct.dataclass
class Bias:
    """A bias added to the scores, computed tile by tile, so that no [L, S] array exists (T5's, ALiBi, 2-D tables).

    function: (params, query, key) -> f32[B, heads, queries, keys], or 1 in the place of heads. Pure; it gets blocks of
      `query` and `key` (zeros past the end of a row), and of params the heads that its device has.
    params: arrays with a leading axis of H heads, which get gradients; or None. The function gets those of the heads
      that are computed together, a device's or fewer, and gives each head's bias from its own.
    query: arrays [B, L, ...] that the function reads for each query, its position say; no gradients.
    key: arrays [B, S, ...], for each key.
    """

    function: Callable = flax.struct.field(pytree_node=False)
    params: Any = None
    query: Any = None
    key: Any = None


@dataclass(frozen=True)
class Split:
    """The logical axes that dimensions are split along; None where they do not divide."""

    rows: str | None
    heads: str | None
    queries: str | None
    keys: str | None  # of keys and values; what is small, as their labels, is whole everywhere
    ring: tuple[str, ...] = ()  # the mesh axes along which keys and values go round; without any they are gathered
    dealt: bool = False  # rows are dealt for the ring already


def attend(
    q: Float[Array, "b l h e"],
    k: Float[Array, "b s k e"],
    v: Float[Array, "b s k ev"],
    order: Int[Array, "b s"],
    lo: Int[Array, "b l"],
    hi: Int[Array, "b l"],
    *,
    key_bias: Float[Array, "b s"] | None = None,
    bias: Bias | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "h"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "b l h ev"], Float[Array, "b l h"]]:
    """softmax(softcap(q kᵀ · scale) + bias + key_bias) v over the keys each query sees.

    Query head h reads key head h // (H / K) (grouped queries). Scores and sums are float32; products of bfloat16 inputs
    take bfloat16 and sum float32. Differentiable in q, k, v, key_bias, bias.params and sinks, through both results.

    Args:
      q: [B, L, H, E].
      k, v: [B, S, K, E] and [B, S, K, Ev]; K divides H.
      order: i32[B, S], the keys' labels, -1 in empty slots.
      lo, hi: i32[B, L], inclusive; lo > hi sees nothing.
      key_bias: [B, S], added to every score of a key (the log of how many tokens it stands for: Bolya et al. 2023,
        ToMe, section 3); -inf hides it.
      bias: a bias of query and key.
      softcap: scores become softcap · tanh(score / softcap) before biases (Gemma 2).
      sinks: [H], the score of one more key whose value is zero (gpt-oss).
      scale: 1 / sqrt(E) where left out.

    Returns:
      out [B, L, H, Ev] in v's dtype, and the log-sum-exp of the scores f32[B, L, H], the sink's included. A query that
      sees nothing gets zeros, -inf (or the sink's score) and no gradient.

    Raises:
      InputError: K does not divide H.
    """
    static, inputs, axes = _prepare(q, k, v, order, lo, hi, key_bias, bias, softcap, sinks, scale)
    out, lse = _attend(static, axes, inputs)
    return _heads_last(out, q.shape[2]), _heads_last(lse, q.shape[2])


def attend_cached(
    q: Float[Array, "b l h e"],
    k: Float[Array, "b k s e"],
    v: Float[Array, "b k s ev"],
    order: Int[Array, "b s"],
    lo: Int[Array, "b l"],
    hi: Int[Array, "b l"],
    *,
    bias: Bias | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Float[Array, "b l h ev"]:
    """`attend` over a cache, whose keys and values lie heads first (nn.cache). For inference: no gradients.

    A few queries take all scores at once; many go through the kernel of the platform, block by block.

    Args:
      q: [B, L, H, E].
      k, v: [B, K, S, E] and [B, K, S, Ev]; K divides H.
      order, lo, hi, bias, softcap, scale: as of `attend`.
    """
    heads, few = q.shape[2], q.shape[1] <= FEW
    static, inputs, axes = _prepare(q, k, v, order, lo, hi, None, bias, softcap, None, scale, cached=True)
    run = functools.partial(xla.at_once if few else backend.forward, static)
    if few:
        axes = replace(axes, keys=None, ring=())
    out, _ = sharding.local(run, (inputs,), (_read(inputs, axes),), _results(axes))
    return _heads_last(out, heads)


def received(
    q: Float[Array, "b l h e"],
    k: Float[Array, "b s k e"],
    order: Int[Array, "b s"],
    lo: Int[Array, "b l"],
    hi: Int[Array, "b l"],
    lse: Float[Array, "b l h"],
    weight: Float[Array, "b l"],
    *,
    key_bias: Float[Array, "b s"] | None = None,
    bias: Bias | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Float[Array, "b s h"]:
    """How much attention every key got: the sum over queries of weight · softmax, f32[B, S, H].

    What pruning scores are made of (FastV: the last token's attention; SparseVLM: that of chosen text tokens), without
    a dense matrix. No gradients: it ranks tokens.

    Args:
      q, k, order, lo, hi, key_bias, bias, softcap, scale: as given to `attend`.
      lse: what `attend` returned for them.
      weight: [B, L], how much each query counts, 0 for those that do not.
    """
    # The values are not looked at: keys stand in for their shape.
    static, inputs, axes = _prepare(q, k, k, order, lo, hi, key_bias, bias, softcap, None, scale)
    kv = inputs.k.shape[1]
    lse = lse.reshape(*lse.shape[:2], kv, -1).transpose(0, 2, 3, 1)
    # Queries together: what a key receives is a sum over them.
    axes = replace(axes, queries=None, keys=None)
    mass = sharding.local(
        functools.partial(xla.received, static),
        jax.lax.stop_gradient((inputs, lse, weight.astype(jnp.float32))),
        (_axes(inputs, axes), (axes.rows, axes.heads, None, None), (axes.rows, None)),
        (axes.rows, axes.heads, None, None),
    )
    return _heads_last(mass, q.shape[2])


_context: contextvars.ContextVar[Context] = contextvars.ContextVar("mmjax_attention_context", default="auto")


@contextlib.contextmanager
def context(how: str) -> Iterator[None]:
    """Traces what is inside with keys and values of split rows gathered ("gather") or passed on ("ring").

    "auto" is the default: by how many bytes they are, see GATHERED. "dealt" is a ring of rows that ring.deal has dealt.

    Read while tracing: a compiled function keeps its own. Where queries or keys are not split along their row, keys are
    gathered whatever is said here.
    """
    if how not in get_args(Context):
        raise InputError(f"Attention knows no context {how!r}; choose one of {', '.join(get_args(Context))}.")
    token = _context.set(how)
    try:
        yield
    finally:
        _context.reset(token)


def _prepare(
    q, k, v, order, lo, hi, key_bias, bias, softcap, sinks, scale, cached: bool = False
) -> tuple[Static, Inputs, Split]:
    """Heads first, and how everything is split. `cached`: the heads of keys and values are first already."""
    b, length, heads, size = q.shape
    if not cached:
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    kv, keys = k.shape[1:3]
    if heads % kv:
        raise InputError(f"{heads} query heads cannot share {kv} key heads evenly; the second must divide the first.")
    split = meshes.parts("heads")
    if kv % split and heads % split == 0:
        # Each device needs whole key heads of its own: repeat them as often as that takes.
        times = split // math.gcd(kv, split)
        if heads // kv % times == 0:
            # Whole before, and so are their cotangents: jax 0.7 cannot name a sharding over half an axis.
            k, v = (sharding.constrain(x, ("batch", "heads", "length", None)) for x in (k, v))
            k, v = jnp.repeat(k, times, axis=1), jnp.repeat(v, times, axis=1)
            kv *= times
    axes = Split(*meshes.fitting(("batch", "heads", "length"), (b, kv, length)), *meshes.fitting(("length",), (keys,)))
    if goes_round(b, length, keys, kv, (size + v.shape[3]) * k.dtype.itemsize):
        over = meshes.mesh_axes((axes.rows, axes.heads, axes.keys))[2]
        axes = replace(axes, ring=over, dealt=_context.get() == "dealt")
    static = Static(size**-0.5 if scale is None else float(scale), softcap, None if bias is None else bias.function)
    q = q.reshape(b, length, kv, heads // kv, size).transpose(0, 2, 3, 1, 4)
    sinks = None if sinks is None else sinks.reshape(kv, heads // kv)
    of_bias = (None, None, None) if bias is None else (bias.params, bias.query, bias.key)
    inputs = Inputs(q, k, v, order, lo, hi, key_bias, sinks, *of_bias)
    # Out here, where it has a gradient: cotangents must lie as the inputs do.
    return static, jax.tree.map(sharding.constrain, inputs, _axes(inputs, axes)), axes


def goes_round(rows: int, length: int, keys: int, heads: int, size: int) -> bool:
    """Whether keys and values go round: rows of so many queries and keys, `size` bytes of a key head and its values."""
    (by_row, by_head, split), held = meshes.fitting(("batch", "heads", "length"), (rows, heads, length)), size
    for axis, count in ((by_row, rows), (by_head, heads)):
        held *= count // (meshes.parts(axis) if axis else 1)
    if split is None or keys % meshes.parts("length"):
        return False
    how = _context.get()
    return how in ("ring", "dealt") or (how == "auto" and held * keys > GATHERED)


def _axes(x: Inputs, axes: Split) -> Inputs:
    """The logical axes of every input."""

    def first(*names: str | None) -> Callable:
        return lambda a: names + (None,) * (a.ndim - len(names))

    by_row, by_query, by_head = first(axes.rows), first(axes.rows, axes.queries), first(axes.heads)
    heads_first = (axes.rows, axes.heads)
    return Inputs(
        q=(*heads_first, None, axes.queries, None),
        k=(*heads_first, axes.keys, None),
        v=(*heads_first, axes.keys, None),
        order=(axes.rows, None),
        lo=(axes.rows, axes.queries),
        hi=(axes.rows, axes.queries),
        key_bias=jax.tree.map(by_row, x.key_bias),
        sinks=jax.tree.map(by_head, x.sinks),
        bias_params=jax.tree.map(by_head, x.bias_params),
        bias_query=jax.tree.map(by_query, x.bias_query),
        bias_key=jax.tree.map(by_row, x.bias_key),
    )


def _heads_last(x: jax.Array, heads: int) -> jax.Array:
    """[B, K, G, L, ...] -> [B, L, H, ...]."""
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(*x.shape[:2], heads, *x.shape[4:])


def _results(axes: Split) -> tuple[tuple, tuple]:
    """The logical axes of out and log-sum-exp, heads first."""
    return (axes.rows, axes.heads, None, axes.queries, None), (axes.rows, axes.heads, None, axes.queries)


def _read(x: Inputs, axes: Split) -> Inputs:
    """How a device reads the inputs: keys come split and are gathered in there, or go round.

    So the backward pass keeps a device's own alone.
    """
    return _axes(x, axes if axes.ring else replace(axes, keys=None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(static: Static, axes: Split, x: Inputs) -> tuple[jax.Array, jax.Array]:
    run = functools.partial(ring.forward, over=axes.ring, dealt=axes.dealt) if axes.ring else backend.forward
    return sharding.local(functools.partial(run, static), (x,), (_read(x, axes),), _results(axes))


def _forward(static: Static, axes: Split, x: Inputs) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    # Named here, where they are also what the backward pass needs, so that a remat policy can keep them.
    out, lse = (checkpoint_name(y, name) for y, name in zip(_attend(static, axes, x), RESULTS, strict=True))
    return (out, lse), (x, out, lse)


def _backward(static: Static, axes: Split, saved: tuple, cotangents: tuple) -> tuple[Inputs]:
    no_gradient = {"order": None, "lo": None, "hi": None, "bias_query": None, "bias_key": None}
    lies, reads = _axes(saved[0], axes), _read(saved[0], axes)
    run = functools.partial(ring.backward, over=axes.ring, dealt=axes.dealt) if axes.ring else backend.backward
    # Cotangents of what several devices read are added up in float32.
    wide = replace(static, wide=static.wide or (axes.keys is not None and not axes.ring))
    found = sharding.local(
        functools.partial(run, wide),
        (*saved, *cotangents),
        (reads, *_results(axes), *_results(axes)),
        reads.replace(**no_gradient),
    )
    found = jax.tree.map(lambda d, a: None if d is None else d.astype(a.dtype), found, saved[0], is_leaf=_is_none)
    return (jax.tree.map(sharding.constrain, found, lies.replace(**no_gradient)),)


def _is_none(x: Any) -> bool:
    return x is None


_attend.defvjp(_forward, _backward)
