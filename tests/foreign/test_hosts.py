"""Our modules inside Linen, NNX and Equinox: outputs and gradients as called plainly, under every transform.

Hosts call `apply` and know nothing of what it does: the transforms are tried with five modules in every host and with
each of the others in one, in turn. MMJAX_WHOLE_MATRIX=1 tries all with all (half an hour).
"""

import functools
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from tiny import randomised

eqx = pytest.importorskip("equinox", reason="needs the `interop` extra")
nnx = pytest.importorskip("flax.nnx", exc_type=ImportError)

from mmjax.connectors import (
    abstractor,
    linear,
    merger,
    perceiver,
    perceiver_io,
    perceiver_layer,
    pixel_shuffle,
    pool,
    qformer,
    restore,
    wico,
)
from mmjax.connectors import mlp as connector
from mmjax.core.errors import InputError
from mmjax.encoders import pyramid, swin, vit
from mmjax.interop import equinox, linen
from mmjax.interop import nnx as ours
from mmjax.nn import cross_attention, patch_embed, rope, transformer

B, L, D = 8, 7, 16
BLOCKS = transformer.Config(D, 2, 4, 2, 8, 24, bias=True, norm_kind="layer", rope=rope.Config(8, (2, 2), 100.0))
CASES = {
    "transformer": (transformer, BLOCKS),
    "vit": (vit, vit.Config(patch_embed.Config(2, D), BLOCKS)),
    "mlp": (connector, connector.Config(D, 12)),
    "perceiver": (perceiver, perceiver.Config(D, D, 3, 2, 2, 8, 20)),
    "cross_attention": (cross_attention, cross_attention.Config(D, 12, 2, 8, 20)),
}
FIRST = tuple(CASES)
SCALED = transformer.Config(D, 2, 2, 2, 8, 24, "gelu", False, True, norm_kind="layer", layer_scale=0.5, qk_norm="width")
PYRAMID = pyramid.Config("v2", (8, 12), (1, 1), (1, 2), (2.0, 2.0), (3, 3), (2, 2), (2, 1))
LATENT = perceiver_layer.Config(12, None, 2, 12, 12, 10)
CASES |= {
    "vit with class tokens": (
        vit,
        vit.Config(patch_embed.Config(2, D), SCALED, vit.Table(3, 2), classes=1, registers=2),
    ),
    "swin": (swin, swin.Config(patch_embed.Config(2, 8), (2, 2), (2, 4), 2)),
    "pyramid": (pyramid, PYRAMID),
    "linear": (linear, linear.Config(D, 12)),
    "pixel_shuffle": (pixel_shuffle, pixel_shuffle.Config(D, 12)),
    "merger": (merger, merger.Config(D, 12)),
    "pool": (pool, pool.Config(outputs=12, inputs=D)),
    "wico": (wico, wico.Config(D, 12)),
    "restore": (restore, restore.Config(D, 2, 2, 8)),
    "abstractor": (abstractor, abstractor.Config(D, 8, 12, 2, depth=1)),
    "qformer": (qformer, qformer.Config(D, 16, 3, 3, 2, 20, outputs=12)),
    "perceiver_io": (perceiver_io, perceiver_io.Config(3, perceiver_layer.Config(12, D, 2, 12, 12, 10), LATENT, 2)),
}


