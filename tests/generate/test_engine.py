"""Generation with a cache says what the whole rows say: in parts, in batches, at every step."""

import dataclasses
import functools

import fused
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import VOCAB, document
from tiny import randomised, tiny_model

from mmjax.core.errors import InputError
from mmjax.generate import engine, sample
from mmjax.generate.sample import GREEDY, Sampling
from mmjax.models import decoder, vlm
from mmjax.nn import cross_attention, rope, transformer
from mmjax.nn.rope_scaling import Dynamic
from mmjax.sequence import batch as batches
from mmjax.sequence.batch import Bucket
from mmjax.sequence.document import Document, Image, Text

BLOCKS = transformer.Config(
    width=24, layers=3, heads=4, kv_heads=2, head=8, hidden=40, rope=rope.Config(8, (4,)), windowed=(1,)
)
CFG = decoder.Config(30, BLOCKS, window=4)
LENGTHS = (9, 4, 6)
NO_ENDS = np.zeros(0, np.int32)


@functools.cache
def params(unstacked: bool = False) -> dict:
    made = randomised(decoder.spec(CFG))
    return engine.unstacked(made, CFG) if unstacked else made


def prompts(lengths=LENGTHS, columns: int = 12, first: int = 0, stop: int = 99):
    """Rows of random words, of which the columns from `first` to `stop` are there."""
    some = np.random.default_rng(1)
    tokens = some.integers(0, CFG.vocab, (3, 12)).astype(np.int32)[: len(lengths), first : first + columns]
    at = np.arange(first, first + columns, dtype=np.int32)[None].repeat(len(lengths), 0)
    there = at < np.minimum(lengths, stop)[:, None]
    order = np.where(there, at, -1)
    position = np.repeat(np.maximum(order, 0)[:, :, None], 3, 2)
    return engine.text_batch(*map(jnp.asarray, (tokens, order, np.zeros_like(order), position)))


def started(places: int = 40, rows: int = 3, unstacked: bool = False):
    return engine.empty(CFG, rows, places, stacked=not unstacked)


def said(state, at: int) -> np.ndarray:
    return np.asarray(state.tokens)[:, at : int(state.cache.at)]


def run(state, n: int, rows=(GREEDY,) * 3, ends=NO_ENDS, unstacked: bool = False):
    switches, values = sample.prepare(rows)
    return engine.run_decode(params(unstacked), state, np.int32(n), ends, values, cfg=CFG, switches=switches)


@functools.cache
def whole() -> jax.stages.Wrapped:
    """The likeliest next token of a row of 30 places without a cache, and its logits."""

    def one(params, tokens, count):
        at = jnp.arange(30, dtype=jnp.int32)[None]
        order = jnp.where(at < count, at, -1)
        x = decoder.embed(params, tokens[None], CFG)
        position = jnp.repeat(at[:, :, None], 3, 2)
        hidden = decoder.apply(params, x, CFG, order=order, lo=jnp.zeros_like(at), hi=order, position=position)
        return decoder.logits(params, hidden, CFG)[0, count - 1]

    return jax.jit(one)


@pytest.mark.parametrize("unstacked", [False, True])
def test_every_step_is_that_of_the_whole_row(unstacked):
    state = engine.run_prefill(params(unstacked), prompts(), cfg=CFG, state=started(unstacked=unstacked))
    rows = [np.asarray(prompts().tokens)[r, :n].tolist() for r, n in enumerate(LENGTHS)]
    at = int(state.cache.at)
    assert at == 9  # the padding's places are free again
    for step in range(8):
        for r, row in enumerate(rows):
            padded = np.zeros(30, np.int32)
            padded[: len(row)] = row
            wants = np.asarray(whole()(params(), padded, len(row)))
            np.testing.assert_allclose(state.logits[r], wants, rtol=2e-5, atol=2e-5)
        state = run(state, 1, unstacked=unstacked)
        new = said(state, at + step)
        assert new.shape == (3, 1)
        for row, token in zip(rows, new[:, 0].tolist(), strict=True):
            row.append(token)
    assert (np.asarray(state.label) == np.array(LENGTHS) + 8).all()


def test_parameters_taken_apart_may_consume_the_stack():
    made = randomised(decoder.spec(CFG))
    apart = engine.unstacked(made, CFG, consume=True)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(made["blocks"]))
    jax.tree.map(np.testing.assert_array_equal, apart, params(True))
    assert engine.unstacked(apart, CFG) is apart


