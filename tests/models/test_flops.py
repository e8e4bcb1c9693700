"""FLOPs of a model against those of its compiled program, where that computes nothing twice."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import tiny_model

from mmjax.connectors import perceiver
from mmjax.core import config, hlo, spec, tree
from mmjax.encoders import vit
from mmjax.models import encoder_decoder, flops, vlm
from mmjax.models.flops import Row
from mmjax.nn import cross_attention, lora
from mmjax.sequence import batch as batches
from mmjax.sequence import interleave
from mmjax.sequence.batch import Bucket, build
from mmjax.sequence.layout import IMAGE, TEXT, Layout, Piece
from mmjax.tokenizers.vocab import Vocab
from mmjax.train.step import loss_fn

BUCKET = Bucket(1, 32, 24, 2)
VOCAB = Vocab(*range(9), size=64)


def program(cfg: vlm.Config, grad: bool) -> float:
    vocab = Vocab(*range(9), size=cfg.decoder.vocab)
    batch = batches.abstract(BUCKET, cfg.vision.embed.values, vocab)
    f = (lambda p, b: jax.grad(lambda p: loss_fn(p, b, cfg)[0])(p)) if grad else (lambda p, b: loss_fn(p, b, cfg)[0])
    return hlo.count(hlo.parse(jax.jit(f).lower(spec.abstract(vlm.spec(cfg)), batch).compile().as_text())).flops


@pytest.mark.parametrize("classes", [0, 1])
def test_forward_and_backward_are_those_of_the_program(classes):
    """The program computes whole tiles of scores, here one; so the row's intervals are taken to be whole as well."""
    cfg = tiny_model(vocab=64)
    if classes:
        blocks = dataclasses.replace(cfg.vision.blocks, rope=None)
        vision = dataclasses.replace(cfg.vision, blocks=blocks, classes=1, table=vit.Table(4, 4))
        cfg = dataclasses.replace(cfg, vision=vision)
    row = Row((32,), (12, 12))
    found = flops.of_row(cfg, row)
    matrices = sum(part.matrices for part in found.forward.values())

    def scores(b, n):
        return 4.0 * b.layers * b.heads * b.head * n**2

    attention = scores(cfg.decoder.blocks, 32) + scores(cfg.vision.blocks, 24 + 2 * classes)
    assert program(cfg, False) == pytest.approx(matrices + attention, rel=0.02)
    # Backwards the scores are computed again: five products for two.
    assert program(cfg, True) == pytest.approx(3 * matrices + 3.5 * attention, rel=0.02)


def test_attention_counts_what_is_seen():
    cfg = tiny_model(vocab=64)
    whole, parts = (flops.of_row(cfg, Row(d, (24,))).forward["decoder"].attention for d in ((32,), (16, 16)))
    each = 4.0 * 2 * 4 * 8
    assert (whole, parts) == (each * 32 * 33 / 2, each * 2 * 16 * 17 / 2)
    both = flops.of_row(cfg, Row((32,), (12, 12)), "bidirectional_images").forward["decoder"].attention
    assert both == whole + each * 2 * 12 * 11 / 2
    near = dataclasses.replace(cfg.decoder, window=5, blocks=dataclasses.replace(cfg.decoder.blocks, windowed=(1,)))
    some = flops.of_row(dataclasses.replace(cfg, decoder=near), Row((32,), (24,))).forward["decoder"].attention
    assert some == each / 2 * (32 * 33 / 2 + sum(min(i + 1, 5) for i in range(32)))
    one, two = (flops.of_row(cfg, Row((32,), p)).forward["vision"].attention for p in ((24,), (12, 12)))
    assert (one, two) == (4.0 * 2 * 2 * 8 * 24**2, 4.0 * 2 * 2 * 8 * 2 * 12**2)


def test_windows_are_smaller_than_pictures():
    cfg = tiny_model(vocab=64)
    vision = dataclasses.replace(cfg.vision, blocks=dataclasses.replace(cfg.vision.blocks, windowed=(0,)))
    found = flops.of_row(dataclasses.replace(cfg, vision=vision), Row((32,), (24,), window=4))
    assert found.forward["vision"].attention == 4.0 * 2 * 8 * (24**2 + 24 * 4)


