import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import randomised

from mmjax.core import spec as specs
from mmjax.core.meshes import MeshConfig, Rules, make_mesh, named
from mmjax.nn import rope, transformer
from mmjax.sequence import intervals

CFG = transformer.Config(
    width=16,
    layers=3,
    heads=4,
    kv_heads=2,
    head=8,
    hidden=20,
    rope=rope.Config(8, (2, 1, 1)),
    qk_norm="head",
    bias=True,
)


def inputs(rng, batch=3, length=11):
    lo, hi = intervals.causal(length)
    tile = lambda x: np.tile(x[None], (batch, 1))  # noqa: E731
    see = {
        "order": tile(np.arange(length, dtype=np.int32)),
        "lo": tile(lo),
        "hi": tile(hi),
        "position": rng.integers(0, 9, (batch, length, 3)),
    }
    return jnp.asarray(rng.normal(size=(batch, length, 16)), jnp.float32), jax.tree.map(jnp.asarray, see)


def oracle(params, x, cfg, order, lo, hi, position):
    """The same blocks written straight down in float64: one loop, dense mask, complex rotation."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x, order, lo, hi, position = np.float64(x), *map(np.asarray, (order, lo, hi, position))
    frequency = cfg.rope.theta ** -(np.arange(4) / 4)
    turn = np.exp(1j * position[..., [0, 0, 1, 2]] * frequency)[:, :, None]

    def rms(v, scale):
        return v / np.sqrt((v**2).mean(-1, keepdims=True) + cfg.epsilon) * scale

    def rotate(v):
        z = (v[..., :4] + 1j * v[..., 4:]) * turn
        return np.concatenate([z.real, z.imag], -1)

    for i in range(cfg.layers):
        a = jax.tree.map(lambda v, i=i: v[i], p)
        h = rms(x, a["attention_norm"]["scale"])
        q, k, v = (
            np.einsum("bld,dhe->blhe", h, a["attention"][n]["kernel"]) + a["attention"][n]["bias"] for n in "qkv"
        )
        q = rotate(rms(q, a["attention"]["q_norm"]["scale"]))
        k = rotate(rms(k, a["attention"]["k_norm"]["scale"]))
        k, v = np.repeat(k, 2, 2), np.repeat(v, 2, 2)
        seen = (lo[:, :, None] <= order[:, None]) & (order[:, None] <= hi[:, :, None])
        weight = np.where(seen[:, None], np.exp(np.einsum("blhe,bshe->bhls", q, k) / np.sqrt(8)), 0)
        out = np.einsum("bhls,bshe->blhe", weight / weight.sum(-1, keepdims=True), v)
        if cfg.inner_norm:
            out = rms(out.reshape(*out.shape[:2], -1), a["attention"]["inner_norm"]["scale"]).reshape(out.shape)
        x = x + np.einsum("blhe,hed->bld", out, a["attention"]["out"]["kernel"]) + a["attention"]["out"]["bias"]
        h = rms(x, a["mlp_norm"]["scale"])
        gate, up = (h @ a["mlp"][n]["kernel"] + a["mlp"][n]["bias"] for n in ("gate", "up"))
        h = gate / (1 + np.exp(-gate)) * up
        h = rms(h, a["mlp"]["inner_norm"]["scale"]) if cfg.inner_norm else h
        x = x + h @ a["mlp"]["down"]["kernel"] + a["mlp"]["down"]["bias"]
    return x


@pytest.mark.parametrize("inner", [False, True])
def test_equals_the_formula_written_straight_down(rng, inner):
    x, see = inputs(rng)
    cfg = dataclasses.replace(CFG, inner_norm=inner)
    p = randomised(transformer.spec(cfg))
    # Descriptors as arguments, as a batch has them: jaxlib 0.7.2 computes wrongly with them as constants.
    ours = jax.jit(lambda p, x, see: transformer.apply(p, x, cfg, **see))(p, x, see)
    np.testing.assert_allclose(ours, oracle(p, x, cfg, **see), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("change", [*({"remat": name} for name in list(transformer.REMAT)[1:]), {"unroll": 3}])
def test_how_it_runs_does_not_change_what_it_computes(rng, change):
    x, see = inputs(rng)
    p = randomised(transformer.spec(CFG))

    def run(cfg):
        loss = lambda p, x, see: jnp.square(transformer.apply(p, x, cfg, **see)).mean()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(p, x, see)

    (one, grad), (other, other_grad) = run(CFG), run(dataclasses.replace(CFG, **change))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grad, other_grad)


def test_spec_is_the_truth():
    spec = transformer.spec(CFG)
    made = jax.eval_shape(lambda key: specs.init(spec, key), jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, made) == specs.map_specs(lambda p: p.shape, spec)
    assert specs.count(spec) == sum(x.size for x in jax.tree.leaves(made))
    assert all(p.axes[0] == "layers" and p.shape[0] == 3 for p in jax.tree.leaves(spec, is_leaf=specs._is_leaf))


def test_remat_policies_keep_what_their_names_say(rng):
    """What the backward pass is handed from the forward pass, by layer, and which products it runs again."""
    x, see = inputs(rng)
    b, n = x.shape[:2]
    cfg = dataclasses.replace(CFG, qk_norm="none", bias=False, layers=b + 1)
    p = randomised(transformer.spec(cfg))
    width, hidden, heads, kv = 16, 20, 4 * 8, 2 * 8
    layer_input = b * n * width
    products = b * n * (heads + 2 * kv + width + 2 * hidden)  # q, k, v, out, up, gate; the backward pass reads no other
    results = b * n * (heads + 4)  # out and log-sum-exp
    wanted = {"dots": products, "attention": results, "dots_attention": products + results, "full": 0}
    products_again = {"none": 0, "dots": 0, "attention": 6, "dots_attention": 0, "full": 6}
    exps = {}
    for name in transformer.REMAT:
        one = dataclasses.replace(cfg, remat=name)
        loss = lambda p, x, one=one: jnp.square(transformer.apply(p, x, one, **see)).sum()  # noqa: E731
        scans = [e for e in jax.make_jaxpr(jax.grad(loss))(p, x).jaxpr.eqns if e.primitive.name == "scan"]
        forward, backward = scans
        # By their leading axis: how a scan tells its carry from what it stacks is not the same in all versions of jax.
        stacked = [v.aval.shape for v in forward.outvars if v.aval.shape[:1] == (cfg.layers,)]
        kept = sum(np.prod(shape[1:]) for shape in stacked)
        assert not set(stacked) & {a.shape for a in jax.tree.leaves(p) if a.ndim > 2}, name  # no copies of kernels
        if name != "none":  # the input of each block, and what the policy keeps of it
            assert kept == layer_input + wanted[name], name
        inner = backward.params["jaxpr"]
        counts = _count(getattr(inner, "jaxpr", inner))
        # Two products with parameters for each, one for the input's cotangent and one for the parameter's.
        assert counts["dot_general without batch"] == 2 * 7 + products_again[name], (name, counts)
        exps[name] = counts["exp"]
    # Attention's forward pass has an exponential of scores and one of sums; the backward pass has one of its own.
    assert exps["attention"] == exps["dots_attention"] < exps["dots"] == exps["full"]


def _count(jaxpr) -> dict:
    """How often each primitive stands in a jaxpr and all within it; products with and without batch dimensions."""
    found = collections.Counter()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            name += " with batch" if eqn.params["dimension_numbers"][1][0] else " without batch"
        found[name] += 1
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                found += _count(inner) if hasattr(inner, "eqns") else collections.Counter()
    return found


def test_gradients_of_a_stack_are_split_in_the_loop_that_makes_them():
    """Fully sharded parameters, axes that the compiler propagates: no device ever holds a whole stack of kernels."""
    cfg = dataclasses.replace(CFG, width=32, heads=3, kv_heads=3, hidden=40, remat="full")
    spec, mesh = transformer.spec(cfg), make_mesh(MeshConfig(1, 8, 1))
    with jax.set_mesh(mesh):
        params = specs.abstract(spec, mesh, Rules())
        x = jax.ShapeDtypeStruct((8, 6, 32), jnp.float32, sharding=named(mesh, ("batch", None, None), Rules()))
        see = {k: jax.ShapeDtypeStruct((8, 6), jnp.int32) for k in ("order", "lo", "hi")}
        see["position"] = jax.ShapeDtypeStruct((8, 6, 3), jnp.int32)
        gradient = jax.grad(lambda p, x, see: jnp.square(transformer.apply(p, x, cfg, **see)).sum())
        program = jax.jit(gradient).lower(params, x, see).compile()
    stacks = {(3, 32, 3, 8), (3, 3, 8, 32), (3, 32, 40), (3, 40, 32)}
    assert stacks <= {p.shape for p in jax.tree.leaves(spec, is_leaf=specs._is_leaf)}
    text = program.as_text()
    for shape in stacks:
        assert f"f32[{','.join(map(str, shape))}]" not in text, shape
    for got, p in zip(jax.tree.leaves(program.output_shardings), jax.tree.leaves(params), strict=True):
        assert p.shape not in stacks or got.is_equivalent_to(p.sharding, len(p.shape))
