"""Weight tables: there and back bit for bit, joins and layers, refusals that list everything, sharded loading."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.convert import lazily, rules
from mmjax.convert.rules import Arrays, Rule
from mmjax.core import spec as specs
from mmjax.core import tree
from mmjax.core.errors import InputError
from mmjax.core.meshes import MeshConfig, Rules, make_mesh
from mmjax.core.spec import ParamSpec

D, H, E, L = 8, 4, 2, 3


def param(*shape, axes=None):
    return ParamSpec(shape, axes or (None,) * len(shape))


def attention_spec():
    qkv = {name: {"kernel": param(D, H, E, axes=("embed", "heads", None)), "bias": param(H, E)} for name in "qkv"}
    layer = qkv | {
        "out": {"kernel": param(H, E, D, axes=("heads", None, "embed"))},
        "norm": {"scale": param(D)},
    }
    return {"blocks": specs.stack(layer, L), "patch": {"kernel": param(2 * 2 * 3, D, axes=(None, "embed"))}}


TABLE = [
    *(Rule(f"blocks/{n}/kernel", "layers.{}.qkv.weight", rules.linear(), join=0) for n in "qkv"),
    *(Rule(f"blocks/{n}/bias", "layers.{}.qkv.bias", rules.vector, join=0) for n in "qkv"),
    Rule("blocks/out/kernel", "layers.{}.out.weight", rules.linear(2)),
    Rule("blocks/norm/scale", "layers.{}.norm.weight"),
    Rule("patch/kernel", "patch.weight", rules.patches(2)),
]


def theirs(rng, dtype=np.float32):
    shapes = rules.plan(attention_spec(), TABLE).tensors
    return {key: rng.normal(size=shape).astype(dtype) for key, shape in shapes.items()}


def same(a, b):
    """Equal to the bit, also where a number is none."""
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def test_known_values(rng):
    given = theirs(rng)
    ours = jax.tree.map(np.asarray, rules.load(attention_spec(), TABLE, Arrays(given)))
    x = rng.normal(size=(5, D)).astype(np.float32)
    for i in range(L):
        q, k, v = np.split(x @ given[f"layers.{i}.qkv.weight"].T + given[f"layers.{i}.qkv.bias"], 3, axis=-1)
        for name, wanted in (("q", q), ("k", k), ("v", v)):
            got = np.einsum("ld,dhe->lhe", x, ours["blocks"][name]["kernel"][i]) + ours["blocks"][name]["bias"][i]
            np.testing.assert_allclose(got.reshape(5, -1), wanted, rtol=1e-5, atol=1e-5)
        y = rng.normal(size=(5, H, E)).astype(np.float32)
        np.testing.assert_allclose(
            np.einsum("lhe,hed->ld", y, ours["blocks"]["out"]["kernel"][i]),
            y.reshape(5, -1) @ given[f"layers.{i}.out.weight"].T,
            rtol=1e-5,
            atol=1e-5,
        )
        np.testing.assert_array_equal(ours["blocks"]["norm"]["scale"][i], given[f"layers.{i}.norm.weight"])
    # A patch is rows, columns, colours; theirs is a convolution with colours first.
    picture = rng.normal(size=(2, 2, 3)).astype(np.float32)
    np.testing.assert_allclose(
        picture.reshape(-1) @ ours["patch"]["kernel"],
        np.einsum("ocyx,yxc->o", given["patch.weight"], picture),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn"])
def test_there_and_back_keeps_every_bit(rng, dtype):
    noise = rng.integers(0, 256, 4096, np.uint8)  # every pattern of bits: NaN with payloads, −0, subnormal numbers

    def some(shape):
        size = math.prod(shape) * jnp.dtype(dtype).itemsize
        return np.resize(noise, size).view(jnp.dtype(dtype)).reshape(shape)

    given = {key: some(shape) for key, shape in rules.plan(attention_spec(), TABLE).tensors.items()}
    params = rules.load(attention_spec(), TABLE, Arrays(given))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    back = rules.save(attention_spec(), TABLE, params)
    assert back.keys() == given.keys()
    assert all(same(back[key], given[key]) for key in given)
    some = ["layers.1.qkv.weight", "patch.weight"]
    part = rules.save(attention_spec(), TABLE, params, some)
    assert sorted(part) == some
    assert all(same(part[key], given[key]) for key in some)


sizes = st.integers(1, 4)
LAYOUTS = st.one_of(
    st.tuples(st.just("same"), st.lists(sizes, max_size=4)),
    st.tuples(st.just("vector"), st.lists(sizes, min_size=1, max_size=3)),
    st.tuples(st.just("scalar"), st.just([1])),
    st.tuples(st.just("ones"), st.lists(sizes, max_size=3)),
    st.tuples(st.just("linear1"), st.lists(sizes, min_size=2, max_size=4)),
    st.tuples(st.just("linear2"), st.lists(sizes, min_size=3, max_size=4)),
    st.tuples(st.just("convolution"), st.lists(sizes, min_size=4, max_size=4)),
    st.tuples(st.just("patches"), sizes.map(lambda n: [2 * 2 * 3, n])),
    st.tuples(st.just("clips"), sizes.map(lambda n: [2 * 2 * 2 * 3, n])),
)
BY_NAME = {
    "same": rules.same,
    "vector": rules.vector,
    "scalar": rules.scalar,
    "ones": rules.ones(2),
    "linear1": rules.linear(),
    "linear2": rules.linear(2),
    "convolution": rules.convolution,
    "patches": rules.patches(2),
    "clips": rules.clips(2, 2),
}


ONE = st.tuples(
    LAYOUTS, st.integers(0, 3), st.permutations(range(5)), st.booleans(), st.integers(0, 3), st.integers(0, 3)
)


def table_of(drawn) -> tuple[dict, list[Rule]]:
    """A spec and a table of every layout, alone, over layers (in any order of numbers), and joined along any axis."""
    spec, table = {}, []
    for n, ((name, shape), layers, numbers, numbered, join, parts) in enumerate(drawn):
        layout = BY_NAME[name]
        axes = len(layout(tuple(shape))[0])
        join = join % axes if parts and axes else None
        for part in range(1 if join is None else parts):
            spec[f"leaf{n}_{part}"] = param(*([layers] if layers else []), *shape)
            key = f"t{n}" + (".{}" if layers else "")
            table.append(Rule(f"leaf{n}_{part}", key, layout, join, numbers[:layers] if layers and numbered else None))
    return spec, table


@settings(max_examples=60, deadline=None)
@given(st.lists(ONE, min_size=1, max_size=4), st.integers(0, 2**31))
def test_any_table_is_a_bijection(drawn, seed):
    spec, table = table_of(drawn)
    rng = np.random.default_rng(seed)
    given = {k: rng.normal(size=s).astype(np.float32) for k, s in rules.plan(spec, table).tensors.items()}
    params = rules.load(spec, table, Arrays(given))
    assert {k: x.shape for k, x in params.items()} == {k: p.shape for k, p in spec.items()}
    back = rules.save(spec, table, params)
    assert back.keys() == given.keys()
    assert all(same(back[key], given[key]) for key in given)
    assert sum(x.size for x in params.values()) == sum(x.size for x in given.values())


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ([Rule("a", "x")], "lacks .'b'."),
        ([Rule("a", "x"), Rule("b", "y"), Rule("c", "z")], "in vain .'c'."),
        ([Rule("a", "x"), Rule("a", "y"), Rule("b", "z")], "twice .'a'."),
        ([Rule("a", "x"), Rule("b", "x")], "do not say along which axis"),
        ([Rule("a", "x", join=0), Rule("b", "x")], "do not say along which axis"),
        ([Rule("a", "x"), Rule("b", "x", join=0)], "do not say along which axis"),
        ([Rule("a", "x", join=0), Rule("b", "x", join=1)], "do not say along which axis"),
        ([Rule("a", "x", join=0), Rule("b", "x", join=0)], "cannot join"),
        ([Rule("a", "x.{}", layers=[0]), Rule("b", "y")], "names 1 layers of 2"),
        ([Rule("a", "x.{}", layers=[1, 1]), Rule("b", "y")], "do not say along which axis"),
    ],
)
def test_mistakes_in_tables_are_found(table, says):
    with pytest.raises(ValueError, match=says) as caught:
        rules.plan({"a": param(2, 3), "b": param(2, 4)}, table)
    assert not isinstance(caught.value, InputError)


class Counting(Arrays):
    """A source that remembers what was read."""

    def read(self, key):
        self.arrays["log"].append(key)
        return super().read(key)

    def shapes(self):
        return {k: x.shape for k, x in self.arrays.items() if k != "log"}

    def dtypes(self):
        return {k: x.dtype for k, x in self.arrays.items() if k != "log"}


def refused(source, says, **options):
    source = Counting(source | {"log": []}, "dir")
    with pytest.raises(InputError, match=says) as caught:
        rules.load(attention_spec(), TABLE, source, **options)
    assert "\n" not in str(caught.value)
    assert source.arrays["log"] == [], "read before it was refused"
    return str(caught.value)


def test_missing_surplus_and_misshaped_are_all_listed_before_anything_is_read(rng):
    given = theirs(rng)
    given["head.weight"] = given.pop("layers.1.out.weight")
    given["layers.2.norm.weight"] = np.zeros(D + 1, np.float32)
    given["patch.weight"] = given["patch.weight"].reshape(D, -1)
    said = refused(given, "dir are not those of its config")
    assert "1 missing (layers.1.out.weight)" in said
    assert "1 surplus (head.weight)" in said
    assert "2 of another shape (layers.2.norm.weight is [9] and not [8], patch.weight is [8, 12] and not [8, 3" in said


def test_long_lists_are_cut(rng):
    said = refused(theirs(rng) | {f"extra.{i:03d}": np.zeros(1) for i in range(100)}, "100 surplus")
    assert "extra.019, …)" in said
    assert "extra.020" not in said


def test_dropped_tensors_are_no_surplus(rng):
    extra = {"layers.0.position_ids": np.arange(4), "other": np.zeros(1)}
    drop = {r".*\.position_ids": "positions 0, 1, 2 …"}
    refused(theirs(rng) | extra, re.escape("1 surplus (other)"), drop=drop)
    del extra["other"]
    rules.load(attention_spec(), TABLE, Arrays(theirs(rng) | extra), drop=drop)
    assert rules.dropped(["layers.0.position_ids", "position_ids"], drop) == {
        "layers.0.position_ids": "positions 0, 1, 2 …"
    }


def test_formats_that_are_none_of_parameters_are_refused(rng):
    given = theirs(rng)
    refused(given | {"patch.weight": given["patch.weight"].astype(np.int8)}, "patch.weight in dir holds int8 where")
    refused(given | {"patch.weight": given["patch.weight"].astype(np.float64)}, "float64, which JAX would cut")
    half = given | {"layers.1.norm.weight": given["layers.1.norm.weight"].astype(np.float16)}
    refused(half, "layers of blocks/norm/scale in dir have several number formats .float32, float16 in layers.1")
    refused(given, "cannot be int32", dtype="int32")
    for source in (half, given | {"patch.weight": given["patch.weight"].astype(np.float64)}):
        params = rules.load(attention_spec(), TABLE, Arrays(source), dtype="bfloat16")
        assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def test_leaves_may_differ_in_format(rng):
    given = theirs(rng, jnp.bfloat16) | {f"layers.{i}.norm.weight": np.full(D, i, np.float32) for i in range(L)}
    params = rules.load(attention_spec(), TABLE, Arrays(given))
    assert params["blocks"]["norm"]["scale"].dtype == np.float32
    assert all(same(x, given[k]) for k, x in rules.save(attention_spec(), TABLE, params).items())


def test_saving_refuses_other_parameters(rng):
    params = rules.load(attention_spec(), TABLE, Arrays(theirs(rng)))
    with pytest.raises(InputError, match="more"):
        rules.save(attention_spec(), TABLE, params | {"more": np.zeros(1)})
    with pytest.raises(InputError, match="patch/kernel"):
        rules.save(attention_spec(), TABLE, params | {"patch": {"kernel": np.zeros((1, D))}})
    blocks = params["blocks"] | {"k": jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["blocks"]["k"])}
    with pytest.raises(InputError, match=r"layers.0.qkv.weight is made of float32 and bfloat16 .blocks/k/kernel"):
        rules.save(attention_spec(), TABLE, params | {"blocks": blocks})


def test_a_source_s_arrays_are_not_shared(rng):
    given = theirs(rng)
    params = rules.load(attention_spec(), TABLE, Arrays(given))
    before = jax.tree.map(np.array, params)
    for x in given.values():
        x[...] = 0
    assert all(jax.tree.leaves(jax.tree.map(same, params, before)))


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (1, 1, 4), (8, 1, 1)])
def test_sharded_loading_reads_every_tensor_once(rng, sizes, explicit):
    given = theirs(rng)
    mesh = make_mesh(MeshConfig(*sizes, explicit=explicit), jax.devices()[: math.prod(sizes)])
    shardings = specs.shardings(attention_spec(), mesh, Rules())
    source = Counting(given | {"log": []})
    params = rules.load(attention_spec(), TABLE, source, shardings=shardings)
    assert jax.tree.map(lambda x: x.sharding, params) == shardings
    whole = rules.load(attention_spec(), TABLE, Arrays(given))
    assert all(jax.tree.leaves(jax.tree.map(same, params, whole)))
    kernel = params["blocks"]["q"]["kernel"]
    parts = math.prod(sizes[i] for i, axis in ((1, D), (2, H)) if axis % sizes[i] == 0)
    assert {s.data.size for s in kernel.addressable_shards} == {kernel.size // parts}
    # q, k and v are three leaves in one tensor.
    assert all(source.arrays["log"].count(key) == (3 if "qkv" in key else 1) for key in given)
    assert all(same(x, given[k]) for k, x in rules.save(attention_spec(), TABLE, params).items())


def test_layers_may_be_sharded_too(rng):
    """Whoever gives shardings may cut the layers: every device then gets its own."""
    spec, table = {"w": param(4, 2, 3)}, [Rule("w", "w.{}", rules.linear())]
    given = {f"w.{i}": rng.normal(size=(3, 2)).astype(np.float32) for i in range(4)}
    mesh = jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    params = rules.load(spec, table, Arrays(given), shardings={"w": sharding})
    assert {s.data.shape for s in params["w"].addressable_shards} == {(2, 1, 3)}
    np.testing.assert_array_equal(params["w"], np.stack([given[f"w.{i}"].T for i in range(4)]))


def test_a_table_may_be_in_two_pieces(rng):
    """Rows of one leaf in several tensors: as Idefics has the tokens that were added to its vocabulary."""
    names = ("weight", "more.weight")
    spec, table = {"w": param(4, 3)}, [Rule("w", "embed.{}", layers=names, rows=(3, 1))]
    given = {f"embed.{n}": rng.normal(size=(r, 3)).astype(np.float32) for n, r in zip(names, (3, 1), strict=True)}
    whole = np.concatenate(list(given.values()))
    mesh = jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a"))
    for how in (None, {"w": sharding}):
        params = rules.load(spec, table, Arrays(given), shardings=how)
        np.testing.assert_array_equal(params["w"], whole)
        assert all(same(x, given[k]) for k, x in rules.save(spec, table, params).items())
    lazy = lazily.load(spec, table, Arrays(given))
    np.testing.assert_array_equal(np.asarray(lazy["w"]), whole)
    assert all(same(x, given[k]) for k, x in rules.save(spec, table, lazy).items())
    with pytest.raises(ValueError, match=r"names \(3, 2\) of 4 rows"):
        rules.plan(spec, [Rule("w", "embed.{}", layers=names, rows=(3, 2))])


def test_a_stack_may_have_no_layers():
    spec, table = {"w": param(0, 2, 3)}, [Rule("w", "w.{}", rules.linear())]
    assert rules.load(spec, table, Arrays({}))["w"].shape == (0, 2, 3)
    assert rules.save(spec, table, {"w": np.zeros((0, 2, 3))}) == {}


def test_integer_leaves_keep_their_format(rng):
    spec, table = {"n": ParamSpec((3,), (None,), dtype="int32"), "w": param(3)}, [Rule("n", "n"), Rule("w", "w")]
    given = {"n": np.arange(3, dtype=np.int32), "w": rng.normal(size=3).astype(np.float32)}
    params = rules.load(spec, table, Arrays(given), dtype="bfloat16")
    assert {k: x.dtype.name for k, x in params.items()} == {"n": "int32", "w": "bfloat16"}


def test_the_table_names_the_tree(rng):
    params = rules.load(attention_spec(), TABLE, Arrays(theirs(rng)))
    assert tree.flatten(params).keys() == tree.flatten(attention_spec()).keys()