def test_what_is_frozen_has_no_gradients():
    cfg, row = tiny_model(vocab=64), Row((32,), (24,))
    parts = flops.of_row(cfg, row).forward
    vision, connector, decoder = (parts[n].matrices for n in ("vision", "connector", "decoder"))
    a, b = parts["vision"].attention, parts["decoder"].attention
    assert flops.of_row(cfg, row).total == 3 * (vision + connector + decoder + a + b)
    frozen = flops.of_row(cfg, row, frozen=("vision",))
    assert frozen.total == vision + a + 3 * (connector + decoder + b)
    head = flops.of_row(cfg, row, frozen=("vision", "decoder"))
    assert head.total == vision + a + 3 * connector + 2 * decoder + 3 * b


def test_a_full_row():
    row = flops.full_row(Bucket(4, 100, 50, 3), interleave.Config(window=4, merge=2), document=30)
    assert row == Row((30, 30, 30, 10), (17, 17, 16), 64)
    assert flops.full_row(Bucket(4, 100, 2, 3)) == Row((100,), (1, 1))


def test_a_language_model_alone_is_the_decoder_of_another():
    cfg, row = tiny_model(vocab=64), flops.full_row(Bucket(2, 16, 0, 0), document=12)
    assert row == Row((12, 4), ())
    alone = flops.of_row(vlm.Config(None, None, cfg.decoder), row)
    assert alone.forward == {"decoder": flops.of_row(cfg, row).forward["decoder"]}
    assert alone.total == flops.of_row(cfg, row, frozen=("vision", "connector")).total


def looking(**changes):
    """Layers before every other block, through which text looks at four media tokens of each picture."""
    plain = tiny_model(vocab=64)
    cross = cross_attention.Config(16, 16, 4, 8, 20, every=2, **changes)
    connector = perceiver.Config(16, 16, 4, 1, 2, 8, 24)
    return dataclasses.replace(plain, connector=connector, decoder=dataclasses.replace(plain.decoder, cross=cross))


def test_text_that_looks_at_all_pictures_looks_at_more():
    """Of full rows: those of its document, which stand before it; of batches, as often as its tokens look."""
    cfg = looking()
    full = {
        cross: flops.full_row(Bucket(1, 32, 24, 4), interleave.Config(cross=cross), 16)
        for cross in ("last_image", "last_images", "all_images")
    }
    assert [row.shown for row in full.values()] == [1.0, 2.0, 2.0]
    one, _, all_of_two = (flops.of_row(cfg, row).forward["decoder"] for row in full.values())
    assert one.matrices == all_of_two.matrices
    assert all_of_two.attention - one.attention == 4 * 4 * 8 * 32 * 4


def piece(length, grid=None, train=False):
    if grid is None:
        return Piece(TEXT, length, (9,) * length, train=train)
    return Piece(IMAGE, length, (), grid, media=4)


@pytest.mark.parametrize(
    ("sees", "blind", "looks"),
    [("last_image", "mlp", 10 * 4), ("all_images", "mlp", 4 * 4 + 6 * 8), ("last_images", "all", 10 * 4 + 8)],
)
def test_a_batch_is_counted_as_it_is(sees, blind, looks):
    """Two documents in a row, and none in the other; the first has its pictures apart from each other."""
    cfg, sequence = looking(blind=blind), interleave.Config(cross=sees)
    one = Layout.of("a", (piece(2), piece(0, (1, 2, 2)), piece(4), piece(0, (1, 2, 3)), piece(5)))
    two = Layout.of("b", (piece(7),))
    row = [(interleave.interleave(x, VOCAB, sequence), x) for x in (one, two)]
    rows = [[], [(x, [np.zeros((p.grid[1] * p.grid[2], 48), np.uint8) for p in of.pieces if p.grid]) for x, of in row]]
    batch = build(rows, Bucket(2, 24, 12, 3), 48, VOCAB, sequence)
    (found,) = flops.rows_of(batch, cfg, sequence)
    assert (found.documents, found.pictures) == ((11, 7), (4, 6))
    assert found.shown * 18 * 4 == pytest.approx(looks)


