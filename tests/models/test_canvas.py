"""Pictures on canvases that text looks at from beside: packed = alone, who sees padding, what is never said."""

import dataclasses
import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from canvases import POLICY, SEQUENCE, TILES, documents, make, model
from fused import VOCAB, Letters
from tiny import randomised

from mmjax.connectors import linear
from mmjax.core.errors import InputError
from mmjax.models import decoder, vlm
from mmjax.sequence import intervals, invariants
from mmjax.sequence.batch import Bucket
from mmjax.sequence.document import Document, Image
from mmjax.sequence.interleave import interleave
from mmjax.sequence.layout import layout
from mmjax.tokenizers.canvas import Canvas


@functools.cache
def logits():
    return jax.jit(lambda params, batch: vlm.logits(params, batch, model()))


@functools.cache
def params():
    return randomised(vlm.spec(model()))


def test_packed_equals_alone():
    batch = make([documents(), documents()[::-1]], Bucket(2, 60, 28, 6))
    found = invariants.violations(batch, 40, None, vlm.present(batch, model()), said=37)
    assert not np.asarray(found).any()
    together = np.asarray(logits()(params(), batch))
    assert together.shape[-1] == 37
    for number, document in enumerate(documents()):
        alone = np.asarray(logits()(params(), make([[document]], Bucket(1, 32, 20, 4))))[0]
        for row, which in ((0, number), (1, 2 - number)):
            own = np.asarray(batch.document[row]) == which
            np.testing.assert_allclose(together[row][own], alone[: own.sum()], atol=2e-5)


def test_who_notices_a_picture():
    """All of its document: what stands before the first picture sees all of them, with their padding."""
    batch = make([documents(), []], Bucket(2, 60, 28, 6))
    changed = batch.replace(patches=jnp.where(batch.patch_image[..., None] == 3, 255 - batch.patches, batch.patches))
    moved = np.abs(logits()(params(), batch) - logits()(params(), changed))[0].max(-1) > 1e-5
    begins = np.flatnonzero(np.asarray(batch.document[0]) == 1)[0]
    marks = np.flatnonzero((np.asarray(batch.tokens[0]) == VOCAB.image_start) & (np.arange(60) >= begins))
    own = np.asarray(batch.document[0]) == 1
    # The last picture's: its mark and what follows; between the first mark and it, nothing.
    seen = own & ((np.arange(60) >= marks[2]) | (np.arange(60) < marks[0]))
    assert moved[seen].all()
    assert not moved[np.asarray(batch.document[0]) != 1].any()
    # Of one layer: what stands before the first picture changes, and all that sees it.
    np.testing.assert_array_equal(moved, own)


def test_labels_that_text_looks_at():
    """Pictures side by side are looked at together, those of one tile without the padding of the other."""
    x = interleave(layout(documents()[1], Letters(), POLICY, model().connector.tokens, fuse="cross"), VOCAB, SEQUENCE)
    places = model().vision.places
    first, second, third = np.flatnonzero(x.tokens == VOCAB.image_start)
    seen = list(zip(x.media_lo.tolist(), x.media_hi.tolist(), strict=True))
    assert x.media == 3 * TILES * places
    assert set(seen[:first]) == {(x.media, -1)}
    assert seen[first] == (0, places - 1)
    assert second == first + 1
    assert set(seen[second:third]) == {(0, 3 * places - 1)}
    assert set(seen[third:]) == {(3 * places, 4 * places - 1)}


def test_pictures_next_to_each_other():
    lo, hi = intervals.last_images(7, [1, 2, 5], [3, 2, 4], hidden=6)
    np.testing.assert_array_equal(lo, [15, 0, 0, 0, 0, 5, 5])
    np.testing.assert_array_equal(hi, [-1, 2, 4, 4, 4, 8, 8])
    assert intervals.last_images(2, [], [])[1].tolist() == [-1, -1]


def test_what_is_never_said_is_no_target():
    batch = make([documents(), []], Bucket(2, 60, 28, 6))
    wrong = batch.replace(target=batch.target.at[0, 0].set(38))
    given = (40, None, vlm.present(batch, model()))
    assert np.asarray(invariants.violations(wrong, *given)).sum() == 0
    assert np.asarray(invariants.violations(wrong, *given, said=37)).sum() == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"window": 1}, "in windows of 2"),
        ({"canvas": 0}, "has 2 tiles"),
        ({"cross": "none"}, "looks at media"),
    ],
)
def test_batches_of_another_kind_are_refused(change, says):
    with pytest.raises(InputError, match=says):
        model().refuse(dataclasses.replace(SEQUENCE, **change))


def test_other_models_are_refused():
    with pytest.raises(InputError, match="per_picture"):
        dataclasses.replace(model(), connector=linear.Config(16, 16))
    with pytest.raises(InputError, match="never says"):
        dataclasses.replace(model().decoder, tied=True)
    with pytest.raises(InputError, match="never says"):
        decoder.Config(4, model().decoder.blocks, tied=False, unsaid=4)
    wide = Document("d", (Image(8, 24, b""),))
    laid = layout(wide, Letters(), Canvas(4, 8, 3), model().connector.tokens, fuse="cross")
    with pytest.raises(InputError, match="up to 2 whole windows"):
        interleave(laid, VOCAB, SEQUENCE)
    piece = next(p for p in laid.pieces if p.views)
    for views in ({"grid": (2, 2, 2)}, {"grid": (1, 2, 2), "tiles": ((1, 2, 2),)}):
        apart = replace(laid, pieces=(replace(piece, **views),))
        with pytest.raises(InputError, match=r"not one view of up to 2 whole windows"):
            interleave(apart, VOCAB, SEQUENCE)


def test_what_stands_before_pictures_sees_none_that_are_not_there():
    batch = make([documents(), []], Bucket(2, 60, 28, 6))
    wrong = batch.replace(media_lo=batch.media_lo.at[0, 0].add(1000))
    found = invariants.violations(wrong, 40, None, vlm.present(batch, model()))
    assert found[0, invariants.KINDS.index("tokens that look at media that do not exist")] == 1
