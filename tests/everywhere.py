"""A module under vmap and remat, on Auto and Explicit meshes and inside shard_map: as on one device."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P


def everywhere(call, params, x, places, some):
    """call(params, x, places) of eight equal rows and its gradients: as on one device wherever it runs.

    `places` is a tree of arrays; `some` picks what has a meaning from the outputs.
    """
    x, places = jax.tree.map(lambda a: jnp.concatenate([a] * 8), (x, places))

    def loss(params, x, places):
        return jnp.sin(some(call(params, x, places))).sum()

    out, gradient = jax.jit(call)(params, x, places), jax.jit(jax.grad(loss))(params, x, places)

    def close(got, want):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-4, atol=2e-5 * max(1, np.abs(b).max()))

    halves = jax.tree.map(lambda a: a.reshape(2, 4, *a.shape[1:]), (x, places))
    close(jax.jit(jax.vmap(lambda x, places: call(params, x, places)))(*halves).reshape(out.shape), out)
    close(jax.jit(jax.grad(jax.checkpoint(loss)))(params, x, places), gradient)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(kind,) * 3)
        with jax.set_mesh(mesh):
            split = jax.device_put((x, places), jax.NamedSharding(mesh, P(("data", "fsdp"))))
            here = jax.device_put(params, jax.NamedSharding(mesh, P()))
            close(jax.jit(call)(here, *split), out)
            close(jax.jit(jax.grad(loss))(here, *split), gradient)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    local = jax.shard_map(call, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P("data"))
    close(jax.jit(local)(params, x, places), out)
    close(jax.jit(jax.grad(lambda p: jnp.sin(some(local(p, x, places))).sum()))(params), gradient)
