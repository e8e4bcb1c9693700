"""Parameters from specs: values, shapes and shardings."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mmjax.core import spec as specs
from mmjax.core.meshes import MeshConfig, Rules, make_mesh
from mmjax.core.spec import Normal, ParamSpec

SPEC = {
    "table": ParamSpec((12, 8), ("vocab", "embed"), Normal(0.5)),
    "block": specs.stack({"kernel": ParamSpec((8, 6), ("embed", "mlp"), Normal(1.0))}, 3),
}


def test_initial_values_do_not_depend_on_the_mesh_or_on_other_parameters():
    alone = specs.init({"table": SPEC["table"]}, jax.random.key(1))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = specs.shardings(SPEC, mesh, Rules())
    made = jax.jit(lambda k: specs.init(SPEC, k), out_shardings=placed)(jax.random.key(1))
    # The random bits are equal; the inverse error function is rounded as XLA fuses it.
    np.testing.assert_allclose(made["table"], alone["table"], rtol=1e-5, atol=1e-7)
    assert made["table"].sharding.spec == P("tensor", "fsdp")
    assert made["block"]["kernel"].sharding.spec == P(None, "fsdp", "tensor")
    assert made["block"]["kernel"].shape == (3, 8, 6)
    np.testing.assert_allclose(np.std(made["block"]["kernel"]), 0.88, atol=0.12)  # a normal cut at two deviations


def test_count_and_abstract_agree_with_the_values():
    shapes = specs.abstract(SPEC)
    assert specs.count(SPEC) == 12 * 8 + 3 * 8 * 6 == sum(x.size for x in jax.tree.leaves(shapes))


def test_axis_names_must_match_the_shape():
    with pytest.raises(ValueError, match="needs 2 axis names"):
        ParamSpec((3, 4), ("embed",))
