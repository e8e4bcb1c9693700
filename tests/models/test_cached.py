"""A decoder with a cache says what it says without one, however the tokens come and whatever lies between them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import randomised, tiny_model

from mmjax.core.errors import InputError
from mmjax.models import decoder
from mmjax.nn import cross_attention, rope, transformer

BLOCKS = transformer.Config(
    width=24,
    layers=4,
    heads=4,
    kv_heads=2,
    head=8,
    hidden=40,
    rope=rope.Config(8, (2, 1, 1)),
)
GEMMA = dataclasses.replace(
    BLOCKS,
    activation="gelu_tanh",
    norm_offset=1.0,
    post_norm=True,
    qk_norm="head",
    query_scale=0.3,
    softcap=5.0,
    windowed=(0, 2),
    window_rope=rope.Config(8, (4,), theta=100.0),
)
PLAIN = decoder.Config(31, BLOCKS)
SLIDING = decoder.Config(31, GEMMA, window=3, embed_scale=4.9, softcap=7.0)
PREFIXED = dataclasses.replace(SLIDING, window_ahead=False)
CROSS = decoder.Config(31, BLOCKS, tied=False, cross=cross_attention.Config(24, 16, 2, 8, 40, every=2))
KIND = {"activation": "silu", "gated": True, "norm_kind": "rms", "qk_norm": True}
IDEFICS = cross_attention.Config(24, 16, 2, 8, 40, every=2, gate="vector", **KIND)
MLLAMA = cross_attention.Config(24, 16, 4, 8, 40, at=(1, 3), kv_heads=2, qk_epsilon=1e-3, blind="all", **KIND)
SOMEWHERE = dataclasses.replace(MLLAMA, at=(0, 3, 3, 4), blind="mlp")
NEAR = dataclasses.replace(BLOCKS, windowed=(0, 2), window_rope=rope.Config(8, (4,), theta=100.0))
MODELS = {
    "plain": PLAIN,
    "sliding": SLIDING,
    "prefixed": PREFIXED,
    "cross": CROSS,
    "cross as Idefics": decoder.Config(31, NEAR, window=3, cross=IDEFICS),
    "cross as Mllama": decoder.Config(31, BLOCKS, cross=MLLAMA),
    "cross anywhere": decoder.Config(31, NEAR, window=3, cross=SOMEWHERE),
    "learned": decoder.Config(31, dataclasses.replace(BLOCKS, rope=None), positions=decoder.Positions(22, first=2)),
}
LEARNED = MODELS["learned"]
LENGTHS = (9, 5, 7)  # of the rows
FIRST, THEN = ((0, 1, 2, 3), (0, 1, 2, -1), (-1, -1, -1, -1)), ((4, 5), (3, 4), (0, -1))  # labels of their media tokens


def rows(cfg):
    """Three rows of different length, padded to 9: tokens, labels, intervals, positions, and media to look at.

    Of PREFIXED the first four tokens see each other.
    """
    some = np.random.default_rng(0)
    tokens = jnp.asarray(some.integers(0, cfg.vocab, (3, 9)), jnp.int32)
    at = np.arange(9, dtype=np.int32)[None].repeat(3, 0)
    there = at < np.array(LENGTHS)[:, None]
    see = {
        "order": np.where(there, at, -1),
        "lo": np.zeros((3, 9), np.int32),
        "hi": np.where(there, at if cfg.window_ahead else np.maximum(at, 3), -1),
        "position": some.integers(0, 20, (3, 9, 3)).astype(np.int32),
    }
    labels = np.concatenate([FIRST, THEN], 1)
    if cfg.cross is not None:
        # The first four tokens know of the first four media tokens at most; some see none.
        known = np.where(at < 4, labels[:, :4].max(1, keepdims=True), labels.max(1, keepdims=True))
        hi = np.minimum(some.integers(-1, 5, (3, 9)), known).astype(np.int32)
        see |= {"media_lo": np.where(hi < 0, known + 1, 0).astype(np.int32), "media_hi": hi}
    media = (jnp.asarray(some.normal(size=(3, 6, 16)), jnp.float32), jnp.asarray(labels, jnp.int32))
    return tokens, jax.tree.map(jnp.asarray, see), {} if cfg.cross is None else {"media": media}


def part(see, start, stop):
    return {name: x[:, start:stop] for name, x in see.items()}


@pytest.mark.parametrize(
    ("name", "unstacked"),
    [
        ("plain", False),
        ("sliding", False),
        ("sliding", True),
        ("prefixed", False),
        ("cross", False),
        ("cross as Idefics", False),
        ("cross as Mllama", False),
        ("cross as Mllama", True),
        ("cross anywhere", True),
        ("learned", False),
        pytest.param("cross anywhere", False, marks=pytest.mark.slow),
    ],
)
def test_in_parts_is_in_one(name, unstacked):
    """Four tokens, then three, then one by one; and the first part is padded as a bucket would be.

    Media come with the first two parts, and never again.
    """
    cfg = MODELS[name]
    params = randomised(decoder.spec(cfg))
    tokens, see, media = rows(cfg)
    x = decoder.embed(params, tokens, cfg)
    wants = np.asarray(decoder.apply(params, x, cfg, **see, **media))
    if unstacked:
        params = params | {n: transformer.unstack(params[n]) for n in ("blocks", "cross") if n in params}
    cache = decoder.empty_cache(cfg, 3, 13, stacked=not unstacked, media=7)
    run = jax.jit(lambda p, x, cache, see, **media: decoder.cached(p, x, cfg, cache, **see, **media))
    first, then = (jax.tree.map(lambda m, p=p: m[:, p], media) for p in (slice(4), slice(4, 6)))
    padded = {k: jnp.pad(v[:, :4], ((0, 0), (0, 2)) + ((0, 0),) * (v.ndim - 2)) for k, v in see.items()}
    padded["order"], padded["hi"] = (padded[k].at[:, 4:].set(-1) for k in ("order", "hi"))
    got, cache = run(params, jnp.pad(x[:, :4], ((0, 0), (0, 2), (0, 0))), cache, padded, **first)
    parts = [got[:, :4]]
    for start, stop in ((4, 7), (7, 8), (8, 9)):
        got, cache = run(params, x[:, start:stop], cache, part(see, start, stop), **(then if start == 4 else {}))
        parts.append(got)
    assert int(cache.at) == 11
    assert sorted(cache.order[1].tolist()) == [-1] * 8 + [0, 1, 2, 3, 4]
    if cfg.cross is not None:
        assert cache.media.order.tolist() == [[*a, *b, -1] for a, b in zip(FIRST, THEN, strict=True)]
    got = np.concatenate(parts, axis=1)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(got[row, :length], wants[row, :length], rtol=1e-5, atol=1e-5)


def test_a_window_that_holds_within_a_prefix_or_not():
    """Two documents in a row, prefixes of four and two: the last token of a prefix sees none later, and all before."""
    own = jnp.array([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, -1, -1]])
    lo = jnp.array([[0, 0, 0, 0, 0, 0, 6, 6, 6, 6, 0, 0]])
    hi = jnp.array([[3, 3, 3, 3, 4, 5, 7, 7, 8, 9, -1, -1]])
    see = {"position": None, "length": None, "added": None}
    (near, _), (whole, upper) = (
        decoder._see(cfg, own, own, lo, hi, **see)["window"]
        for cfg in (SLIDING, dataclasses.replace(PREFIXED, window=2))
    )
    assert near[0, :10].tolist() == [0, 0, 0, 1, 2, 3, 6, 6, 6, 7]
    assert whole[0, :10].tolist() == [0, 0, 0, 0, 3, 4, 6, 6, 7, 8]
    assert (upper == hi).all()


def test_long_parts_go_through_the_kernel():
    """More than a few queries at once: the same."""
    params = randomised(decoder.spec(SLIDING))
    tokens, see, _ = rows(SLIDING)
    x = decoder.embed(params, tokens, SLIDING)
    wants = decoder.apply(params, x, SLIDING, **see)
    got, _ = decoder.cached(params, x, SLIDING, decoder.empty_cache(SLIDING, 3, 300), **see)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(got[row, :length], wants[row, :length], rtol=1e-5, atol=1e-5)


def test_a_tuple_of_blocks_is_the_stack_with_gradients():
    cfg = dataclasses.replace(SLIDING, blocks=dataclasses.replace(GEMMA, remat="dots"))
    params = randomised(decoder.spec(cfg))
    tokens, see, _ = rows(cfg)
    added = jax.random.normal(jax.random.key(3), (3, 9, 2, 24))

    def loss(params, added):
        return jnp.square(decoder.apply(params, decoder.embed(params, tokens, cfg), cfg, added=added, **see)).sum()

    def apart(params, added):
        return loss(params | {"blocks": transformer.unstack(params["blocks"])}, added)

    (one, grads), (two, others) = (jax.value_and_grad(f, (0, 1))(params, added) for f in (loss, apart))
    np.testing.assert_allclose(one, two, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), grads, others)
    assert np.abs(grads[1]).min(axis=(0, 1, 3)).max() > 0


def test_learned_positions_are_rows_of_their_table_and_end_with_it():
    params = randomised(decoder.spec(LEARNED))
    tokens, see, _ = rows(LEARNED)
    x = decoder.embed(params, tokens, LEARNED)
    wants = decoder.apply(params, x, LEARNED, **see)
    plain = dataclasses.replace(LEARNED, positions=None)
    by_hand = x + params["positions"][see["position"][..., 0] + 2]
    np.testing.assert_allclose(wants, decoder.apply(params, by_hand, plain, **see), rtol=1e-6, atol=1e-6)
    assert LEARNED.longest == 20
    past = decoder.apply(params, x, LEARNED, **see | {"position": see["position"].at[1, 2, 0].set(20)})
    assert np.isnan(past[1, 2]).all()
    assert np.isfinite(past[0]).all()
    with pytest.raises(InputError, match="no row for the first token"):
        dataclasses.replace(LEARNED, positions=decoder.Positions(2, 2))


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="go together"):
        decoder.Config(31, BLOCKS, window=3)
    with pytest.raises(InputError, match="windowed blocks needs"):
        dataclasses.replace(BLOCKS, window_rope=rope.Config(8, (4,)))
    params = randomised(decoder.spec(PLAIN))
    tokens, see, _ = rows(PLAIN)
    cache, x = decoder.empty_cache(PLAIN, 3, 12, stacked=False), decoder.embed(params, tokens, PLAIN)
    with pytest.raises(InputError, match="tuple of caches"):
        decoder.cached(params, x, PLAIN, cache, **see)
    model = tiny_model(vocab=40)
    with pytest.raises(InputError, match="go together"):
        dataclasses.replace(model, deepstack=(0,))


def test_sinusoidal_positions_never_end():
    """fairseq's: all sines, then all cosines, the slowest a ten-thousandth."""
    cfg = dataclasses.replace(LEARNED, positions=decoder.Positions(None, first=2))
    params = randomised(decoder.spec(cfg))
    assert "positions" not in params
    assert cfg.longest is None
    tokens, see, _ = rows(cfg)
    see["position"] = see["position"] * 300
    x = decoder.embed(params, tokens, cfg)
    angle = (np.asarray(see["position"])[..., :1] + 2) * 10_000.0 ** (-np.arange(12) / 11)
    by_hand = x + np.concatenate([np.sin(angle), np.cos(angle)], -1).astype(np.float32)
    plain = dataclasses.replace(cfg, positions=None)
    wants = decoder.apply(params, by_hand, plain, **see)
    np.testing.assert_allclose(decoder.apply(params, x, cfg, **see), wants, rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="no row for the first token"):
        dataclasses.replace(cfg, positions=decoder.Positions(None, -1))
