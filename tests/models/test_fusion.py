"""Every way of fusing, end to end: packed = alone, the picture matters, gradients, no silent mismatch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fused import LATENTS, VOCAB, Letters, behind_an_encoder, connectors, even, make, systems
from tiny import randomised, tiny_model

from mmjax.connectors import linear, merger, pool
from mmjax.core.errors import InputError
from mmjax.models import decoder, encoder_decoder, vlm
from mmjax.models.tower import Media
from mmjax.nn import norm, transformer
from mmjax.sequence import behind, intervals, invariants
from mmjax.sequence.batch import Bucket
from mmjax.sequence.document import Document, Image, Text
from mmjax.sequence.interleave import Config, interleave
from mmjax.sequence.layout import layout
from mmjax.sequence.positions import MRope
from mmjax.train.step import loss_fn

NAMES = list(systems())
PACKED, ALONE = Bucket(2, 90, 24, 5), Bucket(1, 50, 12, 2)  # two shapes for all tests: compiling is what they cost


def documents():
    picture = lambda h, w: Image(4 * h, 4 * w, b"")  # noqa: E731
    return [
        Document("first", (picture(3, 2), Text("what"), Text("cat", "assistant", True))),
        Document("middle", (Text("see"), picture(1, 5), Text("well"), Text("no", "assistant", True))),
        Document("words", (Text("hello"), Text("you", "assistant", True))),
        Document("two", (picture(2, 2), Text("or"), picture(2, 3), Text("b", "assistant", True), Text("so"))),
        Document("turns", (picture(3, 3), Text("a", "assistant", True), Text("and"), Text("bc", "assistant", True))),
    ]


@functools.cache
def functions(name):
    model, cfg = systems()[name]
    model.refuse(cfg)
    logits = jax.jit(lambda params, batch: vlm.logits(params, batch, model))
    gradient = jax.jit(jax.grad(lambda params, batch: loss_fn(params, batch, model)[1]["loss"]))
    return model, cfg, logits, gradient, randomised(vlm.spec(model))


@pytest.mark.parametrize("name", NAMES)
def test_packed_equals_alone(name):
    model, cfg, logits, gradient, params = functions(name)
    first, middle, words, two, turns = documents()
    rows = [[first, middle, two], [words, turns]]
    packed = make(rows, PACKED, model, cfg)
    assert not np.any(invariants.violations(packed, 40, VOCAB.image, vlm.present(packed, model)))
    together = np.array(logits(params, packed))
    total = None
    for r, row in enumerate(rows):
        for number, document in enumerate(row):
            batch = make([[document]], ALONE, model, cfg)
            mine = together[r][np.array(packed.document[r]) == number]
            # The resampler multiplies features and latents of a row at once, so rounding depends on the row's length.
            bound = 2e-5 if "resampled" in name else 1e-5
            np.testing.assert_allclose(mine, np.array(logits(params, batch))[0, : len(mine)], atol=bound)
            grads = gradient(params, batch)
            total = grads if total is None else jax.tree.map(jnp.add, total, grads)

    # A gate's gradient sums terms of both signs over all tokens and channels: with a resampler (see above) and jax 0.12
    # it differs by 2.4e-5. With parameters in float64 it is less than 1e-6.
    bound = 4e-5 if "resampled" in name else 1e-5

    def close(a, b):  # sums of many terms: relative to the largest of them
        np.testing.assert_allclose(a, b, atol=bound * max(1.0, np.abs(b).max()))

    jax.tree.map(close, gradient(params, packed), total)


@pytest.mark.parametrize("name", NAMES)
def test_who_notices_a_picture(name):
    """Exactly the tokens that the system's mask says: nothing of another document, nothing too early."""
    model, cfg, logits, _, params = functions(name)
    _, _, _, two, turns = documents()
    batch = make([[turns, two]], PACKED, model, cfg)
    changed = batch.replace(patches=jnp.where(batch.patch_image[..., None] == 1, 255 - batch.patches, batch.patches))
    moved = np.abs(np.array(logits(params, batch)) - np.array(logits(params, changed)))[0].max(-1) > 1e-4
    tokens, document = np.array(batch.tokens[0]), np.array(batch.document[0])
    starts = np.flatnonzero((tokens == VOCAB.image_start) & (document == 1))
    at = np.arange(len(tokens))
    if cfg.cross != "none":
        expected = (document == 1) & (at >= starts[0])  # its mark looks at it, and all that follows sees the mark
    elif cfg.see == "prefix":
        expected = document == 1
    else:
        expected = (document == 1) & (at > starts[0])
    np.testing.assert_array_equal(moved, expected)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name):
    model, cfg, _, gradient, params = functions(name)
    grads = gradient(params, make([documents()[:3], documents()[3:]], PACKED, model, cfg))
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(g).all()
        assert np.abs(g).max() > 1e-8, jax.tree_util.keystr(path)


