"""Layers that look at media: each variant against the formula, tokens that see none, and where layers stand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import randomised

from mmjax.core.errors import InputError
from mmjax.models import decoder
from mmjax.nn import cross_attention, crossed, transformer

FLAMINGO = cross_attention.Config(12, 10, 4, 6, 14)
IDEFICS = dataclasses.replace(FLAMINGO, activation="silu", gated=True, norm_kind="rms", qk_norm=True, gate="vector")
MLLAMA = dataclasses.replace(IDEFICS, gate="scalar", kv_heads=2, qk_epsilon=0.1, blind="all")
ORDER = np.array([[0, 1, 2, 3, -1], [0, -1, 1, -1, -1]])
LO = np.array([[4, 0, 1], [2, 2, 0]])  # the first token of all rows, and the second of the last, see none
HI = np.array([[-1, 2, 1], [-1, -1, 1]])


def normed(x, p, kind, epsilon):
    x = x - x.mean(-1, keepdims=True) if kind == "layer" else x
    y = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + epsilon) * p["scale"]
    return y + p["bias"] if kind == "layer" else y


def formula(p, x, media, cfg):
    """Flamingo's listing 2, token by token."""
    small = cfg.epsilon if cfg.qk_epsilon is None else cfg.qk_epsilon
    out = np.array(x)
    keys = np.einsum("bme,ekh->bmkh", media, p["k"]["kernel"])
    values = np.einsum("bme,ekh->bmkh", media, p["v"]["kernel"])
    keys = normed(keys, p["k_norm"], "rms", small) if cfg.qk_norm else keys
    for b, t in np.ndindex(x.shape[:2]):
        lo, hi, blind = LO[b, t], HI[b, t], LO[b, t] > HI[b, t]
        if blind and cfg.blind == "all":
            lo, hi = hi + 1, lo - 1
        seen = (ORDER[b] >= 0) & (lo <= ORDER[b]) & (ORDER[b] <= hi)
        if seen.any():
            q = np.einsum(
                "d,dnh->nh", normed(x[b, t], p["attention_norm"], cfg.norm_kind, cfg.epsilon), p["q"]["kernel"]
            )
            q = normed(q, p["q_norm"], "rms", small) if cfg.qk_norm else q
            for n in range(cfg.heads):
                k = n // (cfg.heads // cfg.keys)
                scores = np.exp(keys[b, seen, k] @ q[n] / np.sqrt(cfg.head))
                made = scores / scores.sum() @ values[b, seen, k]
                out[b, t] += np.tanh(p["attention_gate"]) * (made @ p["out"]["kernel"][n])
        if blind and cfg.blind == "all":
            continue
        h = normed(out[b, t], p["mlp_norm"], cfg.norm_kind, cfg.epsilon)
        up = h @ p["mlp"]["up"]["kernel"]
        if cfg.gated:
            gate = h @ p["mlp"]["gate"]["kernel"]
            up = gate / (1 + np.exp(-gate)) * up
        else:
            up = np.asarray(jax.nn.gelu(up, approximate=False))
        out[b, t] += np.tanh(p["mlp_gate"]) * (up @ p["mlp"]["down"]["kernel"])
    return out


@pytest.mark.parametrize("cfg", [FLAMINGO, IDEFICS, MLLAMA], ids=["Flamingo", "Idefics", "Mllama"])
def test_a_layer_is_its_formula(cfg, rng):
    x, media = (jnp.asarray(rng.normal(size=(2, n, d)), jnp.float32) for n, d in ((3, cfg.width), (5, cfg.media)))
    params = randomised(cross_attention.spec(cfg))
    assert params["mlp_gate"].shape == ((12,) if cfg.gate == "vector" else (1,))
    see = {"order": jnp.asarray(ORDER), "lo": jnp.asarray(LO), "hi": jnp.asarray(HI)}
    found = cross_attention.apply(params, x, media, cfg, **see)
    plain = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    np.testing.assert_allclose(found, formula(plain, np.asarray(x, np.float64), np.asarray(media), cfg), atol=1e-5)
    # Without media: as if none were there.
    nothing = {"order": None, "lo": jnp.zeros_like(LO), "hi": jnp.full_like(HI, -1)}
    blind = cross_attention.apply(params, x, None, cfg, **nothing)
    beside = cross_attention.apply(params, x, media, cfg, **see | {"lo": nothing["lo"], "hi": nothing["hi"]})
    np.testing.assert_allclose(blind, beside, atol=1e-6)
    assert np.array_equal(blind, x) == (cfg.blind == "all")


def test_where_layers_stand():
    assert dataclasses.replace(FLAMINGO, every=2).places(6) == (0, 2, 4)
    assert dataclasses.replace(FLAMINGO, at=(1, 1, 6)).places(6) == (1, 1, 6)
    blocks = transformer.Config(12, 6, 2, 2, 6, 14)
    # Only where all groups are alike is there one scan for all of them.
    near = dataclasses.replace(blocks, windowed=(0, 1))
    for cfg, at, even in (
        (blocks, (0, 2, 4), True),
        (blocks, (1, 3, 5), True),
        (blocks, (2, 4, 6), True),
        (blocks, (3, 5), False),
        (blocks, (1, 1, 6), False),
        (near, (0, 2, 4), False),
        (dataclasses.replace(blocks, windowed=(1, 3, 5)), (0, 2, 4), True),
        (blocks, tuple(range(7)), False),
    ):
        assert crossed._even(cfg, at) == even, at


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"every": 2, "at": (1,)}, "give one of the two"),
        ({"every": 0}, "give one of the two"),
        ({"at": (3, 1)}, "rising numbers"),
        ({"at": (-1, 1)}, "rising numbers"),
        ({"kv_heads": 3}, "cannot share 3 key heads"),
        ({"at": (1, 7)}, "before block 7, but there are only 6"),
        ({"every": 4}, "does not divide 6"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, says):
    with pytest.raises(InputError, match=says):
        decoder.Config(9, transformer.Config(12, 6, 2, 2, 6, 14), cross=dataclasses.replace(FLAMINGO, **changes))


def test_nothing_is_added_between_layers():
    cfg = decoder.Config(9, transformer.Config(12, 2, 2, 2, 6, 14), cross=FLAMINGO)
    params, at = randomised(decoder.spec(cfg)), jnp.zeros((1, 1), jnp.int32)
    see = {"order": at, "lo": at, "hi": at, "position": at[:, :, None]}
    x = jnp.zeros((1, 1, 12))
    with pytest.raises(InputError, match="give media_lo and media_hi"):
        decoder.apply(params, x, cfg, **see)
    with pytest.raises(InputError, match="Nothing can be added"):
        decoder.apply(params, x, cfg, **see, media_lo=at, media_hi=at, added=jnp.zeros((1, 1, 1, 12)))
