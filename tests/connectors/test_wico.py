"""Windows of tokens concatenated and expanded again, against NumPy loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import randomised

from mmjax.connectors import wico
from mmjax.core import sharding
from mmjax.core.errors import InputError
from mmjax.sequence import windows

D = 4


def test_adaptive_windows_as_published():
    assert wico.adaptive(24, 12) == (2, 2)
    assert wico.adaptive(24, 10) == (6, 2)  # they overlap


@pytest.mark.parametrize(
    ("reduce", "channels"), [("concatenate", "channel"), ("concatenate", "patch"), ("average", "patch")]
)
def test_windows_are_projected_whole(rng, reduce, channels):
    pictures = [rng.normal(size=(*g, D)).astype(np.float32) for g in [(4, 6), (2, 2)]]

    def of(picture, window, stride, params, cfg):
        out = []
        for y in range(0, picture.shape[0] - window + 1, stride):
            for x in range(0, picture.shape[1] - window + 1, stride):
                cut = picture[y : y + window, x : x + window]
                one = (
                    cut.mean((0, 1))
                    if reduce == "average"
                    else cut.transpose(2, 0, 1)
                    if channels == "channel"
                    else cut
                )
                out.append(one.reshape(-1) @ params["projection"]["kernel"] + params["projection"]["bias"])
        return out

    cfg = wico.Config(D, 5, reduce=reduce, channels=channels)
    params = randomised(wico.spec(cfg))
    squares = [p.reshape(-1, D)[windows.order((1, *p.shape[:2]), 2)[0]] for p in pictures]
    got = wico.apply(params, jnp.asarray(np.concatenate([*squares, np.ones((3, D), np.float32)])[None]), cfg)
    want = [t for p in pictures for t in of(p, 2, 2, params, cfg)]
    assert len(want) == sum(cfg.tokens((1, *p.shape[:2])) for p in pictures)
    np.testing.assert_allclose(got[0], want, atol=1e-5)

    # Sliding windows: row by row, any size, what does not fit left out.
    cfg = wico.Config(D, 5, 2, 1, reduce, channels)
    flat = jnp.asarray(np.concatenate([p.reshape(-1, D) for p in pictures] + [np.ones((3, D), np.float32)])[None])
    grid = jnp.asarray([[(1, 4, 6), (1, 2, 2), (0, 0, 0)]], jnp.int32)
    got = wico.apply(params, flat, cfg, grid=grid, size=20)
    want = [t for p in pictures for t in of(p, 2, 1, params, cfg)]
    assert len(want) == cfg.tokens((1, 4, 6)) + cfg.tokens((1, 2, 2)) == 16
    np.testing.assert_allclose(got[0, :16], want, atol=1e-5)
    np.testing.assert_allclose(got[0, 16:], np.tile(params["projection"]["bias"], (4, 1)), atol=1e-6)


def test_what_is_refused():
    with pytest.raises(InputError, match="multiples of 2"):
        wico.Config(D, 5).tokens((1, 3, 4))
    with pytest.raises(InputError, match="no window of 3"):
        wico.Config(D, 5, 3, 1).tokens((1, 2, 4))
    with pytest.raises(InputError, match="give grid="):
        wico.windows(jnp.ones((1, 4, D)), wico.Config(D, 5, 2, 1))


# Two documents: t A A A t t B | t C C t C t, and two empty places; C has a token of text within. A is seen both ways
# where `causal` is false.
PICTURE = [-1, 0, 0, 0, -1, -1, 1, -1, 2, 2, -1, 2, -1, -1, -1]
DOCUMENT = [0] * 7 + [1] * 6 + [-1, -1]
LENGTH, MEDIA = 13, 7


def sequence(causal):
    order = np.arange(15)
    order[LENGTH:] = -1
    lo = np.where(np.array(DOCUMENT) == 1, 7, 0)
    hi = order.copy()
    if not causal:
        hi[1:4] = 3
    hi[5], lo[12] = -1, 10  # a token that sees nothing, and a sliding window
    fields = {"picture": PICTURE, "document": DOCUMENT, "order": order, "lo": lo, "hi": hi}
    return {k: jnp.asarray(v, jnp.int32)[None] for k, v in fields.items()}


def oracle(x, fields, times, along, causal):
    """Lists of (vector, source), and who sees whom, by the definition."""
    f = {k: np.asarray(v[0]) for k, v in fields.items()}
    out = []
    for i in range(LENGTH):
        p = f["picture"][i]
        if p < 0:
            out.append((x[i], i))
            continue
        own = [j for j in range(LENGTH) if f["picture"][j] == p]
        for j in range(times):
            if along == "channels":
                at = (np.arange(D) + j * D) * (D - 1) / (D * times - 1)
                out.append((np.interp(at, np.arange(D), x[i]), i))
            else:
                at = (own.index(i) * times + j) * (len(own) - 1) / max(len(own) * times - 1, 1)
                low = min(int(at + 1e-9), len(own) - 1)
                high = min(low + 1, len(own) - 1)
                out.append(((1 - (at - low)) * x[own[low]] + (at - low) * x[own[high]], i))
    old = (f["lo"][:, None] <= f["order"][None]) & (f["order"][None] <= f["hi"][:, None]) & (f["order"] >= 0)[None]
    source = np.array([s for _, s in out])
    sees = old[np.ix_(source, source)]
    here = np.arange(len(out))
    if causal:  # who saw up to itself does
        upto = f["hi"][source] == f["order"][source]
        sees &= ~upto[:, None] | (here[None] <= here[:, None])
    return np.stack([v for v, _ in out]), source, sees


@functools.cache
def compiled(times, size, along, causal):
    return jax.jit(lambda x, f: wico.expand(x, times, size, along=along, causal=causal, **f))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("along", ["sequence", "channels"])
def test_expansion_is_the_definition(rng, along, causal):
    x = rng.normal(size=(15, D)).astype(np.float32)
    times, size = 3, 30
    fields = sequence(causal)
    out = compiled(times, size, along, causal)(jnp.asarray(x)[None], fields)
    want, source, sees = oracle(x, fields, times, along, causal)
    n = len(want)
    assert n == LENGTH + (times - 1) * MEDIA
    np.testing.assert_allclose(out.x[0, :n], want, atol=1e-6)
    np.testing.assert_array_equal(out.x[0, n:], 0)
    np.testing.assert_array_equal(out.source[0], [*source, *[-1] * (size - n)])
    np.testing.assert_array_equal(out.order[0], [*range(n), *[-1] * (size - n)])
    got = (out.lo[0][:, None] <= out.order[0][None]) & (out.order[0][None] <= out.hi[0][:, None])
    np.testing.assert_array_equal((got & (out.order[0] >= 0)[None])[:n, :n], sees)
    second = int(np.argmax(source >= 7))
    np.testing.assert_array_equal(out.position[0, :n], [*range(second), *range(n - second)])
    back = sharding.take_rows(out.source, out.last)
    np.testing.assert_array_equal(back[0], [*range(LENGTH), 0, 0])
    np.testing.assert_array_equal(out.last[0, LENGTH:], -1)


def test_once_is_the_same_sequence(rng):
    x, fields = jnp.asarray(rng.normal(size=(1, 15, D)), jnp.float32), sequence(True)
    for along in ("sequence", "channels"):
        out = compiled(1, 15, along, True)(x, fields)
        np.testing.assert_allclose(out.x[:, :LENGTH], x[:, :LENGTH], atol=1e-6)
        np.testing.assert_array_equal(out.order, fields["order"])
        np.testing.assert_array_equal(out.hi[:, :LENGTH], fields["hi"][:, :LENGTH])


def test_packed_is_alone_and_what_does_not_fit_is_lost(rng):
    x, fields = jnp.asarray(rng.normal(size=(1, 15, D)), jnp.float32), sequence(True)
    whole = compiled(3, 30, "sequence", True)(x, fields)
    second = {
        k: v[:, 7:] - (7 if k in ("order", "lo", "hi") else 2 if k == "picture" else 1) for k, v in fields.items()
    }
    second["picture"] = jnp.where(fields["picture"][:, 7:] < 0, -1, 0)
    second["order"] = jnp.where(fields["order"][:, 7:] < 0, -1, second["order"])
    alone = compiled(3, 30, "sequence", True)(x[:, 7:], second)
    start = int(np.argmax(np.asarray(whole.source[0]) >= 7))
    n = 12
    np.testing.assert_array_equal(whole.x[0, start : start + n], alone.x[0, :n])
    np.testing.assert_array_equal(whole.position[0, start : start + n], alone.position[0, :n])
    short = compiled(3, 9, "sequence", True)(x, fields)
    np.testing.assert_array_equal(short.x, whole.x[:, :9])
    np.testing.assert_array_equal(short.last[0] >= 0, np.arange(15) < 3)


def test_gradients_reach_every_token_and_no_empty_place(rng):
    x, fields = jnp.asarray(rng.normal(size=(1, 15, D)), jnp.float32), sequence(True)
    for along in ("sequence", "channels"):
        of = compiled(3, 30, along, True)
        d = jax.jit(jax.grad(lambda x, of=of: jnp.sin(of(x, fields).x).sum()))(x)
        assert np.isfinite(d).all()
        np.testing.assert_array_equal(np.abs(d[0]).sum(-1) > 0, np.arange(15) < LENGTH)