def test_last_image_alone_matters_where_nothing_else_carries_it():
    """In the first layer, text after the second picture looks at the second one only."""
    model, cfg, *_ = functions("resampled, last image")
    batch = make([[documents()[3]]], Bucket(1, 40, 12, 2), model, cfg)
    starts = np.flatnonzero(np.array(batch.tokens[0]) == VOCAB.image_start)
    lo, hi = np.array(batch.media_lo[0]), np.array(batch.media_hi[0])
    assert (lo[: starts[0]] > hi[: starts[0]]).all()
    assert (lo[starts[0] : starts[1]] == 0).all()
    assert (hi[starts[0] : starts[1]] == LATENTS - 1).all()
    n = int((np.array(batch.document[0]) == 0).sum())
    assert (lo[starts[1] : n] == LATENTS).all()
    assert (hi[starts[1] : n] == 2 * LATENTS - 1).all()


def test_gates_start_closed():
    """At its initial values cross-attention changes nothing: the language model speaks as it did."""
    from mmjax.core import spec

    model, cfg, logits, *_ = functions("resampled, last image")
    params = spec.init(vlm.spec(model), jax.random.key(0))
    batch = make([documents()[:3], documents()[3:]], PACKED, model, cfg)
    blind = batch.replace(media_hi=jnp.full_like(batch.media_hi, -1))
    np.testing.assert_array_equal(logits(params, batch), logits(params, blind))


def test_perceiver_labels_are_those_of_the_drawing(rng):
    """On device from the descriptors, on the host from counts: the same mask."""
    counts = [3, 2, 4]
    grid = jnp.array([[(1, 3, 1), (1, 1, 2), (2, 2, 1), (0, 0, 0)]])
    image = jnp.array([[0] * 3 + [1] * 2 + [2] * 4 + [-1] * 2])
    order = jnp.array([[*range(9), -1, -1]])
    keys, lo, hi = behind.labels(image, order, grid, 2)
    expected, (low, high) = intervals.perceiver(counts, 2)
    np.testing.assert_array_equal(keys[0, :9], expected[:9])
    np.testing.assert_array_equal(keys[0, 11:17], expected[9:])
    np.testing.assert_array_equal(keys[0, [9, 10, 17, 18]], -1)
    np.testing.assert_array_equal(lo[0, :6], low)
    np.testing.assert_array_equal(hi[0, :6], high)
    assert (lo[0, 6:] > hi[0, 6:]).all()


def test_windows_are_undone_by_the_slots():
    """Features lie window by window; the sequence shows them row by row, as without windows."""
    model, cfg, *_ = functions("windows")
    document = documents()[4]
    batch = make([[document]], Bucket(1, 40, 12, 1), model, cfg)
    plain = make([[document]], Bucket(1, 40, 12, 1), model, Config())
    for field in ("patches", "patch_position"):
        there, here = np.array(getattr(plain, field)[0]), np.array(getattr(batch, field)[0])
        slots = np.array(batch.slot[0])[np.array(batch.slot[0]) >= 0]
        np.testing.assert_array_equal(here[slots], there[: len(slots)])
    assert not np.array_equal(batch.patches, plain.patches)
    np.testing.assert_array_equal(batch.position, plain.position)


