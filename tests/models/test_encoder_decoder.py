"""An encoder–decoder: cached is whole, packed is alone, and nothing looks where it must not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import randomised

from mmjax.core.errors import InputError
from mmjax.models import encoder_decoder
from mmjax.nn import relative, rope, transformer
from mmjax.sequence import interleave
from mmjax.sequence.batch import Bucket, build
from mmjax.sequence.invariants import check
from mmjax.sequence.layout import TEXT, Layout, Piece
from mmjax.tokenizers.vocab import Vocab

VOCAB = Vocab(0, None, 1, size=31)
BOTH, BACK = relative.Config(4, 8, 9, both=True), relative.Config(4, 8, 9)
BLOCKS = transformer.Config(width=24, layers=2, heads=4, kv_heads=4, head=5, hidden=40, query_scale=1.0, relative=BOTH)
CFG = encoder_decoder.Config(31, BLOCKS, dataclasses.replace(BLOCKS, layers=3, look=24, relative=BACK), head_scale=0.5)
SEQUENCE = interleave.Config(position="sequential", answer=6, start=2)


def document(name, question, answer, seed):
    ids = [int(i) for i in np.random.default_rng(seed).integers(3, 31, question + answer)]
    pieces = Piece(TEXT, question, tuple(ids[:question])), Piece(TEXT, answer, tuple(ids[question:]), train=True)
    return interleave.interleave(Layout.of(name, tuple(p for p in pieces if p.length), True), VOCAB, SEQUENCE), []


def batch(*rows, answer=6):
    return jax.tree.map(jnp.asarray, build(rows, Bucket(len(rows), 16, 1, 1, answers=answer), 3, VOCAB, SEQUENCE))


def run(params, given):
    x = encoder_decoder.embed(params, given.tokens, CFG)
    see = {"order": given.order, "lo": given.lo, "hi": given.hi}
    return encoder_decoder.logits(params, encoder_decoder.apply(params, x, CFG, given.answer, **see), CFG)


def test_two_streams_by_hand():
    x, _ = document("a", 3, 2, 0)
    assert (x.lo.tolist(), x.hi.tolist(), x.weight.tolist()) == ([0] * 3, [2] * 3, [0] * 3)
    said = x.answer.target
    assert x.answer.tokens.tolist() == [2, said[0]]
    assert x.answer.weight.tolist() == [1, 1]
    asked, _ = document("b", 4, 0, 1)
    assert (asked.answer.tokens.tolist(), asked.answer.weight.tolist()) == ([2], [0])
    assert interleave.unlearnt(x).answer.weight.tolist() == [0, 0]
    both = batch([(x, []), (asked, [])])
    check(jax.tree.map(np.asarray, both), VOCAB)
    answer = both.answer
    np.testing.assert_array_equal(answer.tokens[0], [2, said[0], 2, 0, 0, 0])
    np.testing.assert_array_equal(answer.order[0], [0, 1, 2, -1, -1, -1])
    np.testing.assert_array_equal(answer.lo[0, :3], [0, 0, 2])
    np.testing.assert_array_equal(answer.media_lo[0, :3], [0, 0, 3])
    np.testing.assert_array_equal(answer.media_hi[0, :3], [2, 2, 6])
    broken = both.replace(answer=answer.replace(media_hi=answer.media_hi.at[0, 1].set(-1)))
    with pytest.raises(InputError, match="1 trained tokens that see nothing"):
        check(jax.tree.map(np.asarray, broken), VOCAB)
    for name, place, value, says in (("order", 1, 0, "1 labels that do not rise"), ("lo", 2, 0, "1 tokens that see p")):
        wrong = both.replace(answer=answer.replace(**{name: getattr(answer, name).at[0, place].set(value)}))
        with pytest.raises(InputError, match=says):
            check(jax.tree.map(np.asarray, wrong), VOCAB)
    with pytest.raises(InputError, match=r"'a' \(3 tokens, .* 2 answer tokens\) does not fit its row: .* 1 answer "):
        batch([(x, [])], answer=1)


def test_packed_is_alone_and_cached_is_whole():
    params = randomised(encoder_decoder.spec(CFG))
    one, two = document("a", 7, 4, 2), document("b", 3, 6, 3)
    apart, packed = batch([one], [two]), batch([one, two], answer=10)
    once = jax.jit(run)
    wants = once(params, apart)
    together = jax.jit(run)(params, packed)
    np.testing.assert_allclose(together[0], np.concatenate([wants[0, :4], wants[1, :6]]), rtol=1e-5, atol=1e-5)
    change = np.abs(np.asarray(once(params, apart.replace(tokens=apart.tokens.at[1, 0].add(1))) - wants)).max((1, 2))
    assert change[0] == 0
    assert change[1] > 1e-3

    @jax.jit
    def read(params, given):
        x, see = encoder_decoder.embed(params, given.tokens, CFG), {"order": given.order}
        encoded = encoder_decoder.encode(params, x, CFG, lo=given.lo, hi=given.hi, **see)
        cache, out, said = encoder_decoder.empty_cache(params, encoded, given.order, CFG, 8), [], given.answer
        for start, stop in ((0, 2), (2, 3), (3, 6)):
            part = {name: getattr(said, name)[:, start:stop] for name in ("order", "lo", "hi")}
            got, cache = encoder_decoder.cached(params, said.tokens[:, start:stop], CFG, cache, **part)
            out.append(encoder_decoder.logits(params, got, CFG))
        return jnp.concatenate(out, axis=1)

    for own in (params, encoder_decoder.unstacked(params)):
        got = read(own, apart)
        np.testing.assert_allclose(got[0, :4], wants[0, :4], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got[1], wants[1], rtol=1e-5, atol=1e-5)


def test_ranges_of_distances():
    """Each distance by itself at first, then wider ones; before and behind differ where both are told apart."""
    assert relative.starts(BACK) == (1, 2, 3, 4, 5, 6, 8)
    assert relative.starts(relative.Config(1, 32, 128)) == (*range(1, 17), *WIDE)
    table = jnp.arange(8.0)[None].repeat(4, 0)
    labels = jnp.arange(4, dtype=jnp.int32)[None]
    got = relative.bias(table, BOTH, labels, labels)
    np.testing.assert_array_equal(
        got.function(table, labels, labels)[0, 1], [[0, 5, 6, 6], [1, 0, 5, 6], [2, 1, 0, 5], [2, 2, 1, 0]]
    )
    with pytest.raises(InputError, match="give an even number"):
        relative.Config(4, 7, 9)


WIDE = (19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113)


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="look at an encoder of width None"):
        encoder_decoder.Config(31, BLOCKS, BLOCKS)
    for change in ({"rope": rope.Config(5, (2,))}, {"windowed": (0,)}):
        with pytest.raises(InputError, match="told no positions and no windows"):
            dataclasses.replace(CFG, blocks=dataclasses.replace(BLOCKS, relative=None, **change))
    plain = {"qk_norm": "head", "softcap": 5.0, "inner_norm": True, "post_norm": True, "layer_scale": 1.0, "gate": 0.5}
    for name, value in plain.items():
        with pytest.raises(InputError, match=f"has no {name}; leave"):
            dataclasses.replace(CFG.answer, **{name: value})
    with pytest.raises(InputError, match="as many heads as the blocks have"):
        dataclasses.replace(BLOCKS, relative=relative.Config(2))
    with pytest.raises(InputError, match="go together"):
        transformer.apply(
            randomised(transformer.spec(CFG.answer)),
            jnp.zeros((1, 2, 24)),
            dataclasses.replace(CFG.answer, relative=None),
            order=jnp.zeros((1, 2), jnp.int32),
            lo=jnp.zeros((1, 2), jnp.int32),
            hi=jnp.zeros((1, 2), jnp.int32),
        )
