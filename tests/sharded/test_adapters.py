"""Blocks with adapters on meshes: outputs and gradients are those of one device, and what is dropped is the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import randomised

from mmjax.core import meshes, tree
from mmjax.core import spec as specs
from mmjax.core.meshes import MeshConfig, Rules, make_mesh
from mmjax.nn import lora, transformer

pytestmark = pytest.mark.slow

BLOCKS = transformer.Config(width=8, layers=2, heads=4, kv_heads=2, head=4, hidden=12)
SPEC = lora.spec({"blocks": transformer.spec(BLOCKS)}, lora.Config(3, 6.0, targets=("blocks/*/kernel",)))["blocks"]


def run(params: dict, x: jax.Array, order: jax.Array) -> tuple[jax.Array, dict]:
    def loss(params: dict) -> jax.Array:
        params = lora.dropping(params, 0.3, jax.random.key(2))
        y = transformer.apply(params, x, BLOCKS, order=order, lo=jnp.zeros_like(order), hi=order)
        return jnp.sin(y).sum()

    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize("mesh", [MeshConfig(2, 2, 2), MeshConfig(1, 2, 2, 2, explicit=True)], ids=["auto", "explicit"])
def test_as_on_one_device(mesh):
    params = randomised(SPEC)
    x = jax.random.normal(jax.random.key(1), (4, 6, 8))
    order = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (4, 6))
    with jax.default_matmul_precision("highest"):
        loss, grads = jax.jit(run)(params, x, order)
        on = make_mesh(mesh)
        placed = jax.device_put(params, specs.shardings(SPEC, on, Rules()))
        rows = [
            jax.device_put(a, meshes.named(on, ("batch", "length", None)[: a.ndim], Rules(), a.shape))
            for a in (x, order)
        ]
        with jax.set_mesh(on):
            other, found = jax.jit(run)(placed, *rows)
    np.testing.assert_allclose(other, loss, rtol=1e-5)
    for name, g in tree.flatten(grads).items():
        np.testing.assert_allclose(tree.flatten(found)[name], g, atol=2e-4 * np.abs(g).max(), err_msg=name)
    split = tree.flatten(placed)["mlp/up/kernel/b"].sharding.spec
    assert "tensor" in split  # the thin products are split too
