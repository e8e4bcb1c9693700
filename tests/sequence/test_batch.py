import dataclasses

import numpy as np
import pytest
from small import BUCKET, PAD, PICTURE, VALUES, VOCAB, document

from mmjax.core.errors import InputError
from mmjax.sequence.batch import Batch, Bucket, Values, abstract, axes, build, empty
from mmjax.sequence.interleave import Config

UNUSED = ("media_lo", "media_hi", "window_lo", "window_hi", "frames", "frame_order", "frame_lo", "frame_hi")
UNUSED += ("mix_slot", "mix_share", "instruction", "answer")
FIELDS = [f.name for f in dataclasses.fields(Batch) if f.name not in UNUSED]


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
    with pytest.raises(InputError, match=r"'a' was laid out for 2 patches of 12 bytes"):
        build([[B], [(A[0], pictures)]], BUCKET, VALUES, VOCAB)


def test_every_field_says_how_it_may_be_split():
    """Rows, then tokens, patches or frames; what is a few numbers per picture is whole."""
    batch = empty(
        Bucket(2, 6, 4, 3, frames=5), Values(VALUES, 7), VOCAB, Config(cross="last_image", window=2, mixes=True)
    )
    named = axes(batch)
    for f in dataclasses.fields(Batch):
        if f.name in ("instruction", "answer"):
            continue
        x, names = getattr(batch, f.name), getattr(named, f.name)
        along = {6: "length", 4: "length", 5: "length", 3: None}[x.shape[1]]
        assert names == ("batch", along, None)[: x.ndim], f.name
    assert axes(empty(BUCKET, VALUES, VOCAB)).frames is None
    assert axes(empty(BUCKET, VALUES, VOCAB, Config(instruction=3))).instruction.order == ("batch", "length")


def test_texts_beside_pictures_have_places_of_their_own():
    """Of two documents in a row: three tokens beside the first's picture, two and one beside those of the second."""
    cfg, (a, pixels), (c, more) = Config(instruction=4), A, C
    a = dataclasses.replace(a, instruction=np.array([[5, 6, 7]], np.int32))
    c = dataclasses.replace(c, instruction=np.array([[8, 9], [4, -1]], np.int32))
    x = build([[(a, pixels), (c, more)], []], dataclasses.replace(BUCKET, images=4), VALUES, VOCAB, cfg).instruction
    np.testing.assert_array_equal(x.tokens[0], [5, 6, 7, 0, 8, 9, 0, 0, 4, *[0] * 7])
    np.testing.assert_array_equal(x.document[0], [0, 0, 0, -1, 1, 1, -1, -1, 2, *[-1] * 7])
    np.testing.assert_array_equal(x.order[0], [0, 1, 2, -1, 3, 4, -1, -1, 5, *[-1] * 7])
    assert (x.order[1] == -1).all()
    with pytest.raises(InputError, match="no text for the connector"):
        build([[A]], BUCKET, VALUES, VOCAB, cfg)
    with pytest.raises(InputError, match=r"has 3 tokens for the connector to read .* is 2; set it to 3"):
        build([[(a, pixels)]], BUCKET, VALUES, VOCAB, Config(instruction=2))
