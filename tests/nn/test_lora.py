"""Low-rank adapters: what a product with them is, how they start, which kernels they may stand beside."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import randomised

from mmjax.core import sharding, tree
from mmjax.core import spec as specs
from mmjax.core.errors import InputError
from mmjax.core.spec import ParamSpec
from mmjax.nn import lora, patch_embed, transformer

BLOCKS = transformer.Config(width=8, layers=2, heads=2, kv_heads=1, head=4, hidden=12)
SPEC = {"decoder": {"blocks": transformer.spec(BLOCKS)}, "embed": patch_embed.spec(patch_embed.Config(2, 8))}


def test_a_known_product():
    w = {"base": jnp.eye(2), "a": jnp.array([[1.0], [2.0]]), "b": jnp.array([[3.0, 0.0]]), "scale": jnp.float32(0.5)}
    x = jnp.array([[[1.0, 1.0]]])
    np.testing.assert_array_equal(sharding.dense(x, w, ("batch", "length", None)), [[[5.5, 1.0]]])
    np.testing.assert_array_equal(lora.merged({"kernel": w})["kernel"], [[2.5, 0.0], [3.0, 1.0]])


def test_shapes_and_starts():
    """Inputs of q are one axis, those of out are heads and what each has; axes of both parts are the kernel's own."""
    spec = lora.spec(SPEC, lora.Config(3, 6.0))["decoder"]["blocks"]
    q, out = (spec["attention"][name]["kernel"] for name in ("q", "out"))
    assert (q["a"].shape, q["a"].axes) == ((2, 8, 3), ("layers", "embed", None))
    assert (q["b"].shape, q["b"].axes) == ((2, 3, 2, 4), ("layers", None, "heads", None))
    assert (out["a"].shape, out["b"].shape) == ((2, 2, 4, 3), (2, 3, 8))
    down = specs.init(spec, jax.random.key(0))["mlp"]["down"]["kernel"]
    np.testing.assert_array_equal(down["scale"], [2.0, 2.0])
    assert not down["b"].any()
    assert 0.8 * 12**-0.5 < np.abs(down["a"]).max() <= 12**-0.5
    assert lora.Config(4, 6.0, rslora=True).scale == 3.0


def test_blocks_with_adapters_are_blocks_with_merged_kernels():
    """Under the scan, with gradients; and one block's adapter is not another's."""
    spec = lora.spec(SPEC, lora.Config(3, 6.0))["decoder"]["blocks"]
    params = randomised(spec)
    x = jax.random.normal(jax.random.key(1), (1, 5, 8))
    order = jnp.arange(5, dtype=jnp.int32)[None]

    def run(params):
        return transformer.apply(params, x, BLOCKS, order=order, lo=jnp.zeros_like(order), hi=order)

    with jax.default_matmul_precision("highest"):
        both = jax.jit(lambda p: (run(p), run(lora.merged(p))))(params)
        np.testing.assert_allclose(*both, atol=1e-4)
        grads = jax.jit(jax.grad(lambda p: run(p).sum()))(params)
    assert all(np.abs(g).max() > 0 for name, g in tree.flatten(grads).items() if name.endswith(("/a", "/b")))
    host = lora.merged(jax.device_get(params))
    for name, x in tree.flatten(host).items():
        np.testing.assert_allclose(x, tree.flatten(lora.merged(params))[name], rtol=1e-5, atol=1e-5)


def test_only_what_the_adapter_reads_is_dropped():
    """The numbers that are left are larger by as much as are left out; the kernel beside it reads them all."""
    w = {"base": jnp.eye(256), "a": jnp.eye(256), "b": 3.0 * jnp.eye(256), "scale": jnp.float32(0.5)}
    x = 1.0 + jax.random.uniform(jax.random.key(1), (2, 8, 256))
    (node,) = lora.dropping({"kernel": w}, 0.25, jax.random.key(0)).values()
    y = sharding.dense(x, node, ("batch", "length", None))
    more = np.asarray((y - x) / x)
    assert 0.2 < (more == 0).mean() < 0.3
    np.testing.assert_allclose(more[more != 0], 1.5 / 0.75, rtol=1e-4)
    assert len(np.unique((more == 0).reshape(16, 256), axis=0)) == 16  # each token loses others


