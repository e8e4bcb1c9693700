import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.core.errors import InputError
from mmjax.models import decoder
from mmjax.models.vocabulary import extend
from mmjax.nn import transformer


def made(tied: bool, rng):
    cfg = decoder.Config(7, transformer.Config(width=8, layers=1, heads=2, kv_heads=2, head=4, hidden=16), tied)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), decoder.spec(cfg))
    return params, cfg


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_and_old_logits_stay(tied, rng):
    params, cfg = made(tied, rng)
    hidden = jnp.asarray(rng.normal(size=(1, 3, 8)), jnp.float32)
    before = decoder.logits(params, hidden, cfg)
    after, larger = extend(params, cfg, 10)
    assert (larger.vocab, cfg.vocab, params["embed"].shape) == (10, 7, (7, 8))
    for name in ("embed",) if tied else ("embed", "head"):
        np.testing.assert_array_equal(after[name][:7], params[name])
        np.testing.assert_allclose(after[name][7:], np.tile(np.mean(params[name], 0), (3, 1)), rtol=1e-6, atol=1e-7)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(lambda p: p.shape, decoder.spec(larger))
    got = decoder.logits(after, hidden, larger)
    np.testing.assert_allclose(got[..., :7], before, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[..., 7:], np.repeat(before.mean(-1, keepdims=True), 3, -1), rtol=1e-5, atol=1e-5)


def test_the_mean_is_rounded_once(rng):
    params, cfg = made(True, rng)
    table = jnp.asarray(rng.normal(size=(1001, 64)), jnp.bfloat16)
    after, _ = extend({**params, "embed": table}, decoder.Config(1001, cfg.blocks), 1002)
    assert after["embed"].dtype == jnp.bfloat16
    want = jnp.asarray(np.mean(np.asarray(table, np.float64), 0), jnp.bfloat16)
    np.testing.assert_array_equal(after["embed"][-1].astype(jnp.float32), want.astype(jnp.float32))


def test_the_same_size_changes_nothing_and_less_is_refused(rng):
    params, cfg = made(True, rng)
    after, same = extend(params, cfg, 7)
    assert same == cfg
    np.testing.assert_array_equal(after["embed"], params["embed"])
    with pytest.raises(InputError, match="7 ids cannot be cut to 6"):
        extend(params, cfg, 6)
    with pytest.raises(InputError, match="'embed' has 7 rows"):
        extend(params, decoder.Config(8, cfg.blocks), 9)