def test_merged_squares_lie_together_and_m_rope_counts_them():
    class Even:
        def grid(self, height, width):
            return 4, 6

    laid = layout(Document("d", (Image(9, 9, b""),)), Letters(), Even(), lambda g: g[1] * g[2] // 4)
    x = interleave(laid, VOCAB, Config(merge=2, window=2, rope=MRope(2)))
    # Two windows of 2 × 2 squares and one of 2 × 1, each of four patches.
    np.testing.assert_array_equal(x.patch_raster[:4], [0, 1, 6, 7])
    np.testing.assert_array_equal(x.patch_raster[4:8], [2, 3, 8, 9])
    np.testing.assert_array_equal(x.patch_raster[8:12], [12, 13, 18, 19])
    np.testing.assert_array_equal(x.window_lo, [0] * 16 + [16] * 8)
    np.testing.assert_array_equal(x.window_hi, [15] * 16 + [23] * 8)
    np.testing.assert_array_equal(x.patch_lo, 0)
    np.testing.assert_array_equal(x.slot[x.slot >= 0], [0, 1, 4, 2, 3, 5])


def test_a_connector_that_keeps_every_patch_shows_merged_squares_row_by_row():
    model, *_ = functions("causal")
    document = Document("d", (Image(16, 24, b""),))
    merged, plain = (make([[document]], Bucket(1, 40, 24, 1), model, c) for c in (Config(merge=2), Config()))
    assert not np.array_equal(merged.patches, plain.patches)
    slots = np.array(merged.slot[0])[np.array(merged.slot[0]) >= 0]
    np.testing.assert_array_equal(merged.patches[0, slots], plain.patches[0])
    np.testing.assert_array_equal(merged.patch_position[0, slots], plain.patch_position[0])


@pytest.mark.parametrize(
    ("name", "cfg", "says"),
    [
        ("causal", Config(cross="last_image"), "does not look"),
        ("resampled, last image", Config(), "looks at media by cross-attention"),
        ("causal", Config(window=2), r"\(0: in none\), but sequence\.window is 2"),
        ("windows", Config(), r"in windows of any .* sequence\.window is 0"),
    ],
)
def test_descriptors_that_the_model_does_not_read_or_lacks(name, cfg, says):
    with pytest.raises(InputError, match=says):
        systems()[name][0].refuse(cfg)


def test_sound_is_refused_by_a_model_without_an_encoder_for_it():
    model, cfg, *_, params = functions("causal")
    batch = make([[documents()[2]]], ALONE, model, cfg)
    with pytest.raises(InputError, match="no encoder for sound"):
        vlm.logits(params, batch.replace(frames=jnp.zeros((1, 2, 4))), model)


def test_loss_ignores_padding_and_prompt():
    model, cfg, logits, _, params = functions("causal")
    batch = make([documents()[:2]], PACKED, model, cfg)
    found = np.array(logits(params, batch), np.float64)
    log_p = found - np.log(np.exp(found).sum(-1, keepdims=True))
    trained = np.array(batch.weight) > 0
    assert trained.sum() == len("cat") + len("no") + 2
    expected = -log_p[trained][np.arange(trained.sum()), np.array(batch.target)[trained]]
    mean, sums = jax.jit(functools.partial(loss_fn, cfg=model))(params, batch)
    np.testing.assert_allclose(sums["loss"], expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(mean, expected.mean(), rtol=1e-5)
    right = found[trained].argmax(-1) == np.array(batch.target)[trained]
    np.testing.assert_allclose(sums["correct"], right.sum())


@pytest.mark.parametrize("name", ["causal", "resampled, last image"])
def test_an_empty_batch_teaches_nothing_and_breaks_nothing(name):
    model, cfg, _, gradient, params = functions(name)
    batch = make([], PACKED, model, cfg)
    assert loss_fn(params, batch, model)[0] == 0
    assert all(not np.any(g) and np.isfinite(g).all() for g in jax.tree.leaves(gradient(params, batch)))
    assert not np.any(invariants.violations(batch, 40, VOCAB.image, vlm.present(batch, model)))


@pytest.mark.slow
@pytest.mark.parametrize("fuse", ["sequence", "cross"])
@pytest.mark.parametrize("name", connectors())
def test_every_connector(name, fuse):
    """Documents packed = alone, and no invariant is broken; in the sequence and beside it."""
    model, cfg = behind_an_encoder(connectors()[name], fuse)
    model.refuse(cfg)
    documents = even()
    params, logits = randomised(vlm.spec(model)), jax.jit(lambda p, b: vlm.logits(p, b, model))
    packed = make([documents], Bucket(1, 110, 48, 7), model, cfg)
    assert not np.any(invariants.violations(packed, 40, VOCAB.image, vlm.present(packed, model)))
    together = np.array(logits(params, packed))
    for number, document in enumerate(documents):
        alone = np.array(logits(params, make([[document]], Bucket(1, 60, 24, 3), model, cfg)))[0]
        mine = together[0][np.array(packed.document[0]) == number]
        np.testing.assert_allclose(mine, alone[: len(mine)], atol=2e-5)
    changed = packed.replace(patches=255 - packed.patches)
    assert np.abs(np.array(logits(params, changed)) - together).max() > 1e-3  # pictures matter


def test_connectors_that_do_not_fit_are_refused():
    plain = tiny_model(vocab=40)
    with pytest.raises(InputError, match="call it as a function"):
        dataclasses.replace(plain, connector=pool.Config(raster=True))
    with pytest.raises(InputError, match="reads squares of 2 × 2 patches"):
        dataclasses.replace(plain, connector=merger.Config(16, 16)).refuse(Config())
    with pytest.raises(InputError, match="the encoder has no fixed number"):
        dataclasses.replace(plain, connector=linear.Config(16, 16, per_picture=4))
    with pytest.raises(InputError, match="reads features of 12 values, and the encoder makes some of 16"):
        dataclasses.replace(plain, connector=linear.Config(12, 16))


def test_an_encoder_decoder_needs_a_second_stream():
    plain, blocks = tiny_model(vocab=40), transformer.Config(16, 1, 2, 2, 8, 24)
    two = encoder_decoder.Config(40, blocks, dataclasses.replace(blocks, look=16))
    model = dataclasses.replace(plain, decoder=two)
    batch = make([documents()[:1]], ALONE, plain, Config())
    with pytest.raises(InputError, match=r"make batches with sequence\.answer"):
        vlm.hidden({}, batch, model)


def test_segments_add_the_vector_of_each_modality():
    cfg = dataclasses.replace(tiny_model(vocab=40), segments=True)
    params = randomised(vlm.spec(cfg))
    batch = make([documents()[:2]], Bucket(1, 90, 24, 5), cfg, Config())

    def hidden(segments, table=0.0, media=0.0):
        now = params | {
            "segments": segments,
            "decoder": params["decoder"] | {"embed": params["decoder"]["embed"] + table},
        }
        seen = vlm.hidden(now, batch, cfg, media=Media(vlm.media(params, batch, cfg).tokens + media))
        return seen[batch.document >= 0]

    # Moving the vector of a modality is moving the vectors of all its tokens: text by way of the token table.
    plain = params["segments"]
    np.testing.assert_allclose(hidden(plain.at[1].add(0.5)), hidden(plain, table=0.5), atol=1e-5)
    np.testing.assert_allclose(hidden(plain.at[2].add(0.5)), hidden(plain, media=0.5), atol=1e-5)
    assert np.abs(hidden(plain.at[2].add(0.5)) - hidden(plain)).max() > 1e-2


def test_deepstack_adds_to_the_first_blocks_at_media_tokens_alone():
    """And a cache changes nothing; a row without media is what it was."""
    model, cfg = behind_an_encoder(merger.Config(16, 16))
    wide = dataclasses.replace(model, deepstack=(0, 1), deep=merger.Config(16, 16, norm_after=True))
    params = randomised(vlm.spec(wide))
    batch = make([even()[:1], [documents()[2]]], PACKED, model, cfg)
    seen = vlm.media(params, batch, wide)
    assert seen.deep.shape == (2, *seen.tokens.shape)
    with_deep, without = vlm.hidden(params, batch, wide), vlm.hidden(params, batch, model)
    changed = np.abs(with_deep - without).max(-1) > 1e-4
    assert changed[0][batch.slot[0] >= 0].all()
    assert not changed[0][: int(np.argmax(batch.slot[0] >= 0))].any()
    assert not changed[1].any()
    # The first block's by hand: what it puts out, and what is added, go into the second.
    one = dataclasses.replace(wide, deepstack=(0,))
    only = params | {"deep": jax.tree.map(lambda p: p[:1], params["deep"])}
    blocks = dataclasses.replace(model.decoder.blocks, layers=1)
    see = {"order": batch.order, "lo": batch.lo, "hi": batch.hi, "position": batch.position}
    layers = [jax.tree.map(lambda p, i=i: p[i : i + 1], params["decoder"]["blocks"]) for i in range(2)]
    x = decoder.embed(params["decoder"], batch.tokens, model.decoder)
    media = (batch.slot >= 0)[..., None]
    x = jnp.where(media, np.take_along_axis(seen.tokens, np.maximum(batch.slot, 0)[..., None], 1), x)
    x = transformer.apply(layers[0], x, blocks, **see)
    x = x + jnp.where(media, np.take_along_axis(seen.deep[0], np.maximum(batch.slot, 0)[..., None], 1), 0)
    x = norm.apply(params["decoder"]["norm"], transformer.apply(layers[1], x, blocks, **see), model.decoder.norm)
    np.testing.assert_allclose(vlm.hidden(only, batch, one), x, atol=1e-5)
    cached, cache = vlm.prefill(params, batch, wide, decoder.empty_cache(model.decoder, 2, 100))
    there = batch.order >= 0
    np.testing.assert_allclose(cached[there], with_deep[there], atol=1e-5)
    assert int(cache.at) == batch.order.shape[1]
