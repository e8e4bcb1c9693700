"""The whole model on packed batches: packed = alone, the picture matters, gradients reach every parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import randomised, tiny_model

from mmjax.models import vlm
from mmjax.sequence import batch as batches
from mmjax.sequence import invariants
from mmjax.sequence.batch import Bucket
from mmjax.sequence.document import Document, Image, Text
from mmjax.sequence.interleave import Config, interleave
from mmjax.sequence.layout import layout
from mmjax.tokenizers.vocab import Vocab
from mmjax.train.step import loss_fn

VOCAB = Vocab(pad=0, begin=1, end=2, system=3, user=4, assistant=5, image=6, image_start=7, image_end=8, size=40)
CFG = tiny_model(vocab=40)
VALUES = 4 * 4 * 3


class Letters:
    """A tokenizer of one token per letter."""

    vocab = VOCAB

    def encode(self, text):
        return [9 + ord(c) % 30 for c in text]


class Quarters:
    """A resolution policy: sides are multiples of 4 pixels already."""

    def grid(self, height, width):
        return height // 4, width // 4


def documents():
    """Pictures first, in the middle, twice, not at all; sizes that are not round."""
    picture = lambda h, w: Image(4 * h, 4 * w, b"")  # noqa: E731
    return [
        Document("first", (picture(3, 2), Text("what"), Text("cat", "assistant", True))),
        Document("middle", (Text("see"), picture(1, 5), Text("well"), Text("no", "assistant", True))),
        Document("words", (Text("hello"), Text("you", "assistant", True))),
        Document("two", (picture(2, 2), Text("or"), picture(2, 3), Text("b", "assistant", True))),
    ]


def make(rows, bucket, see, seed=0):
    """A batch of these documents' rows, with random pictures that depend on the document alone."""

    def one(document):
        x = interleave(layout(document, Letters(), Quarters()), VOCAB, Config(see=see))
        rng = np.random.default_rng([seed, len(document.id), document.id.encode()[0]])
        return x, [rng.integers(0, 256, (int(np.prod(g)), VALUES), dtype=np.uint8) for g in x.grid]

    return jax.tree.map(jnp.asarray, batches.build([[one(d) for d in row] for row in rows], bucket, VALUES, VOCAB))


logits_of = jax.jit(lambda params, batch: vlm.logits(params, batch, CFG))
mean_gradient = jax.jit(jax.value_and_grad(lambda params, batch: loss_fn(params, batch, CFG), has_aux=True))
sum_gradient = jax.jit(jax.grad(lambda params, batch: loss_fn(params, batch, CFG)[1]["loss"]))


@pytest.fixture(scope="module")
def params():
    return randomised(vlm.spec(CFG))


@pytest.mark.parametrize("see", ["causal", "bidirectional_images"])
def test_packed_equals_alone(params, see):
    """Logits and gradients of every document do not notice its neighbours."""
    first, middle, words, two = documents()
    packed = make([[first, middle, two], [words]], Bucket(2, 80, 24, 5), see)
    together = np.array(logits_of(params, packed))
    alone = Bucket(1, 40, 11, 2)
    for row, number, document in ((0, 0, first), (0, 1, middle), (0, 2, two), (1, 0, words)):
        batch = make([[document]], alone, see)
        mine = together[row][np.array(packed.document[row]) == number]
        np.testing.assert_allclose(mine, np.array(logits_of(params, batch))[0, : len(mine)], atol=1e-5)

    singles = [sum_gradient(params, make([[d]], alone, see)) for d in documents()]
    total = jax.tree.map(lambda *g: sum(g), *singles)

    def close(a, b):  # sums of many terms: relative to the largest of them
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()))

    jax.tree.map(close, sum_gradient(params, packed), total)


def test_the_picture_matters_and_only_where_it_is_seen(params):
    first, middle, *_ = documents()
    batch = make([[first, middle]], Bucket(1, 60, 16, 3), "causal")
    second = batch.patch_image[..., None] == 1
    changed = batch.replace(patches=jnp.where(second, 255 - batch.patches, batch.patches))
    a, b = (np.array(logits_of(params, x))[0] for x in (batch, changed))
    moved = np.abs(a - b).max(-1) > 1e-4
    document, slot = np.array(batch.document[0]), np.array(batch.slot[0])
    expected = (document == 1) & (np.arange(len(slot)) >= np.flatnonzero((document == 1) & (slot >= 0))[0])
    np.testing.assert_array_equal(moved, expected)


def test_gradients_reach_every_parameter(params):
    batch = make([documents()], Bucket(1, 80, 24, 5), "bidirectional_images")
    _, grads = mean_gradient(params, batch)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(g).all()
        assert np.abs(g).max() > 1e-8, jax.tree_util.keystr(path)


def test_loss_ignores_padding_and_prompt(params):
    batch = make([documents()[:2]], Bucket(2, 60, 16, 3), "causal")
    logits = np.array(logits_of(params, batch), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    trained = np.array(batch.weight) > 0
    assert trained.sum() == len("cat") + len("no") + 2
    expected = -log_p[trained][np.arange(trained.sum()), np.array(batch.target)[trained]]
    (mean, sums), _ = mean_gradient(params, batch)
    np.testing.assert_allclose(sums["loss"], expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(mean, expected.mean(), rtol=1e-5)
    right = logits[trained].argmax(-1) == np.array(batch.target)[trained]
    np.testing.assert_allclose(sums["correct"], right.sum())


def test_an_empty_batch_has_no_loss_and_no_gradient(params):
    batch = make([], Bucket(2, 16, 4, 1), "causal")
    (loss, _), grads = mean_gradient(params, batch)
    assert loss == 0
    assert all(not np.any(g) and np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert int(jnp.sum(invariants.violations(batch, 40, VOCAB.image))) == 0
