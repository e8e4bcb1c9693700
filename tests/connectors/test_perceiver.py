"""The resampler's published variants written out in NumPy; packing, tables by frame and number, refusals, meshes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from everywhere import everywhere
from tiny import randomised

from mmjax.connectors import perceiver
from mmjax.core.errors import InputError
from mmjax.nn import mlp

FLAMINGO = perceiver.Config(8, 8, 3, 2, 2, 4, 12, frames=3, media=2)
IDEFICS = perceiver.Config(8, 8, 3, 2, 2, 4, 12, qk_norm=True, activation="relu")
IDEFICS2 = perceiver.Config(
    6,
    8,
    3,
    2,
    4,
    2,
    12,
    1e-6,
    2,
    "rms",
    activation="silu",
    gated=True,
    projection=mlp.Config(6, 10, 8, "silu", True, False),
)
KOSMOS2 = perceiver.Config(
    6,
    8,
    3,
    1,
    2,
    4,
    0,
    norm_kind="none",
    residual=False,
    bias=True,
    unit=True,
    prefix=True,
    dense=True,
)
CASES = {"Flamingo": FLAMINGO, "Idefics": IDEFICS, "Idefics2": IDEFICS2, "Kosmos-2": KOSMOS2}
GRIDS, NUMBERS = [(2, 1, 3), (1, 2, 2), (3, 1, 1)], [0, 1, 0]


def pack(clips, room, number):
    flat = [x.reshape(-1, x.shape[-1]) for x in clips]
    count = [len(x) for x in flat]
    spare, none = room - sum(count), number - len(clips)
    places = {
        "image": [*np.repeat(np.arange(len(clips)), count), *[-1] * spare],
        "order": [*range(sum(count)), *[-1] * spare],
        "grid": [x.shape[:3] for x in clips] + [(0, 0, 0)] * none,
    }
    features = np.concatenate([*flat, np.full((spare, flat[0].shape[-1]), 7.0, np.float32)])
    return jnp.asarray(features[None]), {k: jnp.asarray([v], jnp.int32) for k, v in places.items()}


def row(cfg, rng):
    clips = [rng.normal(size=(*g, cfg.inputs)).astype(np.float32) for g in GRIDS]
    features, places = pack(clips, 16, 4)
    return clips, features, places | {"number": jnp.asarray([[*NUMBERS, 0]], jnp.int32)}


def written_out(params, x, number, cfg):
    """One clip [frames, rows, columns, D] → [latents, width], in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    act = {
        "relu": lambda a: np.maximum(a, 0),
        "silu": lambda a: a / (1 + np.exp(-a)),
        "gelu": lambda a: 0.5 * a * (1 + np.vectorize(math.erf)(a / 2**0.5)),
    }[cfg.activation]

    def norm(p, x, kind=cfg.norm_kind):
        if kind == "none":
            return x
        x = x - x.mean(-1, keepdims=True) if kind == "layer" else x
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.epsilon) * p["scale"] + p.get("bias", 0)

    def forward(p, x, gated):
        h = x @ p["up"]["kernel"]
        return (act(x @ p["gate"]["kernel"]) * h if gated else act(h)) @ p["down"]["kernel"]

    x = x.astype(np.float64)
    x = x / np.linalg.norm(x, axis=-1, keepdims=True) if cfg.unit else x
    x = forward(p["projection"], x, True) if cfg.projection else x
    if cfg.dense:
        x = x @ p["projection"]["kernel"] + p["projection"]["bias"]
    x = x + p["frames"][: x.shape[0], None, None] if cfg.frames else x
    x = x.reshape(-1, x.shape[-1]) + (p["media"][number] if cfg.media else 0)
    z = p["latents"]
    for i in range(cfg.layers):
        layer = jax.tree.map(lambda a, i=i: a[i], p["layers"])
        h = norm(layer.get("latent_norm"), z)
        seen = np.concatenate([norm(layer.get("feature_norm"), x), h])
        q, k, v = (np.einsum("ld,dhe->hle", y, layer[n]["kernel"]) for y, n in ((h, "q"), (seen, "k"), (seen, "v")))
        if cfg.bias:
            q, k, v = (y + layer[n]["bias"][:, None] for y, n in ((q, "q"), (k, "k"), (v, "v")))
        if cfg.qk_norm:
            q, k = norm(layer["q_norm"], q, "layer"), norm(layer["k_norm"], k, "layer")
        k, v = (np.repeat(a, cfg.heads // len(a), axis=0) for a in (k, v))
        score = np.exp(q @ k.transpose(0, 2, 1) / cfg.head**0.5)
        y = np.einsum("hle,hed->ld", score / score.sum(-1, keepdims=True) @ v, layer["out"]["kernel"])
        z = z * cfg.residual + y + layer["out"].get("bias", 0)
        z = z + forward(layer["mlp"], norm(layer["mlp_norm"], z), cfg.gated) if cfg.hidden else z
    return norm(p.get("norm"), z)


@pytest.mark.parametrize("name", CASES)
def test_packed_clips_against_the_formulas(rng, name):
    cfg = CASES[name]
    params = randomised(perceiver.spec(cfg))
    clips, features, places = row(cfg, rng)
    call = jax.jit(lambda p, f, places: perceiver.apply(p, f, cfg, **places))
    got = call(params, features, places)
    assert got.shape == (1, 4 * cfg.latents, cfg.width)
    for i, x in enumerate(clips):
        expected = written_out(params, x, NUMBERS[i], cfg)
        np.testing.assert_allclose(got[0, 3 * i : 3 * i + 3], expected, atol=1e-5 * np.abs(expected).max())
    # The last picture in a row of its own, without any empty place.
    own, alone = pack(clips[2:], 3, 1)
    alone = call(params, own, alone | {"number": jnp.zeros((1, 1), jnp.int32)})
    np.testing.assert_allclose(alone[0], got[0, 6:9], atol=1e-5 * np.abs(alone).max())
    assert np.isfinite(got).all()


@pytest.mark.parametrize("name", CASES)
def test_gradients_stay_within_a_picture_and_are_finite(rng, name):
    """Also of huge features, of constant ones (whose variance is 0), and in a row that is empty."""
    cfg = CASES[name]
    params = randomised(perceiver.spec(cfg))
    _, features, places = row(cfg, rng)
    empty = {k: jnp.full_like(v, -1 if k in ("image", "order") else 0) for k, v in places.items()}
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), places, empty)
    # Picture 0: huge. Picture 1: as it is. Picture 2: constant.
    features = features.at[:, :6].multiply(1e6).at[:, 10:13].set(1.0)
    features = jnp.concatenate([features, features])

    @jax.jit
    def gradient(params, features):
        return jax.grad(lambda p, x: perceiver.apply(p, x, cfg, **both)[:, 3:6].sum(), (0, 1))(params, features)

    of_params, of_features = gradient(params, features)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(of_params))
    assert np.abs(of_features[0, 6:10]).max() > 0
    assert not np.any(of_features[0, :6])
    assert not np.any(of_features[0, 10:])
    assert not np.any(of_features[1])


