"""What the planner takes attention's loops to be, against the loops' own bounds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model

from mmjax.connectors import perceiver, qformer
from mmjax.core import hlo, spec
from mmjax.core.hlo import Kernel
from mmjax.core.hlo_text import Op, Shape
from mmjax.core.meshes import MeshConfig, make_mesh
from mmjax.models import encoder_decoder, flops, vlm
from mmjax.models.flops import Row
from mmjax.nn import attention as model
from mmjax.nn import cross_attention, relative
from mmjax.nn.kernels import gpu_blocks, tpu_blocks, xla
from mmjax.nn.kernels.inputs import Inputs
from mmjax.plan import attention, sees
from mmjax.sequence import batch as batches
from mmjax.sequence import behind, interleave, intervals
from mmjax.sequence.batch import Bucket
from mmjax.tokenizers.vocab import Vocab
from mmjax.train.step import loss_fn


def bounds(order, lo, hi) -> float:
    """Turns of the loop over keys, on average, from the function that computes its bounds."""
    n = len(order)
    q, k = jnp.zeros((1, 1, 1, n, 4)), jnp.zeros((1, 1, n, 4))
    label = (jnp.asarray(a, jnp.int32)[None] for a in (order, lo, hi))
    x = Inputs(q, k, k, *label, None, None, None, None, None)
    _, _, start, stop = xla._tiles(x, xla.Tiling.of(x))
    return float(jnp.maximum(stop - start, 0).mean())


@pytest.mark.parametrize("documents", [(1500,), (300, 700, 20, 480), (1024,)])
def test_a_packed_sequence(documents):
    row = Row(documents, ())
    lo, hi = zip(*(intervals.causal(n) for n in documents), strict=True)
    first = np.repeat(np.cumsum((0, *documents[:-1])), documents)
    theirs = bounds(np.arange(row.tokens), np.concatenate(lo) + first, np.concatenate(hi) + first)
    assert sees.turns(sees.sequence(row, "causal", 0)) == pytest.approx(theirs)


@pytest.mark.parametrize("prefix", [0, 1])
def test_pictures_with_their_class_tokens_behind_all_patches(prefix):
    pictures = (576, 300, 600)
    lo, hi = intervals.blocks(pictures)
    image = np.repeat(np.arange(3), pictures)
    order, grid = np.arange(sum(pictures)), np.array([[[1, 1, n] for n in pictures]])
    if prefix:
        labels, first, last = behind.labels(*(jnp.asarray(a, jnp.int32) for a in (image[None], order[None], grid)), 1)
        order, lo = np.asarray(labels[0]), np.append(lo + image, first[0])
        hi = np.append(hi + image + 1, last[0])
    seen = sees.patches(Row((), pictures), prefix)
    np.testing.assert_array_equal(seen.order, order)
    np.testing.assert_array_equal(seen.lo, lo)
    np.testing.assert_array_equal(seen.hi, hi)
    assert sees.turns(seen) == pytest.approx(bounds(order, lo, hi))


@pytest.mark.parametrize(("heads", "kv", "size"), [(32, 32, 128), (28, 4, 128), (16, 16, 64)])
def test_the_kernels_tiles_are_those_that_they_compute(heads, kv, size):
    """Their own ranges: which tiles are touched, and which blocks lie between the first and the last."""
    row = Row((1500, 300, 1200), ())
    seen = sees.sequence(row, "causal", 0)
    n = row.tokens
    q, k = jnp.zeros((1, kv, heads // kv, n, size), jnp.bfloat16), jnp.zeros((1, kv, n, size), jnp.bfloat16)
    label = (jnp.asarray(a, jnp.int32)[None] for a in (seen.order, seen.lo, seen.hi))
    x, g = tpu_blocks.layout(Inputs(q, k, k, *label, None, None, None, None, None))
    of, touch = tpu_blocks.ranges(x, g)
    of = {name: np.asarray(a[0]) for name, a in of.items()}
    parts = (of["first"][:, None] <= of["high"]) & (of["low"] <= of["last"][:, None])
    reach = tpu_blocks.span(touch)
    computed, fetched = sees.shares(seen, g.blocks)
    assert computed == pytest.approx(float(parts.mean()))
    assert fetched == pytest.approx(float((reach["end"] - reach["begin"]).sum() / touch.size))


def test_loops_are_told_apart_by_their_scope():
    cfg = tiny_model(vocab=64)
    vision = dataclasses.replace(cfg.vision, blocks=dataclasses.replace(cfg.vision.blocks, windowed=(0,)))
    row = Row((2048,), (1024, 1024), window=64)
    told = attention.hints(dataclasses.replace(cfg, vision=vision), row, interleave.PLAIN, 2048).turns

    # The GPU's forward kernel: three rows, 4 heads of 8, two products of every tile that a causal row reaches.
    line = 'custom_call_target="__gpu$xla.gpu.triton", op_name="jvp(decoder)/attention", name = "forward_kernel"'
    kernel = attention.hints(cfg, row, interleave.PLAIN, 2048, 3).kernel(
        Op("k", Shape(), "", "", (), line, False), None, 5.0
    )
    tile = gpu_blocks.Plan.of(attention._inputs(cfg.decoder.blocks, 2048, 2048, 1, "bfloat16")).forward
    reached = sum(-(-(i + 1) * tile.queries // tile.keys) for i in range(2048 // tile.queries))
    assert kernel == Kernel(2.0 * 2 * (3 * 4 * 8) * reached * tile.queries * tile.keys, 5.0)

    def turns(scope: str) -> float | None:
        return told(Op("loop", Shape(), "while", "", (), f'metadata={{op_name="{scope}"}}', False))

    assert turns("jit(step)/transpose(jvp(decoder))/while/body/attention/while") == 4.5  # of 8 blocks, causal
    # One layer sees pictures of 4 blocks, the other its windows, which end with the blocks.
    assert turns("jit(step)/jvp(vision)/while/body/attention/while") == (4 + 1) / 2
    assert turns("jit(step)/jvp(decoder)/while") is None
    assert turns("jit(step)/attention/while") is None


def op(scope: str, kernel: str = "") -> Op:
    return Op("k", Shape(), "while", "", (), f'op_name="{scope}/attention", name = "{kernel}"', False)


def test_devices_that_split_a_row_share_its_pairs(monkeypatch):
    """Gathered, the last of four devices sees 7/16 of a causal row; on a ring all compute the same in four steps."""
    cfg, row = tiny_model(vocab=64), Row((16384,), ())

    def found(length: int) -> tuple[float, float]:
        told = attention.hints(cfg, row, interleave.PLAIN, 0, length=length)
        return told.turns(op("decoder")), told.kernel(op("decoder", "by_key"), None, 0.0).flops

    turns, flops = found(1)
    gathered = found(4)
    assert gathered[0] == pytest.approx(turns * 7 / 4, rel=0.05)
    assert gathered[1] == pytest.approx(flops * 7 / 16, rel=0.05)
    monkeypatch.setattr(attention, "GATHERED", 1)
    ring = found(4)
    assert ring[0] == pytest.approx(turns / 4, rel=0.05)
    assert ring[1] == pytest.approx(flops / 16, rel=0.05)


def test_rows_that_do_not_divide_are_filled_up():
    *_, last = sees.split(sees.sequence(Row((30,), ()), "causal", 0), 4, True)
    assert [len(step.order) for step in last] == [8] * 4
    assert sorted(np.concatenate([step.order for step in last])) == [-1, -1, *range(30)]
    assert {len(step.lo) for step in last} == {8}


@pytest.mark.parametrize(
    ("heads", "kv", "split", "held"),
    [(32, 8, 4, (8, 2)), (32, 2, 4, (8, 1)), (12, 6, 4, (3, 3)), (14, 2, 4, (14, 2)), (5, 5, 2, (5, 5))],
)
def test_heads_that_do_not_divide_stay_whole(heads, kv, split, held):
    cfg = dataclasses.replace(tiny_model(vocab=64).decoder.blocks, heads=heads, kv_heads=kv)
    assert attention._held(cfg, split) == held


@pytest.mark.parametrize("kv", [2, 4, 3])
def test_what_goes_round_is_what_the_model_sends_round(kv, monkeypatch):
    """Devices 2 × 2 × 2, four rows; a limit on either side of what they hold."""
    cfg = dataclasses.replace(tiny_model(vocab=64).decoder.blocks, heads=12, kv_heads=kv)
    mesh = make_mesh(MeshConfig(data=2, sequence=2, tensor=2))
    held = 2 * (kv // 2 if kv % 2 == 0 else kv) * 2 * cfg.head * 2 * 64
    for limit in (held - 1, held):
        monkeypatch.setattr(attention, "GATHERED", limit)
        monkeypatch.setattr(model, "GATHERED", limit)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            theirs = model.goes_round(4, 64, 64, kv, 2 * cfg.head * 2)
        assert attention.goes_round(cfg, 64, 2, 2, "bfloat16", 2) is theirs is (limit < held)


def test_parts_are_whole_words_of_a_scope():
    assert attention.part_of("jit(step)/transpose(jvp(decoder))/while/body/mlp/dot") == "decoder"
    assert attention.part_of("jit(step)/dynamic_update_slice") == "other"


def test_a_sliding_window_reaches_no_further():
    row = Row((700, 324), ())
    seen = sees.sequence(row, "causal", 0, 128)
    at, start = np.arange(1024), np.repeat([0, 700], [700, 324])
    assert (seen.lo == np.maximum(start, at - 127)).all()
    assert sees.turns(seen) < sees.turns(sees.sequence(row, "causal", 0))


def listed(seen: sees.Seen) -> list[list[int]]:
    return [seen.order.tolist(), seen.lo.tolist(), seen.hi.tolist()]


def test_text_looks_at_the_pictures_of_its_document():
    """Three pictures of two tokens each: two of them in the first of two documents."""
    row = Row((6,), (9, 9, 9))
    assert listed(sees.media(row, "last_image", 6)) == [[*range(6)], [0, 0, 2, 2, 4, 4], [1, 1, 3, 3, 5, 5]]
    assert listed(sees.media(row, "all_images", 6)) == [[*range(6)], [0] * 6, [5] * 6]
    row = Row((4, 2), (9, 9, 9))
    assert listed(sees.media(row, "last_image", 6)) == [[*range(6)], [0, 0, 2, 2, 4, 4], [1, 1, 3, 3, 5, 5]]
    assert listed(sees.media(row, "all_images", 6)) == [[*range(6)], [0] * 4 + [4] * 2, [3] * 4 + [5] * 2]
    alone = Row((4, 2), (9,))
    assert listed(sees.media(alone, "last_image", 2)) == [[0, 1], [0] * 6, [1] * 4 + [-1] * 2]


@pytest.mark.parametrize("cross", ["last_image", "all_images"])
def test_as_many_pairs_as_the_models_flops_take(cross):
    row = flops.full_row(Bucket(1, 600, 96, 6), interleave.Config(cross=cross), 200)
    seen = sees.media(row, cross, 60)
    assert (seen.hi - seen.lo + 1).sum() == row.tokens * row.shown * 60 / len(row.pictures)


def test_two_streams():
    row = Row((3, 4), (), answer=5)
    assert listed(sees.whole(row.documents)) == [[*range(7)], [0] * 3 + [3] * 4, [2] * 3 + [6] * 4]
    assert sees.answers(row) == (3, 2)
    assert listed(sees.questions(row)) == [[*range(7)], [0] * 3 + [3] * 2, [2] * 3 + [6] * 2]


def test_latents_look_at_their_own_picture():
    """Label by label what the resampler itself is given."""
    pictures, many = (5, 3), 2
    image, grid = jnp.asarray([np.repeat([0, 1], pictures)], jnp.int32), jnp.asarray([[[1, 1, n] for n in pictures]])
    order, lo, hi = behind.labels(image, jnp.arange(8, dtype=jnp.int32)[None], grid.astype(jnp.int32), many)
    assert listed(sees.latents(pictures, many, many)) == [a[0].tolist() for a in (order, lo, hi)]


def systems():
    """name → (model, descriptors, where its attention stands): each with loops in all places that it has."""
    plain = tiny_model(vocab=64)
    blocks = dataclasses.replace(plain.decoder.blocks, rope=None, kv_heads=4, relative=relative.Config(4, both=True))
    answer = dataclasses.replace(blocks, look=16, relative=relative.Config(4))
    reads = qformer.Config(16, 16, 2, 2, 2, 24, outputs=16, text=True, vocab=40)
    two = encoder_decoder.Config(64, blocks, answer)
    cross = cross_attention.Config(16, 16, 2, 8, 24, every=1)
    resampler = perceiver.Config(16, 16, 150, 1, 2, 8, 24)
    flamingo = dataclasses.replace(plain.decoder, cross=cross)
    beside = dataclasses.replace(plain, connector=resampler, decoder=flamingo)
    streams = dataclasses.replace(plain, connector=reads, decoder=two)
    vision, decoder, look = attention.Place("vision"), attention.Place("decoder"), "look"
    return {
        "resampler, cross-attention": (
            beside,
            interleave.Config(cross="last_image"),
            {vision, attention.Place("connector", "", look), decoder, attention.Place("decoder", "", look)},
        ),
        "two streams, Q-Former": (
            streams,
            interleave.Config(position="sequential", answer=300, instruction=140),
            {
                *(vision, decoder, attention.Place("decoder", "answer"), attention.Place("decoder", "answer", look)),
                *(attention.Place("connector"), attention.Place("connector", "", look)),
            },
        ),
    }


@pytest.fixture
def own_scopes():
    """No program from a cache that was compiled with other scopes."""
    name = "jax_compilation_cache_include_metadata_in_key"
    before = getattr(jax.config, name)
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)


@pytest.mark.parametrize("name", systems())
def test_every_loop_of_a_program_is_known(name, own_scopes):
    """Compiled for CPUs, where attention is loops over tiles: without hints, each of them would count once."""
    cfg, see, places = systems()[name]
    row, vocab = Row((300, 300), (300, 300), answer=see.answer), Vocab(*range(9), size=64)
    batch = batches.abstract(Bucket(1, 600, 600, 2, answers=see.answer), cfg.vision.embed.values, vocab, see)

    def loss(params, batch):
        return loss_fn(params, batch, cfg)[0]

    lowered = jax.jit(loss).lower(spec.abstract(vlm.spec(cfg)), batch)
    module = hlo.parse(lowered.compile({"xla_backend_optimization_level": 0}).as_text())
    assert {attention.Place.of(u.scope) for u in hlo.count(module).unknown} == places
    media = 2 * cfg.connector.per_picture
    assert not hlo.count(module, attention.hints(cfg, row, see, media)).unknown


def test_kernels_compute_what_is_seen_in_every_place():
    """Of four documents of 512 tokens with a picture each, a quarter of all pairs of two documents or pictures."""
    cfg, see, _ = systems()["two streams, Q-Former"]
    cfg = dataclasses.replace(cfg, connector=dataclasses.replace(cfg.connector, queries=256))
    row, stated = Row((512,) * 4, (1024,) * 4, answer=2048), Kernel(1e6, 0.0)
    told = attention.hints(cfg, row, dataclasses.replace(see, instruction=256), 1024).kernel

    def share(scope: str) -> float:
        return told(Op("k", Shape(), "", "", (), f'op_name="{scope}"', False), stated, 0.0).flops / 2e6

    for scope in ("connector/attention", "connector/look", "decoder/attention", "decoder/answer/look"):
        assert share(f"jvp({scope.replace('/', ')/', 1)}") == 1 / 4
    assert 1 / 8 < share("jvp(decoder)/answer/attention") < 1 / 4  # causal
    crossed, see, _ = systems()["resampler, cross-attention"]
    told = attention.hints(crossed, row, see, 4096).kernel
    assert share("jvp(decoder)/look") == 1 / 4
