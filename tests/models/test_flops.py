"""FLOPs of a model against those of its compiled program, where that computes nothing twice."""

import dataclasses

import jax
import pytest
from tiny import tiny_model

from mmjax.core import config, hlo, spec
from mmjax.encoders import vit
from mmjax.models import flops, vlm
from mmjax.models.flops import Row
from mmjax.sequence import batch as batches
from mmjax.sequence import interleave
from mmjax.sequence.batch import Bucket
from mmjax.tokenizers.vocab import Vocab
from mmjax.train.step import loss_fn

BUCKET = Bucket(1, 32, 24, 2)


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