def test_answers_of_a_batch_are_counted_without_padding():
    blocks = dataclasses.replace(tiny_model(vocab=64).decoder.blocks, rope=None)
    own = encoder_decoder.Config(64, blocks, dataclasses.replace(blocks, look=16))
    cfg, sequence = dataclasses.replace(tiny_model(vocab=64), decoder=own), interleave.Config(answer=16)
    laid = Layout.of("a", (piece(5), piece(3, train=True)), parted=True)
    batch = build(
        [[(interleave.interleave(laid, VOCAB, sequence), [])]], Bucket(1, 8, 1, 1, 0, 16), 48, VOCAB, sequence
    )
    assert flops.rows_of(batch, cfg, sequence) == [Row((5,), (), 0, 3)]


def test_norms_and_tables_are_no_matrices():
    cfg = tiny_model(vocab=64)
    sizes = flops.matrices(cfg)
    assert "decoder/embed" in sizes  # the tied head
    assert not any(n.endswith(("scale", "bias")) for n in sizes)
    untied = dataclasses.replace(cfg, decoder=dataclasses.replace(cfg.decoder, tied=False))
    assert "decoder/embed" not in flops.matrices(untied)


def test_llava_7b_by_hand():
    """Its matrices times tokens, and causal attention within five documents of 820 tokens."""
    cfg = config.load("llava_7b")
    row = flops.full_row(Bucket(256, 4100, 2880, 5), cfg.sequence, 820)
    found = flops.of_row(cfg.model, row)
    llama = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32064
    clip = 23 * (4 * 1024**2 + 2 * 1024 * 4096)
    assert found.forward["decoder"].matrices == 2 * 4100 * llama
    assert found.forward["vision"].matrices == 2 * (2885 * clip + 2880 * 588 * 1024)
    assert found.forward["connector"].matrices == 2 * 2880 * (1024 * 4096 + 4096**2)
    assert found.forward["decoder"].attention == 5 * 32 * 4 * 4096 * 820 * 821 / 2
    assert found.forward["vision"].attention == 5 * 23 * 4 * 1024 * 577**2
    parts = found.forward.values()
    assert found.total == 3 * sum(p.matrices + p.attention for p in parts)


def test_adapters_are_two_thin_products_more():
    """Their own program's, forwards; and of a frozen base no gradient of its kernels."""
    cfg, adapters, row = tiny_model(vocab=64), lora.Config(4), Row((32,), (12, 12))
    spec_of = lora.spec(vlm.spec(cfg), adapters)
    plain, found = flops.of_row(cfg, row), flops.of_row(cfg, row, adapters=adapters)
    # A and B of two layers: q, k, v, out; gate and up, down.
    thin = 2.0 * 32 * 2 * 4 * ((16 + 32) + 2 * (16 + 16) + (32 + 16) + 2 * (16 + 24) + (24 + 16))
    assert found.forward["decoder"].matrices == plain.forward["decoder"].matrices + thin
    assert found.forward["vision"] == plain.forward["vision"]
    batch = batches.abstract(BUCKET, cfg.vision.embed.values, Vocab(*range(9), size=cfg.decoder.vocab))
    text = jax.jit(lambda p, b: loss_fn(p, b, cfg)[0]).lower(spec.abstract(spec_of), batch).compile().as_text()
    more = hlo.count(hlo.parse(text)).flops - program(cfg, False)
    assert more == pytest.approx(thin, rel=0.02)

    every = tree.flatten(spec_of)
    still = tree.cover(spec_of, [n for n in every if not n.endswith(("/kernel/a", "/kernel/b"))])
    part, frozen = found.forward, flops.of_row(cfg, row, frozen=still, adapters=adapters)
    forward = sum(p.matrices + p.attention for p in part.values())
    assert frozen.total == forward + part["decoder"].matrices + thin + 2 * part["decoder"].attention
