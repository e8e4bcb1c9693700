"""What budgets count of attention to other tokens, against the parameters and caches of the models themselves."""

import dataclasses

import jax
import pytest
from tiny import tiny_model

from mmjax.connectors import perceiver
from mmjax.models import decoder, encoder_decoder, flops, vlm
from mmjax.nn import cross_attention
from mmjax.sequence.interleave import Config
from mmjax.sequence.layout import IMAGE, TEXT, Layout, Piece

HEADS = 4 * 8  # heads × head size


def words(n, train=False):
    return Piece(TEXT, n, (9,) * n, train=train)


def picture(length):
    """Four media tokens of 2 × 3 patches."""
    return Piece(IMAGE, length, (), (1, 2, 3), media=4)


def products(cfg, seen):
    """FLOPs of the language model's kernels; `seen`: how many tokens go through one, by its path."""
    sizes = {name: size for name, size in flops.matrices(cfg).items() if name.startswith("decoder/")}
    return sum(2 * size * seen(name.split("/")) for name, size in sizes.items())


def held(cache):
    """Bytes of keys and values."""
    kept = [x for of in (cache, cache.media) for x in jax.tree.leaves((of.k, of.v))]
    return sum(x.size * x.dtype.itemsize for x in kept)


@pytest.mark.parametrize(
    ("sees", "blind", "pairs"),
    [
        ("last_image", "mlp", 4 * 4 + 4 * 6),  # from the token before a picture on
        ("all_images", "mlp", 4 * 4 + 8 * 6),
        ("last_images", "all", 8 * 2 + 4 * 4 + 4 * 6),
    ],
)
def test_layers_that_look_at_media(sees, blind, pairs):
    """Three words, a picture, four words, a picture, five words."""
    plain = tiny_model(vocab=64)
    cross = cross_attention.Config(16, 16, 4, 8, 20, every=2, kv_heads=2, gated=True, blind=blind)
    cfg = dataclasses.replace(
        plain,
        connector=perceiver.Config(16, 16, 4, 1, 2, 8, 24),
        decoder=dataclasses.replace(plain.decoder, cross=cross),
    )
    laid = Layout.of("a", (words(3), picture(0), words(4), picture(0), words(5)))
    costs = dataclasses.replace(vlm.costs(cfg, Config(cross=sees)), encoder=None)

    def seen(path):
        if path == ["decoder", "embed"]:  # the head, of the last token
            return 1
        return 8 if path[1] == "cross" and path[-2] in ("k", "v") else 12

    attention = 4 * HEADS * (2 * 12 * 13 // 2 + pairs)
    assert costs.prefill(laid) == products(cfg, seen) + attention
    cache = jax.eval_shape(lambda: decoder.empty_cache(cfg.decoder, 1, 12 + 5, media=8))
    assert costs.cache(laid, 5) == held(cache)


def test_an_encoder_decoder():
    """A picture and five words are read, three said: the decoder's own keys are of these, the others' of all read."""
    plain = tiny_model(vocab=64)
    blocks = dataclasses.replace(plain.decoder.blocks, rope=None)
    answer = dataclasses.replace(blocks, layers=3, look=16)
    cfg = dataclasses.replace(plain, decoder=encoder_decoder.Config(64, blocks, answer))
    laid = Layout.of("a", (picture(4), words(5), words(3, train=True)), parted=True)
    costs = dataclasses.replace(vlm.costs(cfg, Config(answer=8)), encoder=None)

    def seen(path):
        if path == ["decoder", "embed"]:
            return 1
        reads = path[1] == "encoder" or ("look" in path and not {"k", "v", "kv"}.isdisjoint(path))
        return 9 if reads else 3

    attention = 4 * HEADS * (2 * 9 * 9 + 3 * (3 * 4 // 2 + 3 * 9))
    assert costs.prefill(laid) == products(cfg, seen) + attention

    def empty():
        params = jax.tree.map(lambda p: jax.numpy.zeros(p.shape), encoder_decoder.spec(cfg.decoder))
        encoded = jax.numpy.zeros((1, 9, 16))
        order = jax.numpy.zeros((1, 9), jax.numpy.int32)
        return encoder_decoder.empty_cache(params, encoded, order, cfg.decoder, 3 + 5)

    assert costs.cache(laid, 5) == held(jax.eval_shape(empty))
    alone = dataclasses.replace(cfg, vision=None, connector=None, placeholder=None)  # T5 itself
    assert vlm.costs(alone, Config(answer=8)) == costs
