"""A checkpoint that goes from a CPU to an accelerator and back: skipped where there is none.

MMJAX_TEST_PLATFORM=cuda,cpu python -m pytest tests/sharded/test_accelerator.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from tiny import randomised, tiny_model

from mmjax.checkpoint import Checkpoints
from mmjax.core.checksum import checksums
from mmjax.models import vlm


@pytest.fixture
def places():
    device = jax.devices()[0]
    if device.platform == "cpu":
        pytest.skip("There is no accelerator here.")
    try:
        return jax.devices("cpu")[0], device
    except RuntimeError:
        pytest.skip("MMJAX_TEST_PLATFORM names the accelerator alone; add the CPU: cuda,cpu.")


def test_from_a_cpu_to_an_accelerator_and_back(tmp_path, places, rng):
    cpu, accelerator = places
    with jax.default_device(cpu):
        params = randomised(vlm.spec(tiny_model(300)))
        tree = {
            "params": params,
            "bfloat16": jax.tree.map(lambda x: x.astype(jnp.bfloat16), params),
            "float16": jnp.asarray(rng.normal(size=(7, 5)), jnp.float16),
            "bytes": jnp.asarray(rng.integers(0, 256, (3, 11)), jnp.uint8),
            "signs": jnp.asarray(rng.integers(-128, 128, 13), jnp.int8),
            "mask": jnp.asarray(rng.random(9) < 0.5),
            "extremes": jnp.asarray([np.nan, np.inf, -np.inf, -0.0, 1e-45, 3e38], jnp.float32),
            "step": jnp.int32(7),
            "key": jax.random.key(3),
        }
        tree = jax.device_put(tree, cpu)
    sums = checksums(tree)
    like = lambda device: jax.tree.map(  # noqa: E731
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)), tree
    )
    with Checkpoints(tmp_path) as saved:
        saved.save(1, tree, wait=True)
        there = saved.restore(like(accelerator), 1, fallback=False).tree
        assert all(x.devices() == {accelerator} for x in jax.tree.leaves(there))
        assert checksums(there) == sums  # computed where the arrays are
        saved.save(2, there, wait=True)
        back = saved.restore(like(cpu), 2, fallback=False).tree
    assert all(x.devices() == {cpu} for x in jax.tree.leaves(back))
    assert checksums(back) == sums
    bits = lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)  # noqa: E731
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(back), strict=True):
        assert bits(a).tobytes() == bits(b).tobytes()
