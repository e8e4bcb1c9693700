import dataclasses

import jax
import numpy as np
import pytest

from mmjax.core.errors import InputError
from mmjax.sequence.batch import Batch, Bucket, abstract, build, empty, violations
from mmjax.sequence.interleave import interleave
from mmjax.sequence.layout import IMAGE, TEXT, Layout, Piece
from mmjax.tokenizers.vocab import Vocab

PAD, PICTURE, SIZE, VALUES = 9, 6, 30, 12
VOCAB = Vocab(PAD, 1, 2, 3, 4, 5, PICTURE, 7, 8, size=SIZE)
BUCKET = Bucket(rows=3, tokens=20, patches=10, images=3)
FIELDS = [f.name for f in dataclasses.fields(Batch)]
count = jax.jit(violations, static_argnums=1)


def document(name, *grids, words=2):
    """A document of pictures and an answer, and the patches of its pictures: all bytes of one patch are its number."""
    pieces = [Piece(TEXT, 1, (1,))]
    for rows, columns in grids:
        pieces += [Piece(IMAGE, rows * columns, grid=(1, rows, columns)), Piece(TEXT, 1, (8,))]
    pieces.append(Piece(TEXT, words, tuple(range(20, 20 + words)), train=True))
    patches = sum(r * c for r, c in grids)
    layout = Layout(name, tuple(pieces), sum(p.length for p in pieces), patches, len(grids))
    pictures = [np.tile(np.arange(r * c, dtype=np.uint8)[:, None], VALUES) for r, c in grids]
    return interleave(layout, VOCAB, "bidirectional_images"), pictures


A, B, C = document("a", (1, 2)), document("b", words=3), document("c", (2, 1), (1, 3), words=1)  # 6, 4 and 9 tokens