def test_rows_in_a_batch_say_what_each_says_alone():
    how = [Sampling(temperature=1.5, seed=3, top_k=9), Sampling(), Sampling(temperature=2.0, repetition_penalty=1.7)]
    state = run(engine.run_prefill(params(), prompts(), cfg=CFG, state=started()), 12, how)
    together = said(state, 9)
    for r, length in enumerate(LENGTHS):
        # The same program for all: a batch of this row three times, in another bucket.
        alone = jax.tree.map(lambda x, r=r: jnp.repeat(x[r : r + 1], 3, 0), prompts())
        state = run(engine.run_prefill(params(), alone, cfg=CFG, state=started(52)), 12, [how[r]] * 3)
        assert (said(state, length) == together[r]).all()
    assert len({tuple(row) for row in together.tolist()}) == 3


def test_in_parts_is_in_one():
    one = engine.run_prefill(params(), prompts(), cfg=CFG, state=started())
    two = engine.run_prefill(params(), prompts(columns=6, stop=5), cfg=CFG, state=started())
    assert int(two.cache.at) == 5
    two = engine.run_prefill(params(), prompts(columns=6, first=5), cfg=CFG, state=two)
    for name in ("label", "position", "lo", "done"):
        assert (np.asarray(getattr(one, name)) == np.asarray(getattr(two, name))).all(), name
    np.testing.assert_allclose(one.logits, two.logits, rtol=1e-5, atol=1e-5)
    assert (said(run(one, 10), 9) == said(run(two, 10), 9)).all()


def test_an_answer_goes_on_from_the_last_token_not_from_the_largest_position():
    """The times of a clip may run past the text behind it."""
    batch = prompts()
    ahead = batch.position.at[:, 1, 0].set(50)
    state = engine.run_prefill(params(), batch.replace(position=ahead), cfg=CFG, state=started())
    assert np.asarray(state.position).tolist() == list(LENGTHS)


def test_one_program_for_streams_and_long_runs():
    before = engine.run_decode._cache_size()
    state = engine.run_prefill(params(), prompts(), cfg=CFG, state=started(41))
    whole = said(run(state, 11), 9)
    state = engine.run_prefill(params(), prompts(), cfg=CFG, state=started(41))
    for n in (1, 3, 0, 7):
        state = run(state, n)
    assert (said(state, 9) == whole).all()
    assert engine.run_decode._cache_size() == before + 1
    # Numbers of the sampling are data too.
    for temperature in (0.5, 2.0):
        state = engine.run_prefill(params(), prompts(), cfg=CFG, state=started(41))
        run(state, 2, [Sampling(temperature=temperature)] * 3)
    assert engine.run_decode._cache_size() == before + 2


def test_rows_end_each_at_its_own_end():
    state = engine.run_prefill(params(), prompts(), cfg=CFG, state=started())
    free = said(run(state, 12), 9)
    end = int(free[1, 2])
    state = engine.run_prefill(params(), prompts(), cfg=CFG, state=started())
    state = run(state, 12, ends=np.array([end, 777], np.int32))
    found = said(state, 9)
    for row, all_of_it in zip(found, free, strict=True):
        stops = np.flatnonzero(all_of_it == end)
        length = stops[0] + 1 if len(stops) else 12
        assert (row[:length] == all_of_it[:length]).all()
        assert (row[length:] == -1).all()
    assert bool(state.done[1])
    assert int(state.label[1]) == LENGTHS[1] + 3


def test_a_full_cache_ends_the_loop():
    state = run(engine.run_prefill(params(), prompts(), cfg=CFG, state=started(14)), 100)
    assert int(state.cache.at) == 14
    assert (said(state, 9) >= 0).all()
    assert not np.asarray(state.done).any()


def test_all_done_ends_the_loop():
    every = np.arange(CFG.vocab, dtype=np.int32)
    state = run(engine.run_prefill(params(), prompts(), cfg=CFG, state=started()), 100, ends=every)
    assert int(state.cache.at) == 10
    assert np.asarray(state.done).all()