def inputs(name, rows=B):
    """Arguments and keyword arguments of a case, on the batch axis."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=(rows, *shape)), jnp.float32)

    def whole(values):
        return jnp.tile(jnp.asarray(values, jnp.int32)[None], (rows, *[1] * np.ndim(values)))

    see = {
        "order": whole(np.arange(L)),
        "lo": whole([0, 0, 0, 3, 3, 3, 3]),
        "hi": whole([2, 2, 2, 6, 6, 6, 6]),
    }
    place = {"position": whole(np.stack([np.arange(L) // 3, np.arange(L) % 3], -1))}
    at = {
        "image": whole([0, 0, 0, 1, 1, 1, 1]),
        "order": see["order"],
        "grid": whole([(1, 1, 3), (1, 2, 2), (0, 0, 0)]),
    }
    if name in ("swin", "pyramid"):
        return (normal(8, 6, 3),), {}
    if name in ("mlp", "linear", "pixel_shuffle", "merger", "pool", "wico"):
        return (normal(L + 1, D),), {}
    if name in ("perceiver", "restore", "abstractor", "qformer", "perceiver_io"):
        return (normal(L, D),), at
    if name == "vit with class tokens":
        return (normal(L, 12),), see | place | at
    if name == "cross_attention":
        return (normal(L, D), normal(5, 12)), see | {"order": whole(np.arange(5)), "hi": whole([2, 2, 2, 4, 4, 4, 4])}
    return (normal(L, 12 if name == "vit" else D),), see | place


def plain(of, cfg):
    return lambda params, *args, **kwargs: of.apply(params, *args, cfg=cfg, **kwargs)


def in_linen(of, cfg):
    module = linen.Module(of, cfg)
    return lambda params, *args, **kwargs: module.apply(linen.variables(params), *args, **kwargs)


def in_nnx(of, cfg):
    return lambda params, *args, **kwargs: ours.Module(of, cfg, params=params)(*args, **kwargs)


def in_equinox(of, cfg):
    return lambda params, *args, **kwargs: equinox.Module(of, cfg, params=params)(*args, **kwargs)


HOSTS = {"plain": plain, "linen": in_linen, "nnx": in_nnx, "equinox": in_equinox}


@functools.cache
def reference(name):
    """Parameters, output and gradients of a scalar, called plainly, with no transform."""
    of, cfg = CASES[name]
    params = randomised(of.spec(cfg))
    args, kwargs = inputs(name)
    call = plain(of, cfg)

    def loss(p):
        return total(call(p, *args, **kwargs))

    return params, jax.jit(call)(params, *args, **kwargs), jax.jit(jax.grad(loss))(params)


def total(out):
    """A scalar of all that came out."""
    return sum(jnp.sin(x).sum() for x in jax.tree.leaves(out))


def close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-4, atol=2e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("name", [n if n in FIRST else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_as_their_users_write_it(name):
    """Modules made and differentiated by each library's own functions; compiled, for op by op takes minutes."""
    of, cfg = CASES[name]
    params, out, gradient = reference(name)
    args, kwargs = inputs(name)

    module = linen.Module(of, cfg)
    fresh = linen.params(jax.jit(module.init)(jax.random.key(0), *args, **kwargs))
    assert jax.tree.structure(fresh) == jax.tree.structure(params)
    variables = linen.variables(params)
    close(jax.jit(module.apply)(variables, *args, **kwargs), out)
    found = jax.jit(jax.grad(lambda v: total(module.apply(v, *args, **kwargs))))(variables)
    close(linen.params(found), gradient)

    fresh = ours.Module(of, cfg, rngs=nnx.Rngs(0))
    assert jax.tree.structure(fresh.params) == jax.tree.structure(params)
    module = ours.Module(of, cfg, params=params)
    close(nnx.jit(lambda m: m(*args, **kwargs))(module), out)
    found = nnx.jit(nnx.grad(lambda m: total(m(*args, **kwargs))))(module)
    close(nnx.to_pure_dict(found)["tree"], gradient)
    close(module.params, params)

    fresh = equinox.Module(of, cfg, key=jax.random.key(0))
    assert jax.tree.structure(fresh.params) == jax.tree.structure(params)
    module = equinox.Module(of, cfg, params=params)
    close(eqx.filter_jit(module)(*args, **kwargs), out)
    close(eqx.filter_jit(eqx.filter_grad(lambda m: total(m(*args, **kwargs))))(module).params, gradient)


