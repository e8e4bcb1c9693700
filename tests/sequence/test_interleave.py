import dataclasses

import numpy as np
import pytest

from mmjax.core.errors import InputError
from mmjax.sequence import intervals
from mmjax.sequence.batch import Bucket, build
from mmjax.sequence.interleave import HIDDEN, PIXEL, Config, interleave
from mmjax.sequence.layout import IMAGE, TEXT, VIDEO, Layout, Piece
from mmjax.sequence.positions import mrope
from mmjax.tokenizers.vocab import Vocab

PICTURE = 6
VOCAB = Vocab(0, 1, 2, 3, 4, 5, PICTURE, 7, 8, size=30)
NEWLINE = dataclasses.replace(VOCAB, image_newline=9)


def text(*ids, train=False):
    return Piece(TEXT, len(ids), ids, train=train)


def image(rows, columns, **changes):
    return dataclasses.replace(Piece(IMAGE, rows * columns, grid=(1, rows, columns)), **changes)


def laid(*pieces):
    return Layout.of("d7", pieces)


TWO = laid(text(1, 4, 7), image(1, 3), text(8, 7), image(2, 1), text(8, 20, 2, 5), text(21, 22, train=True), text(2))


def test_two_pictures():
    x = interleave(TWO, VOCAB)
    assert x.id == "d7"
    p = PICTURE
    np.testing.assert_array_equal(x.tokens, [1, 4, 7, p, p, p, 8, 7, p, p, 8, 20, 2, 5, 21, 22, 2])
    np.testing.assert_array_equal(x.modality, [1, 1, 1, 2, 2, 2, 1, 1, 2, 2, 1, 1, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(x.slot, [-1, -1, -1, 0, 1, 2, -1, -1, 3, 4, *[-1] * 7])
    np.testing.assert_array_equal(x.weight, [0] * 13 + [1, 1, 0, 0])  # 5 is to say 21, and 21 to say 22
    np.testing.assert_array_equal(x.target, [0] * 13 + [21, 22, 0, 0])
    np.testing.assert_array_equal(x.patch_lo, [0, 0, 0, 3, 3])
    np.testing.assert_array_equal(x.patch_hi, [2, 2, 2, 4, 4])
    np.testing.assert_array_equal(x.patch_position, [(0, 0), (0, 1), (0, 2), (0, 0), (1, 0)])
    np.testing.assert_array_equal(x.patch_image, [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(x.grid, [(1, 1, 3), (1, 2, 1)])
    np.testing.assert_array_equal(x.position, mrope(TWO.pieces))


@pytest.mark.parametrize("see", ["causal", "bidirectional_images"])
def test_who_sees_whom(see):
    x = interleave(TWO, VOCAB, Config(see=see))
    lo, hi = intervals.causal(17) if see == "causal" else intervals.bidirectional_images(17, [(3, 6), (8, 10)])
    np.testing.assert_array_equal(x.lo, lo)
    np.testing.assert_array_equal(x.hi, hi)


def test_squares_of_several_views_stand_in_order():
    """Four views of one token for each of four squares: as many tokens as the first view has patches."""
    x = interleave(laid(image(4, 4, tiles=((1, 4, 4),) * 3)), VOCAB, Config(position="sequential", merge=2))
    np.testing.assert_array_equal(x.slot, np.arange(16))
    np.testing.assert_array_equal(x.patch_raster[:8], [0, 1, 4, 5, 2, 3, 6, 7])


def test_ids_of_media_tokens_may_count_up():
    vocab = dataclasses.replace(VOCAB, numbered=True)
    x = interleave(laid(text(1, 8), image(1, 3), text(7)), vocab, Config(position="sequential"))
    np.testing.assert_array_equal(x.tokens, [1, 8, 7, 8, 9, 7])  # the words 7 and 8 are words
    batch = build([[(x, [np.zeros((3, 48), np.uint8)])]], Bucket(1, 8, 4, 1), 48, vocab, Config(position="sequential"))
    assert (batch.slot[0, :6] >= 0).tolist() == [False, False, True, True, True, False]


def test_no_pictures():
    x = interleave(laid(text(1, 4, 20, 2, 5), text(21, 2, train=True)), VOCAB)
    shapes = [a.shape for a in (x.patch_lo, x.patch_hi, x.patch_position, x.patch_image, x.grid)]
    assert shapes == [(0,), (0,), (0, 2), (0,), (0, 3)]
    np.testing.assert_array_equal(x.target, [0, 0, 0, 0, 21, 2, 0])
    np.testing.assert_array_equal(x.weight, [0, 0, 0, 0, 1, 1, 0])


def random_layout(rng):
    pieces = [text(1)]
    for _ in range(rng.integers(1, 10)):
        if rng.random() < 0.3:
            pieces.append(image(*rng.integers(1, 4, 2).tolist()))
        else:
            ids = rng.integers(9, 30, rng.integers(1, 5)).tolist()
            pieces.append(text(*ids, train=bool(rng.integers(2))))
    return laid(*pieces)


def test_targets_are_the_next_token_and_weigh_exactly_where_it_is_trained(rng):
    for _ in range(50):
        layout = random_layout(rng)
        x = interleave(layout, VOCAB)
        trained = [p.train for p in layout.pieces for _ in range(p.length)]
        for i in range(layout.tokens):
            learnt = i + 1 < layout.tokens and trained[i + 1]
            assert x.weight[i] == float(learnt)
            assert x.target[i] == (x.tokens[i + 1] if learnt else 0)
        # Every trained token is learnt once (the first token is never trained: nothing stands before it).
        assert x.weight.sum() == sum(trained)
        np.testing.assert_array_equal(x.slot[x.modality == IMAGE], np.arange(layout.patches))
        assert (x.slot[x.modality == TEXT] == -1).all()
        assert len(x.patch_lo) == layout.patches
        assert len(x.grid) == layout.images


def test_types():
    x = interleave(TWO, VOCAB)
    arrays = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
    types = {name: a.dtype for name, a in arrays.items() if isinstance(a, np.ndarray)}
    assert types.pop("modality") == types.pop("patch_kind") == np.int8
    assert types.pop("weight") == np.float32
    assert set(types.values()) == {np.dtype(np.int32)}


def test_media_are_never_targets():
    x = interleave(laid(text(1, 7), image(1, 2, train=True), text(8, train=True)), VOCAB)
    np.testing.assert_array_equal(x.weight, [0, 0, 0, 1, 0])
    np.testing.assert_array_equal(x.target, [0, 0, 0, 8, 0])


@pytest.mark.parametrize("wrong", [-1, 30, 2**31 - 1])
def test_id_outside_the_vocabulary(wrong):
    with pytest.raises(InputError, match=rf"'d7'.* {wrong}, outside the vocabulary of 30"):
        interleave(laid(text(1, 29, wrong)), VOCAB)


def test_media_tokens_that_are_not_one_per_patch():
    with pytest.raises(InputError, match=r"'d7'.*\(1, 2, 2\).* 3 tokens"):
        interleave(laid(text(1), image(2, 2, length=3)), VOCAB)


def test_a_prefix_ends_where_something_is_learnt_or_left_to_fill():
    prompt = (text(1, 4), image(1, 2), text(8, 20, 5))
    for rest in (text(21, 22, train=True), dataclasses.replace(text(0, 0), fill=True)):
        x = interleave(laid(*prompt, rest, text(2)), VOCAB, Config(see="prefix"))
        np.testing.assert_array_equal(x.lo, 0)
        np.testing.assert_array_equal(x.hi, [6] * 7 + [7, 8, 9])
    x = interleave(laid(*prompt), VOCAB, Config(see="prefix"))
    np.testing.assert_array_equal(x.hi, 6)


def test_frames_of_a_video_see_each_other_only_if_asked():
    film = Piece(VIDEO, 12, grid=(3, 2, 2))
    apart, together = (interleave(laid(film, image(1, 2)), VOCAB, Config(frames=f)) for f in ("apart", "together"))
    np.testing.assert_array_equal(apart.patch_hi, [3] * 4 + [7] * 4 + [11] * 4 + [13] * 2)
    np.testing.assert_array_equal(together.patch_hi, [11] * 12 + [13] * 2)
    np.testing.assert_array_equal(apart.grid, [(3, 2, 2), (1, 1, 2)])


def test_views_and_squares_do_not_go_together():
    views = dataclasses.replace(image(2, 2), tiles=((1, 2, 2),), slots=tuple(range(8)), length=8)
    for wrong in (Config(merge=2, position="sequential"), Config(window=2, position="sequential")):
        with pytest.raises(InputError, match="'d7': a picture whose tokens are 1×1 patches"):
            interleave(laid(views), VOCAB, wrong)
    assert interleave(laid(views), VOCAB, Config(position="sequential")).media == 8


def test_an_order_of_merged_squares():
    """Pixtral's rows of 2 × 2 patches, the upper left square left out: its four patches lie first, and are hidden."""
    piece = dataclasses.replace(image(4, 4), slots=(1, -1, 2, 3), length=4, media=4, merge=2)
    x = interleave(laid(piece), NEWLINE, Config(merge=2, position="sequential"))
    assert x.slot[x.modality == IMAGE].tolist() == [1, -1, 2, 3]
    assert x.patch_kind.tolist() == [HIDDEN] * 4 + [PIXEL] * 12
    assert x.patch_raster[:6].tolist() == [0, 1, 4, 5, 2, 3]