def test_every_kernel_and_layer_drops_its_own_and_the_backward_pass_the_same():
    spec = lora.spec(SPEC, lora.Config(3, 6.0))["decoder"]["blocks"]
    params, x = randomised(spec), jax.random.normal(jax.random.key(1), (1, 5, 8))
    order = jnp.arange(5, dtype=jnp.int32)[None]

    @functools.partial(jax.jit, static_argnums=1)
    def run(seed, remat):
        def loss(params):
            params = lora.dropping(params, 0.5, jax.random.key(seed))
            cfg = dataclasses.replace(BLOCKS, remat=remat)
            return jnp.sin(transformer.apply(params, x, cfg, order=order, lo=jnp.zeros_like(order), hi=order)).sum()

        return jax.value_and_grad(loss)(params)

    one, kept = run(0, "none"), run(0, "attention")
    for name, g in tree.flatten(one[1]).items():
        np.testing.assert_allclose(tree.flatten(kept[1])[name], g, rtol=1e-3, atol=1e-4, err_msg=name)
    assert abs(float(run(1, "none")[0] - one[0])) > 1e-3
    nodes = tree.flatten(lora.dropping(params, 0.5, jax.random.key(0)))
    keys = np.concatenate([jax.random.key_data(k) for name, k in nodes.items() if name.endswith("drop/key")])
    assert len(np.unique(keys, axis=0)) == 7 * BLOCKS.layers


def test_a_merged_kernel_is_rounded_once():
    one = np.ones((1, 1))
    w = {"base": one.astype(jnp.bfloat16), "a": one, "b": 0.0059 * one, "scale": np.ones(())}
    assert lora.merged({"kernel": w})["kernel"] == jnp.bfloat16(1.0078125)
    w["b"] = 0.0038 * one  # under half of the last bit
    assert lora.merged({"kernel": w})["kernel"] == 1


def test_parted_and_unchanged_names():
    params = specs.init(lora.spec(SPEC, lora.Config(3)), jax.random.key(0))
    plain, nodes = lora.parted(params)
    assert plain.keys() == tree.flatten(SPEC).keys()
    assert sorted(nodes) == sorted(name for name in plain if name.startswith("decoder/") and name.endswith("/kernel"))


def test_all_kernels_but_some():
    products = {name for name in tree.flatten(SPEC) if name.startswith("decoder/") and name.endswith("/kernel")}
    mlp = {name for name in products if "/mlp/" in name}
    assert mlp
    assert set(lora.targets(SPEC, lora.Config(2, targets=("decoder/blocks", "!*/mlp/*")))) == products - mlp
    assert set(lora.targets(SPEC, lora.Config(2, targets=("!*/mlp/*",)))) == products - mlp


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("decoder/blocks/atention",), "did you mean 'decoder/blocks/attention'"),
        (("decoder/blocks/mlp_norm",), "names no kernel that tokens are multiplied with"),
        (("embed",), "names no kernel that tokens are multiplied with"),
        (("!embed",), "'!embed' names no kernel that tokens are multiplied with"),
        (("decoder", "!decoder"), "leaves no kernel to adapt"),
    ],
)
def test_targets_that_are_none(targets, message):
    with pytest.raises(InputError, match=message):
        lora.spec(SPEC, lora.Config(2, targets=targets))


def test_a_convolution_is_no_product():
    assert not lora._product(ParamSpec((3, 3, 8), (None, None, "mlp")))


def test_ranks_below_one():
    with pytest.raises(InputError, match=r"lora\.rank is 0"):
        lora.Config(0)
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(InputError, match=r"lora\.dropout is"):
            lora.Config(2, dropout=share)
