from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmjax.core import tree as trees
from mmjax.core.errors import InputError


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    name: str = flax.struct.field(pytree_node=False, default="s")


class Pair(NamedTuple):
    left: object
    right: object


def test_names_of_every_kind_of_node():
    tree = State(step=1, params={"b": [2, (3,)], "a": Pair(4, {7: 5, 8: None})})
    flat = trees.flatten(tree)
    assert flat == {"step": 1, "params/a/left": 4, "params/a/right/7": 5, "params/b/0": 2, "params/b/1/0": 3}
    assert list(flat.values()) == jax.tree.leaves(tree)


def test_optimiser_state_and_back():
    params = {"layers": {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}}
    state = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params)
    flat = trees.flatten(state)
    assert "1/0/mu/layers/w" in flat
    assert "1/0/count" in flat
    assert len(flat) == len(jax.tree.leaves(state)) == 5
    nested = trees.unflatten(flat)
    assert set(nested["1"]["0"]["nu"]["layers"]) == {"w", "b"}
    assert trees.flatten(nested).keys() == flat.keys()


def test_a_bare_leaf_and_nothing():
    assert trees.flatten(3) == {"": 3}
    assert trees.unflatten({"": 3}) == 3
    assert trees.flatten({}) == trees.unflatten({}) == {}


def test_unflatten_does_not_look_into_leaves():
    leaf = {"not": "a folder"}
    assert trees.unflatten({"a": leaf, "b/c": 1}) == {"a": leaf, "b": {"c": 1}}


@pytest.mark.parametrize("tree", [{"a/b": 1}, {"": 1}, {"x": {"": 1}}, {"x": {"/": 1}}])
def test_keys_that_cannot_be_names(tree):
    with pytest.raises(InputError, match="cannot name a leaf"):
        trees.flatten(tree)


def test_two_leaves_with_one_name():
    class Key:
        def __str__(self):
            return "same"

        def __lt__(self, other):
            return id(self) < id(other)

    with pytest.raises(InputError, match="two leaves of the tree are called 'same'"):
        trees.flatten({Key(): 1, Key(): 2})


@pytest.mark.parametrize("names", [["a", "a/b"], ["a/b", "a"], ["a/b", "a/b/c"], ["x/y", "x"]])
def test_a_name_that_is_leaf_and_folder(names):
    with pytest.raises(InputError, match="is a leaf and also the folder"):
        trees.unflatten({name: {} for name in names})


def test_sizes_from_shapes_alone():
    tree = {
        "w": jax.ShapeDtypeStruct((3, 5), jnp.bfloat16),
        "s": jnp.float32(1),
        "e": np.zeros((0, 4)),
        "p": 2.0,
        "k": jax.random.split(jax.random.key(0), 2),
    }
    assert trees.count(tree) == 15 + 1 + 0 + 1 + 2
    assert trees.nbytes(tree) == 30 + 4 + 0 + 8 + 2 * 8


NESTED = {"vision": {"kernel": 1, "bias": 2}, "decoder": {"norm": {"scale": 3}, "bias": 4}, "visions": 5}


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        ((), {}),
        (("vision",), {"vision": {"kernel": 1, "bias": 2}}),
        (("*/bias", "decoder/norm"), {"vision": {"bias": 2}, "decoder": {"norm": {"scale": 3}, "bias": 4}}),
        (("vision", "!vision/bias"), {"vision": {"kernel": 1}}),
        (("!vision", "!*/bias"), {"decoder": {"norm": {"scale": 3}}, "visions": 5}),
        (("!decoder", "decoder/bias", "!visions"), {"vision": {"kernel": 1, "bias": 2}, "decoder": {"bias": 4}}),
    ],
)
def test_choose_by_path_and_merge_again(patterns, chosen):
    found, rest = trees.choose(NESTED, patterns)
    assert found == chosen
    assert trees.flatten(found).keys().isdisjoint(trees.flatten(rest))
    assert trees.merge(found, rest) == trees.merge(rest, found) == NESTED


def test_patterns_that_name_nothing_and_leaves_in_both():
    with pytest.raises(InputError, match=r"'decoder/nrm' names no parameter; did you mean 'decoder/norm'"):
        trees.choose(NESTED, ("decoder/nrm",))
    with pytest.raises(InputError, match=r"'!decoder/nrm' names no parameter; did you mean '!decoder/norm'"):
        trees.choose(NESTED, ("vision", "!decoder/nrm"))
    with pytest.raises(InputError, match="'bias' is in both trees"):
        trees.merge({"a": {"bias": 1}}, {"a": {"bias": 2}})


@pytest.mark.parametrize(
    ("names", "covered"),
    [
        ((), ()),
        (("vision/kernel", "vision/bias"), ("vision",)),
        (("vision/bias", "decoder/norm/scale"), ("vision/bias", "decoder/norm")),
        (("decoder/norm/scale", "decoder/bias"), ("decoder",)),
    ],
)
def test_the_fewest_names_that_hold_leaves(names, covered):
    assert sorted(trees.cover(NESTED, set(names))) == sorted(covered)
    assert trees.flatten(trees.choose(NESTED, covered)[0]).keys() == set(names)
