"""Perceiver IO written out in NumPy: packed texts and pictures, learned and given queries, refusals, meshes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from everywhere import everywhere
from tiny import randomised

from mmjax.connectors import perceiver_io
from mmjax.connectors.perceiver_io import Config, Fourier
from mmjax.connectors.perceiver_layer import Config as Layer
from mmjax.core.errors import InputError

LATENT = Layer(8, None, 2, 4, 8, 12)
TEXT = Config(
    3,
    encoder=Layer(8, 6, 2, 6, 8, 16, residual=False),
    layer=LATENT,
    layers=2,
    blocks=2,
    decoder=Layer(6, 8, 1, 8, 6, 6, residual=False),
    vocab=11,
    positions=5,
    queries=5,
    by_input=True,
    tied=True,
)
PICTURES = Config(
    3,
    encoder=Layer(8, 3 + 14, 1, 17, 17, 8),
    layer=LATENT,
    layers=1,
    blocks=3,
    decoder=Layer(8, 8, 1, 8, 8, 8),
    fourier=Fourier(3, (6, 8)),
    queries=2,
    outputs=5,
)
ASKED = Config(
    3, Layer(8, 4, 1, 6, 6, 8, bias=False, gated=True), LATENT, 1, decoder=Layer(7, 8, 1, 6, 6, 0, residual=False)
)
CASES = {"text": TEXT, "pictures": PICTURES, "asked": ASKED}
GRIDS = {"text": [(1, 1, 4), (1, 1, 1), (1, 1, 5)], "pictures": [(1, 2, 3), (1, 1, 1), (1, 3, 1)]}
ASKS = [1, 0, -1, 2, 1]


def pack(examples, grids, room, number):
    count = [len(x) for x in examples]
    spare = room - sum(count)
    places = {
        "image": [*np.repeat(np.arange(len(count)), count), *[-1] * spare],
        "order": [*range(sum(count)), *[-1] * spare],
        "grid": [*grids, *[(0, 0, 0)] * (number - len(count))],
    }
    x = np.concatenate([*examples, np.ones((spare, *examples[0].shape[1:]), examples[0].dtype)])
    return jnp.asarray(x[None]), {k: jnp.asarray([v], jnp.int32) for k, v in places.items()}


def row(name, rng):
    """Examples, and one row of them: (x, places), with queries in places where the caller gives them."""
    grids = GRIDS.get(name, GRIDS["text"])
    width = {"text": (), "pictures": (3,), "asked": (4,)}[name]
    examples = [rng.normal(size=(math.prod(g), *width)).astype(np.float32) for g in grids]
    if name == "text":
        examples = [rng.integers(0, 11, math.prod(g)).astype(np.int32) for g in grids]
    x, places = pack(examples, grids, 12, 4)
    if name == "asked":
        queries = rng.normal(size=(1, len(ASKS), 7)).astype(np.float32)
        places["queries"] = jnp.asarray(queries), jnp.asarray([ASKS], jnp.int32)
    return examples, grids, x, places


def attend(p, x, cfg, inputs=None):
    def norm(p, x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.epsilon) * p["scale"] + p["bias"]

    def gelu(a):
        return 0.5 * a * (1 + np.vectorize(math.erf)(a / 2**0.5))

    h = norm(p["norm"], x)
    seen = h if inputs is None else norm(p["input_norm"], inputs)
    q, k, v = (
        np.einsum("ld,dhe->hle", y, p[n]["kernel"]) + p[n].get("bias", np.zeros((cfg.heads, 1)))[:, None]
        for y, n in ((h, "q"), (seen, "k"), (seen, "v"))
    )
    score = np.exp(q @ k.transpose(0, 2, 1) / q.shape[-1] ** 0.5)
    y = np.einsum("hle,hed->ld", score / score.sum(-1, keepdims=True) @ v, p["out"]["kernel"]) + p["out"]["bias"]
    x = x + y if cfg.residual else y
    if not cfg.hidden:
        return x
    h, mlp = norm(p["mlp_norm"], x), p["mlp"]
    up = h @ mlp["up"]["kernel"] + mlp["up"]["bias"]
    up = gelu(h @ mlp["gate"]["kernel"] + mlp["gate"]["bias"]) * up if cfg.gated else gelu(up)
    return x + up @ mlp["down"]["kernel"] + mlp["down"]["bias"]


def written_out(params, x, grid, cfg, queries):
    """The answers of one example, in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    if cfg.vocab:
        x = p["embed"][x] + p["positions"][: len(x)]
    if cfg.fourier:
        # The places of each axis from -1 to 1, and sines and cosines of 1 to (size / 2) half turns.
        axes = [np.linspace(-1, 1, n) for n in grid[1:]]
        at = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
        turns = [at[:, i, None] * np.linspace(1, size / 2, 3) for i, size in enumerate((6, 8))]
        x = np.concatenate([x, at, *(np.sin(np.pi * t) for t in turns), *(np.cos(np.pi * t) for t in turns)], -1)
    z = attend(p["encoder"], p["latents"], cfg.encoder, x)
    for _ in range(cfg.blocks):
        for i in range(cfg.layers):
            z = attend(jax.tree.map(lambda a, i=i: a[i], p["layers"]), z, cfg.layer)
    if cfg.decoder is None:
        return z
    if queries is None:
        queries = p["queries"][: len(x)] if cfg.by_input else p["queries"]
    y = attend(p["decoder"], queries.astype(np.float64), cfg.decoder, z)
    if cfg.outputs:
        return y @ p["out"]["kernel"] + p["out"]["bias"]
    return y @ p["embed"].T + p["head_bias"] if cfg.tied else y


