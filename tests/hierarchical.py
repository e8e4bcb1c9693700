"""A hierarchical encoder and its gradients with no mesh, on Auto and Explicit ones, in a shard_map and under vmap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.core import spec as specs
from mmjax.core.meshes import MeshConfig, Rules, make_mesh, named

P = jax.sharding.PartitionSpec
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def loss(params, images, module, cfg):
    """Of everything that comes out."""
    return sum(jnp.sin(x).mean() for x in jax.tree.leaves(module.apply(params, images, cfg)))


def check_everywhere(module, cfg, params, images):
    """`images` f32[8, H, W, C]; two devices along every axis."""
    run = jax.value_and_grad(functools.partial(loss, module=module, cfg=cfg))
    expected = jax.jit(run)(params, images)
    for explicit in (False, True):
        mesh = make_mesh(MeshConfig(2, 2, 2, explicit=explicit))
        placed = jax.tree.map(jax.device_put, params, specs.shardings(module.spec(cfg), mesh, Rules()))
        rows = jax.device_put(images, named(mesh, ("batch", None, None, None), Rules(), images.shape))
        with jax.set_mesh(mesh):
            jax.tree.map(close, jax.jit(run)(placed, rows), expected)

    mesh = make_mesh(MeshConfig(4), jax.devices()[:4])

    def local(params, images):
        value, gradients = run(params, images)
        # Gradients by parameters, which devices share, come summed.
        return jax.lax.pmean(value, "data"), jax.tree.map(lambda x: x / 4, gradients)

    split = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    jax.tree.map(close, jax.jit(split)(params, images), expected)

    mapped = jax.jit(jax.vmap(run, (None, 0)))(params, images.reshape(4, 2, *images.shape[1:]))
    jax.tree.map(close, jax.tree.map(lambda x: x.mean(0), mapped), expected)
