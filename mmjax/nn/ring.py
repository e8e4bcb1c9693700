"""Attention by intervals with queries and keys split along their row: keys and values go round a ring of devices.

    4 devices      chunks of the row        keys at hand, step by step
    device 0       0 7                      0 7   3 4   2 5   1 6
    device 1       1 6                      1 6   0 7   3 4   2 5
    device 2       2 5                      2 5   1 6   0 7   3 4
    device 3       3 4                      3 4   2 5   1 6   0 7

Liu et al. 2023 (Ring Attention). A device never holds more than its own keys and values and the next ones, which travel
while it computes. What it found in every step is merged by the log-sum-exp, in float32; the backward pass sends keys
and values round again together with the sums of their cotangents, which end where they belong.

With rows cut straight, the last device of a causal row would compute all the way round and the first one once. So rows
are dealt: every device exchanges half its part and has one chunk from the front of the row and its mirror image from
the back (Dubey et al. 2024, Llama 3, section 3.3.2). Then, of a causal row, all compute the same in every step. Labels
travel with their tokens, so a dealt row is a row like any other: nn.transformer deals it once for all its blocks, and
else it is dealt here, on the way in, and results go back to where their queries are. Keys that no query of a device
reaches are passed on and not computed.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmjax.core import meshes, sharding
from mmjax.nn.kernels import backend, cotangents
from mmjax.nn.kernels.inputs import Inputs, Static


@dataclass(frozen=True)
class Ring:
    """`size` devices along the manual mesh axes `over`; every one has a part of the row, as long as any other's.

    A part is two chunks of the row, 2 size in all: 2 i and 2 i + 1 as rows are cut, i and 2 size - 1 - i once dealt.
    """

    over: tuple[str, ...]
    size: int

    def here(self) -> jax.Array:
        return jax.lax.axis_index(self.over)

    def passed_on(self, tree: Any) -> Any:
        """What the device before has."""
        ways = [(i, (i + 1) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda a: jax.lax.ppermute(a, self.over, ways), tree)

    def _home(self, chunk: int) -> int:
        return min(chunk, 2 * self.size - 1 - chunk)

    def _ways(self, odd: int) -> list[tuple[int, int]]:
        """Where every device sends its even or odd chunk: each device gets one of either."""
        return [(i, self._home(2 * i + odd)) for i in range(self.size)]

    def deal(self, x: jax.Array, axis: int) -> jax.Array:
        """A device's part as rows are cut → its chunks i and 2 size - 1 - i, in this order."""
        half = (x.shape[axis] + 1) // 2
        if x.shape[axis] < 2:
            return x
        even, odd = (
            jax.lax.ppermute(piece, self.over, self._ways(i)) for i, piece in enumerate(jnp.split(x, [half], axis))
        )
        straight, turned = jnp.concatenate([even, odd], axis), jnp.concatenate([odd, even], axis)
        return jnp.where(self.here() % 2 == 0, straight, turned)

    def undeal(self, x: jax.Array, axis: int) -> jax.Array:
        """The way back."""
        length = x.shape[axis]
        half = (length + 1) // 2
        if length < 2:
            return x
        straight, turned = jnp.split(x, [half], axis), jnp.split(x, [length - half], axis)
        pieces = (jnp.where(self.here() % 2 == 0, a, b) for a, b in zip(straight, turned[::-1], strict=True))
        back = ([(b, a) for a, b in self._ways(odd)] for odd in (0, 1))
        return jnp.concatenate(
            [jax.lax.ppermute(p, self.over, ways) for p, ways in zip(pieces, back, strict=True)], axis
        )

    def _order(self, length: int) -> tuple[list[int], list[int]]:
        """The sizes of the chunks of a whole row, and which they are from place to place once dealt."""
        part = length // self.size
        which = itertools.chain.from_iterable((i, 2 * self.size - 1 - i) for i in range(self.size))
        return [(part + 1) // 2, part // 2] * self.size, list(range(2 * self.size)) if part < 2 else list(which)

    def deal_whole(self, x: jax.Array) -> jax.Array:
        """The same of what every device has of the whole row, [B, S, …]: all devices' parts, one after the other."""
        sizes, which = self._order(x.shape[1])
        chunks = jnp.split(x, list(itertools.accumulate(sizes))[:-1], 1)
        return jnp.concatenate([chunks[i] for i in which], 1)

    def undeal_whole(self, x: jax.Array) -> jax.Array:
        """The way back."""
        sizes, which = self._order(x.shape[1])
        chunks = jnp.split(x, list(itertools.accumulate(sizes[i] for i in which))[:-1], 1)
        return jnp.concatenate([chunks[which.index(i)] for i in range(len(which))], 1)


def deal(tree: Any, axis: int = 1) -> Any:
    """Arrays […, B, L, …] whose rows are split along their length (`axis`), dealt; others stay as they are."""
    return jax.tree.map(lambda x: _exchanged(Ring.deal, x, axis), tree)


def undeal(tree: Any, axis: int = 1) -> Any:
    """The way back."""
    return jax.tree.map(lambda x: _exchanged(Ring.undeal, x, axis), tree)


def _exchanged(how: Callable, x: jax.Array, axis: int) -> jax.Array:
    axes = (None,) * (axis - 1) + ("batch", "length") + (None,) * (x.ndim - axis - 1)
    axes = meshes.fitting(axes, x.shape)
    if axes[axis] is None:
        return x
    over = meshes.mesh_axes(axes)[axis]
    return sharding.local(
        lambda part: how(Ring(over, x.shape[axis] // part.shape[axis]), part, axis), (x,), (axes,), axes
    )


def merge(
    out: Float[Array, "*rows e"],
    lse: Float[Array, "*rows"],
    other_out: Float[Array, "*rows e"],
    other_lse: Float[Array, "*rows"],
) -> tuple[Float[Array, "*rows e"], Float[Array, "*rows"]]:
    """Attention over the union of two disjoint sets of keys, from the results over each.

    The weights of both are exp(lse), so the union's softmax is their average by that (Dao et al. 2022, section 3.1).
    """
    some, more = jnp.isfinite(lse), jnp.isfinite(other_lse)
    a, b = jnp.where(some, lse, -1e30), jnp.where(more, other_lse, -1e30)
    top = jax.lax.stop_gradient(jnp.maximum(a, b))
    a, b = jnp.where(some, jnp.exp(a - top), 0.0), jnp.where(more, jnp.exp(b - top), 0.0)
    total = a + b
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    mixed = (a / safe)[..., None] * out.astype(jnp.float32) + (b / safe)[..., None] * other_out.astype(jnp.float32)
    return mixed.astype(out.dtype), jnp.where(seen, top + jnp.log(safe), -jnp.inf)


def _dealt(ring: Ring, x: Inputs) -> Inputs:
    by_query, whole = functools.partial(ring.deal, axis=1), ring.deal_whole
    return x.replace(
        q=ring.deal(x.q, 3),
        k=ring.deal(x.k, 2),
        v=ring.deal(x.v, 2),
        order=whole(x.order),
        lo=by_query(x.lo),
        hi=by_query(x.hi),
        key_bias=jax.tree.map(whole, x.key_bias),
        bias_query=jax.tree.map(by_query, x.bias_query),
        bias_key=jax.tree.map(whole, x.bias_key),
    )


def _reached(ring: Ring, x: Inputs) -> jax.Array:
    """bool[size]: whose keys the intervals of this device's queries can reach, by the labels of half parts."""
    big = jnp.iinfo(jnp.int32).max
    some = x.lo <= x.hi
    order = x.order.reshape(x.order.shape[0], ring.size, -1)

    def halves(a: jax.Array, find: Callable, none: int) -> jax.Array:
        return jnp.stack([find(h, axis=-1, initial=none) for h in jnp.split(a, [a.shape[-1] // 2], -1)], -1)

    first = halves(jnp.where(some, x.lo, big), jnp.min, big)[:, None, :, None]
    last = halves(jnp.where(some, x.hi, -1), jnp.max, -1)[:, None, :, None]
    low = halves(jnp.where(order >= 0, order, big), jnp.min, big)[:, :, None]
    high = halves(order, jnp.max, -1)[:, :, None]
    return ((first <= high) & (low <= last)).any((0, 2, 3))


def _with_keys(ring: Ring, x: Inputs, keys: tuple[jax.Array, jax.Array], whose: jax.Array) -> Inputs:
    """One step's inputs: all queries of this device, and the keys and values of one."""
    size = keys[0].shape[2]

    def part(a: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(a, whose * size, size, axis=1)

    # A sink counts once, not in every step.
    return x.replace(
        k=keys[0],
        v=keys[1],
        order=part(x.order),
        key_bias=jax.tree.map(part, x.key_bias),
        sinks=None,
        bias_key=jax.tree.map(part, x.bias_key),
    )


def forward(
    static: Static, x: Inputs, *, over: tuple[str, ...], dealt: bool = False, step: Callable = backend.forward
) -> tuple[jax.Array, jax.Array]:
    """(out [B, K, G, l, Ev] in v's dtype, log-sum-exp f32[B, K, G, l]) of a device's queries over the whole row's keys.

    Only where all of `over` are manual axes (sharding.local).

    Args:
      static: as any kernel's.
      x: the device's part of q, k, v, lo, hi and bias_query, l and s places of them; the whole of order, key_bias and
        bias_key (S places).
      over: the mesh axes that rows are split over, S / s devices in all.
      dealt: rows are, already.
      step: the kernel, `forward(static, inputs)`, which puts out float32 where `static.wide`.
    """
    x = sharding.vary(x)
    kind, ring = x.v.dtype, Ring(over, x.order.shape[1] // x.k.shape[2])
    x = x if dealt else _dealt(ring, x)
    reached, here, wide = _reached(ring, x), ring.here(), replace(static, wide=True)

    def turn(t: jax.Array, carry: tuple) -> tuple:
        keys, *found = carry
        ahead = ring.passed_on(keys)  # before the step, which does not wait for it
        whose = (here - t) % ring.size

        def compute(found: list) -> list:
            return list(merge(*found, *step(wide, _with_keys(ring, x, keys, whose))))

        return ahead, *jax.lax.cond(reached[whose], compute, lambda found: found, found)

    shape = x.q.shape[:-1]
    lse = jnp.full(shape, -jnp.inf, jnp.float32)
    if x.sinks is not None:
        lse = jnp.broadcast_to(x.sinks.astype(jnp.float32)[None, :, :, None], shape)
    start = sharding.vary((jnp.zeros((*shape, x.v.shape[-1]), jnp.float32), lse), x)
    _, out, lse = jax.lax.fori_loop(0, ring.size, turn, ((x.k, x.v), *start))
    out = out.astype(kind)
    return (out, lse) if dealt else (ring.undeal(out, 3), ring.undeal(lse, 3))


def backward(
    static: Static,
    x: Inputs,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array,
    *,
    over: tuple[str, ...],
    dealt: bool = False,
    step: Callable = backend.backward,
) -> Inputs:
    """Cotangents of a device's part of the inputs (None for labels and what the bias reads).

    `step` is a kernel's `backward(static, inputs, out, lse, d_out, d_lse)`, which puts out float32 where `static.wide`.
    Given the results over all keys, the softmax of every step is the true one, and what the steps find adds up.
    """
    primal = x
    x, *results = sharding.vary((x, out, lse, d_out, d_lse))
    ring = Ring(over, x.order.shape[1] // x.k.shape[2])
    if not dealt:
        x, results = _dealt(ring, x), [ring.deal(a, 3) for a in results]
    (d_k, d_v), (d_q, d_params, d_key_bias) = _round(static, ring, x, results, step)
    d_sinks = None if x.sinks is None else cotangents.of_sinks(x.sinks, *results)
    d_q, d_k, d_v = (a.astype(p.dtype) for a, p in zip((d_q, d_k, d_v), (x.q, x.k, x.v), strict=True))
    if not dealt:
        d_q, d_k, d_v = ring.undeal(d_q, 3), ring.undeal(d_k, 2), ring.undeal(d_v, 2)
        d_key_bias = jax.tree.map(ring.undeal_whole, d_key_bias)
    found = Inputs(d_q, d_k, d_v, None, None, None, d_key_bias, d_sinks, d_params, None, None)
    return cotangents.settled(static, found, primal)


def _round(static: Static, ring: Ring, x: Inputs, results: list[jax.Array], step: Callable) -> tuple[Any, Any]:
    """float32 cotangents of this device's keys and values; and of its queries, the bias's parameters and key_bias."""
    reached, here, wide = _reached(ring, x), ring.here(), replace(static, wide=True)
    size = x.k.shape[2]

    def turn(t: jax.Array, carry: tuple) -> tuple:
        keys, sums, mine = carry
        # The sums come one step behind their keys: both travel while the step computes, and it waits for neither.
        ahead, sums = ring.passed_on((keys, sums))
        whose = (here - t) % ring.size

        def compute(mine: tuple) -> tuple:
            d_q, d_params, d_key_bias = mine
            d = step(wide, _with_keys(ring, x, keys, whose), *results)
            if d_key_bias is not None:
                old = jax.lax.dynamic_slice_in_dim(d_key_bias, whose * size, size, axis=1)
                d_key_bias = jax.lax.dynamic_update_slice_in_dim(d_key_bias, old + d.key_bias, whose * size, axis=1)
            return (d.k, d.v), (d_q + d.q, jax.tree.map(jnp.add, d_params, d.bias_params), d_key_bias)

        more, mine = jax.lax.cond(reached[whose], compute, lambda mine: (zeros(keys), mine), mine)
        return ahead, jax.tree.map(jnp.add, sums, more), mine

    def zeros(tree: Any) -> Any:
        return sharding.vary(jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), tree), x)

    start = (x.k, x.v), zeros((x.k, x.v)), zeros((x.q, x.bias_params, x.key_bias))
    _, sums, mine = jax.lax.fori_loop(0, ring.size, turn, start)
    return ring.passed_on(sums), mine