def places_of(name, i):
    """Where the answers of example i are in a packed row."""
    if name == "asked":
        return np.flatnonzero(np.array(ASKS) == i)
    count = [math.prod(g) for g in GRIDS["text"]] if name == "text" else [2] * 3
    return np.arange(sum(count[:i]), sum(count[: i + 1]))


@pytest.mark.parametrize("name", CASES)
def test_packed_examples_against_the_formulas(rng, name):
    cfg = CASES[name]
    params = randomised(perceiver_io.spec(cfg))
    examples, grids, x, places = row(name, rng)
    call = jax.jit(lambda p, x, places: perceiver_io.apply(p, x, cfg, **places))
    got = call(params, x, places)
    assert np.isfinite(got).all()
    for i, example in enumerate(examples):
        at = places_of(name, i)
        queries = np.array(places["queries"][0])[0, at] if name == "asked" else None
        expected = written_out(params, example, grids[i], cfg, queries)
        np.testing.assert_allclose(got[0, at], expected, atol=1e-5 * np.abs(expected).max())
        assert name == "asked" or cfg.tokens(grids[i]) == len(at)
    if name == "pictures":
        # The last example in a row of its own, without any empty place.
        own, alone = pack(examples[2:], grids[2:], len(examples[2]), 1)
        alone = call(params, own, alone)[0]
        np.testing.assert_allclose(alone, got[0, places_of(name, 2)], atol=1e-5 * np.abs(alone).max())


@pytest.mark.parametrize("name", ["pictures", "asked"])
def test_gradients_stay_within_an_example_and_are_finite(rng, name):
    """Also of huge and constant inputs, and in a row that is empty."""
    cfg = CASES[name]
    params = randomised(perceiver_io.spec(cfg))
    _, grids, x, places = row(name, rng)
    count = [math.prod(g) for g in grids]
    first, second = count[0], count[0] + count[1]
    x = x.at[:, :first].multiply(1e6).at[:, second : sum(count)].set(1.0)
    empty = {k: jax.tree.map(jnp.zeros_like, v) for k, v in places.items()}
    empty |= {k: jnp.full_like(places[k], -1) for k in ("image", "order")}
    if name == "asked":
        empty["queries"] = places["queries"][0], jnp.full((1, len(ASKS)), -1, jnp.int32)
    x, places = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), (x, places), (x, empty))
    at = places_of(name, 1)

    @jax.jit
    def gradient(params, x):
        return jax.grad(lambda p, x: perceiver_io.apply(p, x, cfg, **places)[:, at].sum(), (0, 1))(params, x)

    of_params, of_x = gradient(params, x)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(of_params))
    assert np.abs(of_x[0, first:second]).max() > 0
    assert not np.any(of_x[0, :first])
    assert not np.any(of_x[0, second:])
    assert not np.any(of_x[1])


def test_without_a_decoder_the_latents_come_out(rng):
    cfg = dataclasses.replace(ASKED, decoder=None)
    params = randomised(perceiver_io.spec(cfg))
    examples, grids, x, places = row("asked", rng)
    queries = places.pop("queries")
    z = jax.jit(lambda p: perceiver_io.apply(p, x, cfg, **places))(params)
    assert z.shape == (1, 12, 8)
    for i, example in enumerate(examples):
        expected = written_out(params, example, grids[i], cfg, None)
        np.testing.assert_allclose(z[0, 3 * i : 3 * i + 3], expected, atol=1e-5 * np.abs(expected).max())
    assert cfg.tokens((1, 1, 5)) == 3
    with pytest.raises(InputError, match="and only there"):
        perceiver_io.apply(params, x, cfg, **places, queries=queries)


def test_a_text_longer_than_the_table_is_loud(rng):
    params = randomised(perceiver_io.spec(TEXT))
    x, places = pack([rng.integers(0, 11, 6).astype(np.int32)], [(1, 1, 6)], 6, 1)
    assert np.isnan(jax.jit(lambda p: perceiver_io.apply(p, x, TEXT, **places))(params)).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layer": dataclasses.replace(LATENT, width=6)}, "of the encoder's width"),
        ({"layer": dataclasses.replace(LATENT, inputs=8)}, "of the encoder's width"),
        ({"encoder": LATENT}, "must look at inputs"),
        ({"decoder": None}, "belong to a decoder"),
        ({"decoder": dataclasses.replace(TEXT.decoder, inputs=6)}, "width 6, but latents have 8"),
        ({"outputs": 4}, "tied head"),
        ({"vocab": 0}, "tied head"),
        ({"queries": 0}, "learned queries"),
    ],
)
def test_configs_that_do_not_fit(change, says):
    with pytest.raises(InputError, match=says):
        dataclasses.replace(TEXT, **change)


def test_heads_that_do_not_divide_and_queries_left_out(rng):
    with pytest.raises(InputError, match="do not divide into 3 heads"):
        Layer(8, None, 3, 6, 8, 12)
    _, _, x, places = row("asked", rng)
    del places["queries"]
    with pytest.raises(InputError, match="Queries must be given"):
        perceiver_io.apply({}, x, ASKED, **places)
    with pytest.raises(InputError, match="depends on the queries"):
        ASKED.tokens((1, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_transforms_and_meshes(rng, name):
    cfg = CASES[name]
    _, _, x, places = row(name, rng)
    at = np.concatenate([places_of(name, i) for i in range(3)])

    def call(params, x, places):
        return perceiver_io.apply(params, x, cfg, **places)

    everywhere(call, randomised(perceiver_io.spec(cfg)), x, places, lambda out: out[:, at])