def test_descriptors_of_a_packed_row_by_hand():
    x = build([[B, A], [C]], BUCKET, VALUES, VOCAB)
    p = PICTURE
    rest = 10 * [0]
    np.testing.assert_array_equal(x.tokens[0], [1, 20, 21, 22, 1, p, p, 8, 20, 21] + 10 * [PAD])
    np.testing.assert_array_equal(x.modality[0], [1, 1, 1, 1, 1, 2, 2, 1, 1, 1, *rest])
    np.testing.assert_array_equal(x.document[0], [0] * 4 + [1] * 6 + [-1] * 10)
    np.testing.assert_array_equal(x.order[0], [*range(10), *[-1] * 10])
    np.testing.assert_array_equal(x.lo[0], [0] * 4 + [4] * 6 + rest)
    np.testing.assert_array_equal(x.hi[0], [0, 1, 2, 3, 4, 6, 6, 7, 8, 9] + [-1] * 10)
    np.testing.assert_array_equal(x.position[0, :, 0], [0, 1, 2, 3, 0, 1, 1, 3, 4, 5, *rest])
    np.testing.assert_array_equal(x.slot[0], [*[-1] * 5, 0, 1, *[-1] * 13])
    np.testing.assert_array_equal(x.target[0], [20, 21, 22, 0, 0, 0, 0, 20, 21, 0, *rest])
    np.testing.assert_array_equal(x.weight[0], [1, 1, 1, 0, 0, 0, 0, 1, 1, 0, *rest])

    np.testing.assert_array_equal(x.slot[1, :9], [-1, 0, 1, -1, 2, 3, 4, -1, -1])
    np.testing.assert_array_equal(x.patches[1, :, 0], [0, 1, 0, 1, 2, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(x.patch_order[1], [0, 1, 2, 3, 4, -1, -1, -1, -1, -1])
    np.testing.assert_array_equal(x.patch_lo[1], [0, 0, 2, 2, 2, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(x.patch_hi[1], [1, 1, 4, 4, 4, -1, -1, -1, -1, -1])
    np.testing.assert_array_equal(x.patch_position[1, :5], [(0, 0), (1, 0), (0, 0), (0, 1), (0, 2)])
    np.testing.assert_array_equal(x.patch_image[1], [0, 0, 1, 1, 1, -1, -1, -1, -1, -1])
    np.testing.assert_array_equal(x.grid[1], [(1, 2, 1), (1, 1, 3), (0, 0, 0)])


def test_pictures_of_the_second_document_stand_behind_those_of_the_first():
    x = build([[A, C]], BUCKET, VALUES, VOCAB)
    np.testing.assert_array_equal(x.slot[0, :15], [-1, 0, 1, -1, -1, -1, -1, 2, 3, -1, 4, 5, 6, -1, -1])
    np.testing.assert_array_equal(x.patches[0, :7, -1], [0, 1, 0, 1, 0, 1, 2])
    np.testing.assert_array_equal(x.patch_lo[0, :7], [0, 0, 2, 2, 4, 4, 4])
    np.testing.assert_array_equal(x.patch_hi[0, :7], [1, 1, 3, 3, 6, 6, 6])
    np.testing.assert_array_equal(x.patch_image[0, :7], [0, 0, 1, 1, 2, 2, 2])
    np.testing.assert_array_equal(x.grid[0], [(1, 1, 2), (1, 2, 1), (1, 1, 3)])


def test_rows_not_given_are_empty_and_see_nothing():
    x, nothing = build([[A]], BUCKET, VALUES, VOCAB), empty(BUCKET, VALUES, VOCAB)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(x, name)[1:], getattr(nothing, name)[1:], name)
    for order, lo, hi in ((x.order, x.lo, x.hi), (x.patch_order, x.patch_lo, x.patch_hi)):
        assert (order[1:] == -1).all()
        assert (lo[1:] > hi[1:]).all()
        assert (lo >= 0).all()
        hidden = order < 0
        assert (lo[hidden] > hi[hidden]).all()
    assert (x.tokens[1:] == PAD).all()
    assert (x.weight[1:] == 0).all()


def test_packed_is_alone_but_for_offsets():
    row = [C, B, A]
    packed = build([row], BUCKET, VALUES, VOCAB)
    at = np.zeros(3, int)  # tokens, patches, images
    for number, (x, pictures) in enumerate(row):
        alone = build([[(x, pictures)]], BUCKET, VALUES, VOCAB)
        size = np.array([len(x.tokens), len(x.patch_lo), len(x.grid)])
        offset = {"document": number, "order": at[0], "lo": at[0], "hi": at[0], "slot": at[1], "patch_image": at[2]}
        offset |= {"patch_order": at[1], "patch_lo": at[1], "patch_hi": at[1]}
        for name in FIELDS:
            of = 2 if name == "grid" else 1 if name.startswith("patch") else 0
            here = getattr(packed, name)[0, at[of] : at[of] + size[of]]
            there = getattr(alone, name)[0, : size[of]]
            shift = np.where(there >= 0, offset[name], 0) if name == "slot" else offset.get(name, 0)
            np.testing.assert_array_equal(here, there + shift, name)
        at += size


def test_abstract_is_what_build_gives():
    built, expected = build([[A], [B, C]], BUCKET, VALUES, VOCAB), abstract(BUCKET, VALUES, VOCAB)
    for name in FIELDS:
        assert getattr(built, name).shape == getattr(expected, name).shape, name
        assert getattr(built, name).dtype == getattr(expected, name).dtype, name
    assert built.patches.shape == (3, 10, VALUES)


@pytest.mark.parametrize(
    ("sizes", "row", "name"),
    [
        ((1, 18, 10, 3), [A, B, C], "c"),  # 19 tokens
        ((1, 20, 6, 3), [A, C], "c"),  # 7 patches
        ((1, 20, 10, 2), [C, A], "a"),  # 3 pictures
    ],
)
def test_what_does_not_fit_is_refused_by_name(sizes, row, name):
    with pytest.raises(InputError, match=f"^Document '{name}' .*does not fit its row"):
        build([row], Bucket(*sizes), VALUES, VOCAB)
    build([row], BUCKET, VALUES, VOCAB)


def test_a_row_can_be_full():
    x = build([[A, B, C]], Bucket(1, 19, 7, 3), VALUES, VOCAB)
    assert (x.modality > 0).all()
    assert (x.patch_order >= 0).all()


def test_too_many_rows():
    with pytest.raises(InputError, match=r"4 rows .*bucket of 3"):
        build([[A]] * 4, BUCKET, VALUES, VOCAB)


@pytest.mark.parametrize(
    "pictures",
    [
        [],
        A[1] * 2,
        [A[1][0][:1]],
        [np.zeros((3, VALUES), np.uint8)],
        [np.zeros((2, VALUES + 3), np.uint8)],
        pytest.param(
            [np.full((2, VALUES), 0.5, np.float32)],
        ),
    ],
)
def test_pictures_that_are_not_as_laid_out(pictures):
    with pytest.raises(InputError, match=r"'a' was laid out for .*\(2, 12\)"):
        build([[B], [(A[0], pictures)]], BUCKET, VALUES, VOCAB)


def test_sound_batches_violate_nothing():
    for rows in ([], [[]], [[A]], [[B]], [[B, A], [C], [A, A, B]], [[A, B, C], [], [C, A]]):
        got = count(build(rows, BUCKET, VALUES, VOCAB), SIZE)
        assert (got.shape, got.dtype) == ((3,), np.int32)
        np.testing.assert_array_equal(got, 0)


# What is changed, and how many violations that is at least.
# Row 1 holds B, A: text 0-4, pictures 5 and 6 (slots 0 and 1), text 7-9, empty from 10; patches 0 and 1.
VIOLATIONS = {
    "token below zero": ({"tokens": {3: -1}}, 1),
    "token beyond the vocabulary": ({"tokens": {3: SIZE, 12: SIZE}}, 2),
    "target below zero": ({"target": {0: -1}}, 1),
    "target beyond the vocabulary": ({"target": {0: SIZE}}, 1),
    "media token without a patch": ({"slot": {5: -1}}, 1),
    "text with a patch": ({"slot": {7: 0}}, 1),
    "empty place with a patch": ({"slot": {15: 0}}, 1),
    "media token whose patch is empty": ({"slot": {5: 7}}, 1),
    "media token whose patch is beyond the row": ({"slot": {6: 10}}, 1),
    "label twice": ({"order": {3: 2}}, 1),
    "label that falls": ({"order": {3: 0}}, 1),
    "two labels changed over": ({"order": {3: 4, 4: 3}}, 1),
    "labels after a jump": ({"order": {4: 50}}, 5),
    "label in an empty place": ({"order": {12: 12}}, 1),
    "token without a label": ({"order": {3: -1}}, 2),  # no label, and none that rises
    "trained token that sees nothing": ({"lo": {1: 2}}, 1),
    "trained empty place": ({"weight": {14: 1.0}, "hi": {14: 3}}, 1),
    "patch that no token shows": ({"patch_order": {2: 2}}, 1),
    "picture without its token": ({"modality": {6: TEXT}, "slot": {6: -1}}, 1),
}


@pytest.mark.parametrize("kind", VIOLATIONS)
def test_every_kind_of_violation_is_counted_in_its_row(kind):
    changes, expected = VIOLATIONS[kind]
    batch = build([[C], [B, A]], BUCKET, VALUES, VOCAB)
    for name, values in changes.items():
        for place, value in values.items():
            getattr(batch, name)[1, place] = value
    before, found, after = count(batch, SIZE).tolist()
    assert (before, after) == (0, 0)
    assert found >= expected


def test_patch_beyond_a_row_that_is_full():
    """Where the last patch is not empty, an index that is clipped to it would pass for sound."""
    batch = build([[A]], Bucket(1, 6, 2, 1), VALUES, VOCAB)
    batch.slot[0, 2] = 2
    np.testing.assert_array_equal(count(batch, SIZE), [1])


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"lo": {8: -1}}, id="sees empty places, whose label is -1"),
        pytest.param({"lo": {8: 0}}, id="sees another document"),
        pytest.param({"lo": {8: 50}, "hi": {8: 60}}, id="is trained and sees nothing, because no label is in reach"),
        pytest.param({"slot": {6: 0}}, id="two tokens show one patch, no token the other"),
    ],
)
def test_violations_of_what_attention_rests_on(changes):
    batch = build([[C], [B, A]], BUCKET, VALUES, VOCAB)
    for name, values in changes.items():
        for place, value in values.items():
            getattr(batch, name)[1, place] = value
    assert count(batch, SIZE)[1] > 0
