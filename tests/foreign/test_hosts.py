"""Our modules inside Linen, NNX and Equinox: outputs and gradients as called plainly, under every transform."""

import functools

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

from mmjax.connectors import mlp as connector
from mmjax.connectors import perceiver
from mmjax.core.errors import InputError
from mmjax.encoders import vit
from mmjax.interop import equinox, linen
from mmjax.interop import nnx as ours
from mmjax.nn import cross_attention, patch_embed, rope, transformer

B, L, D = 8, 7, 16
BLOCKS = transformer.Config(D, 2, 4, 2, 8, 24, bias=True, norm_kind="layer", rope=rope.Config(8, (2, 2), 100.0))
CASES = {
    "transformer": (transformer, BLOCKS, ()),
    "vit": (vit, vit.Config(patch_embed.Config(2, D), BLOCKS), ()),
    "mlp": (connector, connector.Config(D, 12), ()),
    "perceiver": (perceiver, perceiver.Config(D, 16, 3, 2, 2, 8, 20), ("image", "order", "grid")),
    "cross_attention": (cross_attention, cross_attention.Config(D, 12, 2, 8, 20), ("order", "lo", "hi")),
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
    if name == "mlp":
        return (normal(L, D),), {}
    if name == "perceiver":
        grid = whole([(1, 1, 3), (1, 2, 2), (0, 0, 0)])
        return (normal(L, D),), {"image": whole([0, 0, 0, 1, 1, 1, 1]), "order": see["order"], "grid": grid}
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
    of, cfg, _ = CASES[name]
    params = randomised(of.spec(cfg))
    args, kwargs = inputs(name)
    call = plain(of, cfg)

    def loss(p):
        return jnp.sin(call(p, *args, **kwargs)).sum()

    return params, jax.jit(call)(params, *args, **kwargs), jax.jit(jax.grad(loss))(params)


def close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-4, atol=2e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("name", CASES)
def test_as_their_users_write_it(name):
    """Modules made and differentiated by each library's own functions."""
    of, cfg, _ = CASES[name]
    params, out, gradient = reference(name)
    args, kwargs = inputs(name)

    module = linen.Module(of, cfg)
    fresh = linen.params(module.init(jax.random.key(0), *args, **kwargs))
    assert jax.tree.structure(fresh) == jax.tree.structure(params)
    variables = linen.variables(params)
    close(module.apply(variables, *args, **kwargs), out)
    found = jax.grad(lambda v: jnp.sin(module.apply(v, *args, **kwargs)).sum())(variables)
    close(linen.params(found), gradient)

    fresh = ours.Module(of, cfg, rngs=nnx.Rngs(0))
    assert jax.tree.structure(fresh.params) == jax.tree.structure(params)
    module = ours.Module(of, cfg, params=params)
    close(nnx.jit(lambda m: m(*args, **kwargs))(module), out)
    found = nnx.grad(lambda m: jnp.sin(m(*args, **kwargs)).sum())(module)
    close(nnx.to_pure_dict(found)["tree"], gradient)
    close(module.params, params)

    fresh = equinox.Module(of, cfg, key=jax.random.key(0))
    assert jax.tree.structure(fresh.params) == jax.tree.structure(params)
    module = equinox.Module(of, cfg, params=params)
    close(eqx.filter_jit(module)(*args, **kwargs), out)
    close(eqx.filter_grad(lambda m: jnp.sin(m(*args, **kwargs)).sum())(module).params, gradient)


def test_inside_their_models():
    """Ours as a part of theirs, next to their own layers."""
    of, cfg, _ = CASES["perceiver"]
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


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", CASES)
def test_transforms(name, host):
    """jit of vmap, grad of remat, and scan: as without."""
    of, cfg, _ = CASES[name]
    params, out, gradient = reference(name)
    args, kwargs = inputs(name)
    call = HOSTS[host](of, cfg)

    def apart(x):
        return x.reshape(2, B // 2, *x.shape[1:])

    halves = jax.vmap(lambda a, k: call(params, *a, **k))
    got = jax.jit(halves)(jax.tree.map(apart, args), jax.tree.map(apart, kwargs))
    close(got.reshape(out.shape), out)

    again = jax.checkpoint(lambda p: jnp.sin(call(p, *args, **kwargs)).sum())
    close(jax.jit(jax.grad(again))(params), gradient)

    def step(carry, row):
        a, k = jax.tree.map(lambda x: x[None], row)
        return carry + 1, call(params, *a, **k)[0]

    count, got = jax.lax.scan(step, 0, (args, kwargs))
    assert count == B
    close(got, out)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("host", HOSTS)
def test_meshes(host, kind):
    """Rows over a mesh of eight devices, parameters on each: outputs and gradients as on one."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(kind,) * 3)
    for name, (of, cfg, _) in CASES.items():
        params, out, gradient = reference(name)
        args, kwargs = inputs(name)
        call = HOSTS[host](of, cfg)
        with jax.set_mesh(mesh):
            rows = jax.NamedSharding(mesh, P(("data", "fsdp")))
            args, kwargs = jax.device_put((args, kwargs), rows)
            here = jax.device_put(params, jax.NamedSharding(mesh, P()))
            close(jax.jit(call)(here, *args, **kwargs), out)
            loss = jax.jit(jax.grad(lambda p, a, k, call=call: jnp.sin(call(p, *a, **k)).sum()))
            close(loss(here, args, kwargs), gradient)


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
def test_inside_shard_map(host):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    for name, (of, cfg, _) in CASES.items():
        params, out, gradient = reference(name)
        args, kwargs = inputs(name)
        call = HOSTS[host](of, cfg)
        local = jax.shard_map(
            lambda p, a, k, call=call: call(p, *a, **k),
            mesh=mesh,
            in_specs=(P(), P("data"), P("data")),
            out_specs=P("data"),
        )
        close(jax.jit(local)(params, args, kwargs), out)
        loss = jax.jit(jax.grad(lambda p, local=local, a=args, k=kwargs: jnp.sin(local(p, a, k)).sum()))
        close(loss(params), gradient)


def test_a_module_starts_from_one_thing():
    for host, wrong in ((ours, {}), (equinox, {"key": jax.random.key(0), "params": {}})):
        with pytest.raises(InputError, match="give one of them"):
            host.Module(connector, CASES["mlp"][1], **wrong)