def test_a_second_turn_goes_on():
    """What was said, and two words more, in a state that has the first turn: as all of it read anew."""
    state = run(engine.run_prefill(params(), prompts((9, 9, 9)), cfg=CFG, state=started()), 3)
    words = np.concatenate([np.asarray(prompts((9, 9, 9)).tokens)[:, :9], said(state, 9), [[1, 2]] * 3], 1)

    def part(first):
        at = np.arange(first, 14, dtype=np.int32)[None].repeat(3, 0)
        position = np.repeat(at[:, :, None], 3, 2)
        return engine.text_batch(*map(jnp.asarray, (words[:, first:].astype(np.int32), at, 0 * at, position)))

    two = engine.run_prefill(params(), part(12), cfg=CFG, state=state)
    one = engine.run_prefill(params(), part(0), cfg=CFG, state=started())
    np.testing.assert_allclose(two.logits, one.logits, rtol=1e-5, atol=1e-5)
    assert (said(run(two, 5), 14) == said(run(one, 5), 14)).all()


def test_rotary_angles_that_depend_on_the_length():
    """A prompt is as long as it is, and every token after it one more; keys stay as they were turned."""
    scaled = rope.Config(8, (4,), scaling=Dynamic(4.0, 3))
    cfg = dataclasses.replace(CFG, blocks=dataclasses.replace(BLOCKS, rope=scaled))
    batch, made = prompts(), randomised(decoder.spec(cfg))
    state = engine.run_prefill(made, batch, cfg=cfg, state=engine.empty(cfg, 3, 20))
    x, see = decoder.embed(made, batch.tokens, cfg), {k: getattr(batch, k) for k in ("order", "lo", "hi", "position")}
    length = jnp.where(batch.order >= 0, jnp.array(LENGTHS)[:, None], 0)
    hidden, cache = decoder.cached(made, x, cfg, decoder.empty_cache(cfg, 3, 20), **see, length=length)
    logits = decoder.logits(made, hidden, cfg)
    wants = np.stack([logits[r, n - 1] for r, n in enumerate(LENGTHS)])
    np.testing.assert_allclose(state.logits, wants, rtol=1e-5, atol=1e-5)
    at = jnp.array(LENGTHS, jnp.int32)[:, None]
    see = {"order": at, "lo": 0 * at, "hi": at, "position": jnp.repeat(at[:, :, None], 3, 2), "length": at + 1}
    token = jnp.argmax(state.logits, -1)[:, None]
    hidden, _ = decoder.cached(made, decoder.embed(made, token, cfg), cfg, cache, **see)
    switches, values = sample.prepare([GREEDY] * 3)
    state = engine.run_decode(made, state, np.int32(1), NO_ENDS, values, cfg=cfg, switches=switches)
    np.testing.assert_allclose(state.logits, decoder.logits(made, hidden, cfg)[:, 0], rtol=1e-5, atol=1e-5)


MODEL = dataclasses.replace(tiny_model(vocab=30, patch=2), segments=True)


def test_media_and_rope_deltas():
    """Pictures count fewer positions than tokens; an answer goes on from its row's last one."""
    rows = [[document("a", (2, 2))], [document("b", (1, 3), (2, 1), words=5)], [document("c", words=3)]]
    model = randomised(vlm.spec(MODEL))
    batch = batches.build(rows, Bucket(3, 20, 10, 3), 12, VOCAB)
    batch = jax.tree.map(jnp.asarray, batch)
    state = engine.run_prefill(model, batch, cfg=MODEL, state=engine.empty(MODEL, 3, 30))
    real = np.asarray(batch.order) >= 0
    deltas = np.asarray(state.position) - real.sum(1)
    assert deltas.tolist() == [2 - 4, (3 - 3) + (2 - 2), 0]
    switches, values = sample.prepare([Sampling()] * 3)
    at = int(state.cache.at)
    state = engine.run_decode(model, state, np.int32(4), NO_ENDS, values, cfg=MODEL, switches=switches)
    new = said(state, at)
    # The same without a cache: the answer's tokens in the row, with positions of their own.
    columns = {name: np.array(getattr(batch, name)) for name in ("tokens", "modality", "order", "lo", "hi", "position")}
    for r, n in enumerate(real.sum(1)):
        span, first = slice(n, n + 4), int(columns["position"][r, n - 1].max()) + 1
        columns["tokens"][r, span], columns["modality"][r, span] = new[r], 1
        columns["order"][r, span] = columns["hi"][r, span] = np.arange(n, n + 4)
        columns["lo"][r, span] = 0
        columns["position"][r, span] = np.arange(first, first + 4)[:, None]
    logits = jax.jit(vlm.logits, static_argnums=2)(model, batch.replace(**jax.tree.map(jnp.asarray, columns)), MODEL)
    for r, n in enumerate(real.sum(1)):
        np.testing.assert_allclose(state.logits[r], logits[r, n + 3], rtol=2e-5, atol=2e-5)
        assert np.argmax(logits[r, n - 1 : n + 3], -1).tolist() == new[r].tolist()
    # Media that are known already.
    media = engine.run_media(model, batch, cfg=MODEL)
    again = engine.run_prefill(
        model, batch.replace(patches=batch.patches[:, :0]), cfg=MODEL, state=engine.empty(MODEL, 3, 30), media=media
    )
    assert np.asarray(again.tokens)[:, :at].tolist() == np.asarray(state.tokens)[:, :at].tolist()