def test_frames_and_numbers_past_their_tables_are_loud(rng):
    params = randomised(perceiver.spec(FLAMINGO))
    call = jax.jit(lambda f, places: perceiver.apply(params, f, FLAMINGO, **places))
    for frames, number, nan in ((3, 1, False), (4, 1, True), (3, 2, True)):
        features, places = pack([rng.normal(size=(frames, 1, 1, 8)).astype(np.float32)], 4, 1)
        out = call(features, places | {"number": jnp.full((1, 1), number, jnp.int32)})
        assert np.isnan(out).all() == nan
        assert np.isfinite(out).all() != nan
    assert FLAMINGO.tokens((3, 9, 9)) == 3
    with pytest.raises(InputError, match="at most 3"):
        FLAMINGO.tokens((4, 1, 1))
    with pytest.raises(InputError, match="give `number`"):
        perceiver.apply(params, features, FLAMINGO, **places)


def test_features_of_another_width_need_a_projection():
    with pytest.raises(InputError, match="width 6 must come to the latents' width 8"):
        perceiver.Config(6, 8, 3, 2, 2, 4, 12)
    with pytest.raises(InputError, match="width 6 must"):
        perceiver.Config(6, 8, 3, 2, 2, 4, 12, projection=mlp.Config(6, 10, 7))
    with pytest.raises(InputError, match="give one of them"):
        perceiver.Config(6, 8, 3, 2, 2, 4, 12, projection=mlp.Config(6, 10, 8), dense=True)
    with pytest.raises(InputError, match="width 8 must"):
        perceiver.Config(8, 8, 3, 2, 2, 4, 12, projection=mlp.Config(6, 10, 8))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_transforms_and_meshes(rng, name):
    cfg = CASES[name]
    _, features, places = row(cfg, rng)

    def call(params, x, places):
        return perceiver.apply(params, x, cfg, **places)

    everywhere(call, randomised(perceiver.spec(cfg)), features, places, lambda out: out[:, : 3 * cfg.latents])
