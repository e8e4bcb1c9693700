"""The Q-Former: who sees whom, packed = alone, meshes, gradients, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import seen
from jax.sharding import PartitionSpec as P
from tiny import randomised

from mmjax.connectors import qformer, qformer_heads
from mmjax.core import meshes
from mmjax.core.errors import InputError
from mmjax.core.meshes import MeshConfig, make_mesh
from mmjax.core.spec import shardings
from mmjax.sequence import intervals

HOST = {
    "contrastive": intervals.qformer_contrastive,
    "generation": intervals.qformer_generation,
    "matching": intervals.qformer_matching,
}
CFG = qformer.Config(6, 8, 2, 3, 2, 12, outputs=5, text=True, vocab=19, positions=6)
ROOM = (9, 8, 3)  # features, tokens and pictures in a row


def packed(counts, room):
    """image and order of rows whose pictures have so many features, or tokens."""
    image = np.full((len(counts), room), -1, np.int32)
    order = image.copy()
    for r, row in enumerate(counts):
        image[r, : sum(row)] = np.repeat(np.arange(len(row)), row)
        order[r, : sum(row)] = np.arange(sum(row))
    return image, order


def rows(patches, words, seed=0, room=ROOM):
    """Random rows as keyword arguments of `encode`."""
    rng = np.random.default_rng(seed)
    image, order = packed(patches, room[0])
    of, label = packed(words, room[1])
    grid = np.zeros((len(patches), room[2], 3), np.int32)
    for r, row in enumerate(patches):
        for k, count in enumerate(row):
            grid[r, k] = (1, count, 1) if count else 0
    text = qformer.Text(rng.integers(0, CFG.vocab, of.shape, dtype=np.int32), of, label)
    features = rng.normal(size=(*image.shape, CFG.inputs)).astype(np.float32)
    out = {"features": features, "image": image, "order": order, "grid": grid, "text": text}
    return jax.tree.map(jnp.asarray, out)


@functools.cache
def params():
    return randomised(qformer.spec(CFG))


@functools.partial(jax.jit, static_argnums=(2, 3))
def encode(params, row, pattern="matching", cfg=CFG):
    row = dict(row)
    return qformer.encode(params, row.pop("features"), cfg, **row, pattern=pattern)


# ---------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize("pattern", HOST)
def test_labels_are_the_hosts(pattern):
    """Every row's mask is the host's, picture by picture, on the diagonal, and nothing beside it."""
    q, (p, t, n) = 3, (20, 14, 4)
    labels = jax.jit(lambda grid, text: qformer.labels(grid, q, text, pattern))
    looks = jax.jit(lambda image, order: qformer.looks(image, order, n, q))
    for seed in range(20):
        rng = np.random.default_rng(seed)
        patches, words = rng.integers(0, 6, (2, rng.integers(0, n + 1))), rng.integers(0, 4, (2, n))
        row = rows(patches.tolist(), words.tolist(), seed, (p, t, n))
        mask = seen(*labels(row["grid"], row["text"]))
        lo, hi = looks(row["image"], row["order"])
        look = seen(row["order"], lo, hi)
        for r in range(2):
            want, at = np.zeros((n * q + t, n * q + t), bool), n * q
            for k in range(n):
                count = patches[r][k] if k < patches.shape[1] else 0
                mine = np.r_[np.arange(k * q, (k + 1) * q), np.arange(at, at + words[r][k])]
                host = seen(np.arange(len(mine))[None], *(x[None] for x in HOST[pattern](q, int(words[r][k]))))[0]
                exists = np.repeat([count > 0, True], [q, words[r][k]])
                want[np.ix_(mine, mine)] = host & exists[None] & exists[:, None]
                at += words[r][k]
                sees = np.isin(np.arange(p), np.arange(sum(patches[r][:k]), sum(patches[r][:k]) + count))
                np.testing.assert_array_equal(look[r, k * q : (k + 1) * q], np.tile(sees, (q, 1)))
            np.testing.assert_array_equal(mask[r], want)


def test_labels_are_those_of_the_drawing():
    row = rows([[3, 1]], [[2, 1]], room=(5, 4, 2))
    order, lo, hi = qformer.labels(row["grid"], 2, row["text"], "generation")
    np.testing.assert_array_equal(order[0], [0, 1, 4, 5, 2, 3, 6, -1])
    np.testing.assert_array_equal(lo[0], [0, 0, 4, 4, 0, 0, 4, 0])
    np.testing.assert_array_equal(hi[0], [1, 1, 5, 5, 2, 3, 6, -1])
    order, lo, hi = qformer.labels(row["grid"], 2)
    np.testing.assert_array_equal([order[0], lo[0], hi[0]], [[0, 1, 2, 3], [0, 0, 2, 2], [1, 1, 3, 3]])


def test_a_class_token_and_pruned_features_belong_to_their_picture():
    """The grid does not count the class token, and labels of what was pruned are missing."""
    image, order = jnp.array([[0, 0, 0, 1, 1, -1]], jnp.int32), jnp.array([[0, 2, 4, 6, 7, -1]], jnp.int32)
    lo, hi = qformer.looks(image, order, 3, 1)
    mask = seen(order, lo, hi)[0].astype(int)
    np.testing.assert_array_equal(mask, [[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0], [0] * 6])


# ----------------------------------------------------------------------------------------------- packed = alone


@pytest.mark.parametrize("pattern", HOST)
def test_packed_equals_alone(pattern):
    patches, words = [[4, 1, 3], [5]], [[3, 0, 5], [2]]
    row = rows(patches, words)
    together = encode(params(), row, pattern)
    for r, k in ((0, 0), (0, 1), (0, 2), (1, 0)):
        start, at = sum(patches[r][:k]), sum(words[r][:k])
        alone = rows([[patches[r][k]], []], [[words[r][k]], []])
        of = row["features"][r, start : start + patches[r][k]]
        alone["features"] = alone["features"].at[0, : len(of)].set(of)
        tokens = alone["text"].tokens.at[0, : words[r][k]].set(row["text"].tokens[r, at : at + words[r][k]])
        one = encode(params(), alone | {"text": alone["text"].replace(tokens=tokens)}, pattern)
        np.testing.assert_allclose(together.queries[r, 2 * k : 2 * k + 2], one.queries[0, :2], atol=2e-6)
        np.testing.assert_allclose(together.text[r, at : at + words[r][k]], one.text[0, : words[r][k]], atol=2e-6)


def changed(row, feature=None, token=None):
    features, tokens = row["features"], row["text"].tokens
    if feature is not None:
        features = features.at[0, feature].add(1.0)
    if token is not None:
        tokens = tokens.at[0, token].set((tokens[0, token] + 1) % CFG.vocab)
    return row | {"features": features, "text": row["text"].replace(tokens=tokens)}


def differs(a, b):
    """Which queries and which tokens of text of the first row are not the same, bit for bit."""
    return [
        np.any(np.asarray(x)[0] != np.asarray(y)[0], -1).tolist() for x, y in ((a.queries, b.queries), (a.text, b.text))
    ]


@pytest.mark.parametrize("pattern", HOST)
def test_nothing_reaches_another_picture(pattern):
    row = rows([[4, 2], [5]], [[3, 2], [2]])
    before = encode(params(), row, pattern)
    queries, text = differs(before, encode(params(), changed(row, feature=2), pattern))
    assert queries == [True] * 2 + [False] * 4
    assert text == [pattern != "contrastive"] * 3 + [False] * 5
    queries, text = differs(before, encode(params(), changed(row, token=1), pattern))
    assert queries == [pattern == "matching"] * 2 + [False] * 4
    assert text == [pattern != "generation", True, True] + [False] * 5
    queries, text = differs(before, encode(params(), changed(row, feature=7, token=6), pattern))
    assert not any(queries)
    assert text == [False] * 6 + [True, False]  # an empty place sees nothing, and nothing sees it


def test_text_alone_is_text_apart():
    row = rows([[4, 0, 2], []], [[3, 2, 3], [1, 4]])
    alone = jax.jit(lambda p, text: qformer.encode_text(p, text, CFG, pictures=3))(params(), row["text"])
    assert alone.queries is None
    some = np.asarray(row["text"].order) >= 0
    apart = encode(params(), row, "contrastive").text
    np.testing.assert_allclose(np.asarray(apart)[some], np.asarray(alone.text)[some], atol=2e-6)
    # Where there is no picture, text has nothing but itself and what it said.
    mixed = encode(params(), row, "matching").text
    np.testing.assert_allclose(mixed[1, :5], alone.text[1, :5], atol=2e-6)
    assert np.abs(mixed[0, :3] - alone.text[0, :3]).max() > 1e-2


def test_apply_projects_queries_that_saw_the_text():
    row = dict(rows([[4, 2], []], [[3, 2], []]))
    found = encode(params(), row).queries
    features = row.pop("features")
    out = jax.jit(lambda p: qformer.apply(p, features, CFG, **row))(params())
    assert out.shape == (2, ROOM[2] * CFG.queries, CFG.outputs)
    p = params()["projection"]
    np.testing.assert_allclose(out, np.asarray(found) @ np.asarray(p["kernel"]) + np.asarray(p["bias"]), atol=2e-6)
    assert CFG.tokens((1, 4, 1)) == CFG.queries


# ------------------------------------------------------------------------------------------- gradients and meshes


def loss(params, row):
    found = encode(params, row, "generation")
    return jnp.sum(jnp.square(found.queries[:, :2])) + jnp.sum(found.text[:, :2] ** 3)


gradient = jax.jit(jax.value_and_grad(loss))


def test_gradients_are_finite_where_rows_are_empty_and_features_extreme():
    row = rows([[4, 2], []], [[3, 2], []])
    row["features"] = row["features"].at[0, :2].multiply(1e15).at[0, 2:4].set(0.0)
    value, grads = gradient(params(), row)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    # Every layer, and every look at the picture, the last group's as well, has a part in it.
    for kernel in (
        grads["cross"]["v"]["kernel"],
        *(grads["layers"][n]["up"]["kernel"] for n in ("query_mlp", "text_mlp")),
    ):
        assert (np.abs(kernel).reshape(len(kernel), -1).max(1) > 0).all()


def test_a_text_longer_than_the_table_of_positions_is_nan():
    for words, finite in (([6, 2], True), ([7], False)):
        assert np.isfinite(encode(params(), rows([[4], []], [words, []])).text[0, 0]).all() == finite


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["auto", "explicit", "shard_map"])
def test_meshes_agree(kind):
    row = rows([[4, 2], [5], [1, 1, 1], [9]], [[3, 2], [2], [0, 4, 1], []])
    want, grads = jax.jit(jax.value_and_grad(loss))(params(), row)
    mesh = make_mesh(MeshConfig(2, 1, 2, explicit=kind == "explicit"), jax.devices()[:4])
    with jax.set_mesh(mesh):
        if kind == "shard_map":

            def local(params, row):
                return jax.tree.map(lambda x: jax.lax.psum(x, "data"), loss(params, row))

            f = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
            got, found = jax.jit(jax.value_and_grad(f))(params(), row)
        else:
            placed = jax.device_put(params(), shardings(qformer.spec(CFG), mesh, meshes.Rules()))
            data = jax.device_put(row, jax.sharding.NamedSharding(mesh, P(("data", "fsdp"))))
            got, found = jax.jit(jax.value_and_grad(loss))(placed, data)
            text = data["text"]
            bare = {k: data[k] for k in ("image", "order", "grid")}
            # Without text, and text alone, are other programs: here it is enough that they are understood.
            jax.jit(lambda p: qformer.apply(p, data["features"], CFG, **bare)).lower(placed)
            jax.jit(lambda p: qformer.encode_text(p, text, CFG, pictures=3)).lower(placed)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * (1 + np.abs(b).max()))


@pytest.mark.slow
def test_vmap_and_remat():
    both = jax.tree.map(lambda *x: jnp.stack(x), *(rows([[4, 2], []], [[3, 2], []], seed) for seed in (1, 2)))
    mapped = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss)), (None, 0)))(params(), both)
    for i in range(2):
        one = gradient(params(), jax.tree.map(lambda x, i=i: x[i], both))[1]
        for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(a[i], b, atol=1e-5 * (1 + np.abs(b).max()))


# ------------------------------------------------------------------------------------------------ heads, refusals


def test_heads():
    cfg = qformer_heads.Config(8, 4, 19)
    p = randomised(qformer_heads.spec(cfg))
    row = rows([[4, 0, 2], []], [[3, 0, 2], []])
    at = qformer_heads.first(row["text"], 3)
    np.testing.assert_array_equal(at, [[0, -1, 3], [-1, -1, -1]])
    found = encode(params(), row)
    vision = qformer_heads.contrast_vision(p, found.queries, cfg)
    text = qformer_heads.contrast_text(p, found.text, cfg, at=at)
    assert vision.shape == (2, 6, 4)
    for x in (vision, text):
        np.testing.assert_allclose(jnp.linalg.norm(x, axis=-1), 1.0, atol=1e-6)
    direct = np.asarray(found.text[0, 3]) @ np.asarray(p["text"]["kernel"]) + np.asarray(p["text"]["bias"])
    np.testing.assert_allclose(text[0, 2], direct / np.linalg.norm(direct), atol=1e-6)
    logits = qformer_heads.match(p, found.queries, cfg, pictures=3)
    each = np.asarray(found.queries) @ np.asarray(p["match"]["kernel"]) + np.asarray(p["match"]["bias"])
    np.testing.assert_allclose(logits[0, 2], each[0, 4:].mean(0), atol=1e-6)
    words = qformer_heads.language(p, found.text, params()["words"], cfg)
    assert (words.shape, words.dtype) == ((2, ROOM[1], 19), jnp.float32)


def test_a_zero_vector_has_a_place_in_the_common_space():
    cfg = qformer_heads.Config(8, 4)
    p = jax.tree.map(jnp.zeros_like, randomised(qformer_heads.spec(cfg)))
    value, grad = jax.value_and_grad(lambda x: qformer_heads.contrast_vision(p, x, cfg).sum())(jnp.ones((1, 2, 8)))
    assert value == 0
    assert np.isfinite(grad).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"heads": 3}, "does not divide into 3 heads"),
        ({"text": False}, "needs MLPs for text"),
        ({"cross_every": 0}, "cross_every is 0"),
    ],
)
def test_refuses_configs(changes, said):
    with pytest.raises(InputError, match=said):
        dataclasses.replace(CFG, **changes)


def test_refuses_what_does_not_fit_the_config():
    row = dict(rows([[4, 2]], [[3, 2]]))
    features, text = row.pop("features"), row.pop("text")
    given = jnp.zeros((2, 8))
    with pytest.raises(InputError, match="and not both"):
        qformer.encode(params(), features, CFG, **row, queries=given)
    bare = dataclasses.replace(CFG, queries=None, text=False, vocab=None)
    with pytest.raises(InputError, match="of its own or handed over"):
        qformer.encode(params(), features, bare, **row)
    with pytest.raises(InputError, match="no queries of its own"):
        bare.tokens((1, 2, 3))
    with pytest.raises(InputError, match="leave the text out"):
        qformer.encode(params(), features, bare, **row, text=text, queries=given)
    embedded = dataclasses.replace(bare, text=True)
    with pytest.raises(InputError, match=r"takes embeddings \[B, T, 8\]"):
        qformer.encode(params(), features, embedded, **row, text=text, queries=given)