def test_bfloat16():
    """Runs, and says what float32 says where that is sure enough."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    state = engine.empty(CFG, 3, 40, jnp.bfloat16)
    state = engine.run_prefill(half, prompts(), cfg=CFG, state=state)
    assert state.cache.k.dtype == jnp.bfloat16
    assert state.logits.dtype == jnp.float32
    other = engine.run_prefill(params(), prompts(), cfg=CFG, state=started())
    scale = np.abs(other.logits).max()
    np.testing.assert_allclose(state.logits, other.logits, atol=0.05 * scale)
    switches, values = sample.prepare([Sampling()] * 3)
    state = engine.run_decode(half, state, np.int32(3), NO_ENDS, values, cfg=CFG, switches=switches)
    assert (said(state, 9)[:, 0] == np.argmax(other.logits, -1)).all()


@pytest.mark.parametrize(("name", "apart"), [("resampled, last image", True), ("patches, last image", False)])
def test_answers_look_at_media_that_are_projected_once(name, apart):
    """Rows of two, one and no pictures: the answer goes on looking at what the prompt's last token looks at."""
    (model, cfg), picture = fused.systems()[name], lambda h, w: Image(4 * h, 4 * w, b"")
    spans = ((picture(2, 2), Text("or"), picture(2, 3), Text("b")), (Text("so"), picture(1, 3)), (Text("hello"),))
    documents = [Document(str(n), of) for n, of in enumerate(spans)]
    params = randomised(vlm.spec(model))
    batch = fused.make([[one] for one in documents], Bucket(3, 24, 12, 2), model, cfg)
    real = (np.asarray(batch.order) >= 0).sum(1)
    switches, values = sample.prepare([GREEDY] * 3)
    made = engine.unstacked(params, model) if apart else params
    state = engine.empty(model, 3, 40, stacked=not apart, media=20)
    state = engine.run_prefill(made, batch, cfg=model, state=state)
    counts = (np.asarray(state.cache.media.order) >= 0).sum(1)
    assert counts.tolist() == ([6, 3, 0] if "resampled" in name else [10, 3, 0])
    assert int(state.cache.media.at) == counts.max()  # the padding's places are free again
    at = int(state.cache.at)
    state = engine.run_decode(made, state, np.int32(4), NO_ENDS, values, cfg=model, switches=switches)
    new = said(state, at)
    columns = {f: np.array(getattr(batch, f)) for f in ("tokens", "modality", "order", "lo", "hi", "position")}
    columns |= {f: np.array(getattr(batch, f)) for f in ("media_lo", "media_hi")}
    for r, n in enumerate(real):
        span = slice(n, n + 4)
        columns["tokens"][r, span], columns["modality"][r, span] = new[r], 1
        columns["order"][r, span] = columns["hi"][r, span] = np.arange(n, n + 4)
        columns["position"][r, span] = columns["position"][r, n - 1].max() + 1 + np.arange(4)[:, None]
        for f in ("lo", "media_lo", "media_hi"):
            columns[f][r, span] = columns[f][r, n - 1]
    logits = jax.jit(vlm.logits, static_argnums=2)(params, batch.replace(**jax.tree.map(jnp.asarray, columns)), model)
    for r, n in enumerate(real):
        np.testing.assert_allclose(state.logits[r], logits[r, n + 3], rtol=2e-5, atol=2e-5)
        assert np.argmax(logits[r, n - 1 : n + 3], -1).tolist() == new[r].tolist()


def test_a_decoder_alone_has_no_media_to_look_at():
    blocks = dataclasses.replace(BLOCKS, windowed=())
    cross = decoder.Config(30, blocks, cross=cross_attention.Config(24, 16, 2, 8, 40, every=3))
    with pytest.raises(InputError, match="the model that makes them"):
        engine.empty(cross, 1, 8)