def test_inside_their_models():
    """Ours as a part of theirs, next to their own layers."""
    of, cfg = CASES["perceiver"]
    (features,), see = inputs("perceiver")

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x, **see):
            return nn.Dense(3)(linen.Module(of, cfg)(nn.Dense(D)(x), **see))

    variables = Linen().init(jax.random.key(0), features, **see)
    assert Linen().apply(variables, features, **see).shape == (B, 9, 3)
    inner = [tree for name, tree in variables["params"].items() if "Dense" not in name]
    assert list(inner[0]) == [linen.NAME]

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.before, self.resample = nnx.Linear(D, D, rngs=rngs), ours.Module(of, cfg, rngs=rngs)

        def __call__(self, x, **see):
            return self.resample(self.before(x), **see)

    model = Nnx(nnx.Rngs(0))
    assert nnx.jit(lambda m, x: m(x, **see))(model, features).shape == (B, 9, 16)
    assert len(jax.tree.leaves(nnx.state(model, nnx.Param))) == 2 + len(jax.tree.leaves(of.spec(cfg)))

    class Equinox(eqx.Module):
        before: eqx.nn.Linear
        resample: equinox.Module

        def __call__(self, x, **see):
            return self.resample(jax.vmap(jax.vmap(self.before))(x), **see)

    model = Equinox(eqx.nn.Linear(D, D, key=jax.random.key(1)), equinox.Module(of, cfg, key=jax.random.key(0)))
    assert eqx.filter_jit(model)(features, **see).shape == (B, 9, 16)


def pairs():
    """Modules and hosts: every host for the first modules, one for each of the others, in turn."""
    out = []
    for i, name in enumerate(CASES):
        every = name in FIRST or "MMJAX_WHOLE_MATRIX" in os.environ
        hosts = HOSTS if every else [list(HOSTS)[i % len(HOSTS)]]
        out += [pytest.param(name, host, id=f"{name}-{host}") for host in hosts]
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("name", "host"), pairs())
def test_transforms(name, host):
    """jit of vmap, grad of remat, and scan: as without."""
    of, cfg = CASES[name]
    params, out, gradient = reference(name)
    args, kwargs = inputs(name)
    call = HOSTS[host](of, cfg)

    def apart(x):
        return x.reshape(2, B // 2, *x.shape[1:])

    halves = jax.vmap(lambda a, k: call(params, *a, **k))
    got = jax.jit(halves)(jax.tree.map(apart, args), jax.tree.map(apart, kwargs))
    close(jax.tree.map(lambda a, b: a.reshape(b.shape), got, out), out)

    again = jax.checkpoint(lambda p: total(call(p, *args, **kwargs)))
    close(jax.jit(jax.grad(again))(params), gradient)

    def step(carry, row):
        a, k = jax.tree.map(lambda x: x[None], row)
        return carry + 1, jax.tree.map(lambda x: x[0], call(params, *a, **k))

    count, got = jax.jit(lambda: jax.lax.scan(step, 0, (args, kwargs)))()
    assert count == B
    close(got, out)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(("name", "host"), pairs())
def test_meshes(name, host, kind):
    """Rows over a mesh of eight devices, parameters on each: outputs and gradients as on one."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(kind,) * 3)
    of, cfg = CASES[name]
    params, out, gradient = reference(name)
    args, kwargs = inputs(name)
    call = HOSTS[host](of, cfg)
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, P(("data", "fsdp")))
        args, kwargs = jax.device_put((args, kwargs), rows)
        here = jax.device_put(params, jax.NamedSharding(mesh, P()))
        close(jax.jit(call)(here, *args, **kwargs), out)
        loss = jax.jit(jax.grad(lambda p, a, k: total(call(p, *a, **k))))
        close(loss(here, args, kwargs), gradient)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "host"), pairs())
def test_inside_shard_map(name, host):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    of, cfg = CASES[name]
    params, out, gradient = reference(name)
    args, kwargs = inputs(name)
    call = HOSTS[host](of, cfg)
    local = jax.shard_map(
        lambda p, a, k: call(p, *a, **k), mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P("data")
    )
    close(jax.jit(local)(params, args, kwargs), out)
    close(jax.jit(jax.grad(lambda p: total(local(p, args, kwargs))))(params), gradient)


def test_a_module_starts_from_one_thing():
    for host, wrong in ((ours, {}), (equinox, {"key": jax.random.key(0), "params": {}})):
        with pytest.raises(InputError, match="give one of them"):
            host.Module(connector, CASES["mlp"][1], **wrong)
