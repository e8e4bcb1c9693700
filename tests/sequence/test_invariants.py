import functools

import jax
import numpy as np
import pytest
from small import BUCKET, PICTURE, SIZE, VALUES, VOCAB, document

from mmjax.core.errors import InputError
from mmjax.core.meshes import MeshConfig, Rules, make_mesh
from mmjax.sequence.batch import Bucket, build
from mmjax.sequence.invariants import KINDS, _count, _Host, check, violations
from mmjax.sequence.layout import AUDIO, TEXT
from mmjax.train.step import batch_shardings

A, B, C = document("a", (1, 2)), document("b", words=3), document("c", (2, 1), (1, 3), words=1)  # 6, 4 and 9 tokens
count = jax.jit(functools.partial(violations, vocab_size=SIZE, placeholder=PICTURE))


def test_sound_batches_violate_nothing():
    for rows in ([], [[]], [[A]], [[B]], [[B, A], [C], [A, A, B]], [[A, B, C], [], [C, A]]):
        got = count(build(rows, BUCKET, VALUES, VOCAB))
        assert (got.shape, got.dtype) == ((3, len(KINDS)), np.int32)
        np.testing.assert_array_equal(got, 0)


# What is changed, the kind of violation it is, and how many of them that is at least.
# Row 1 holds B, A: text 0-4, pictures 5 and 6 (slots 0 and 1), text 7-9, empty from 10; patches 0 and 1.
IDS, PLACEHOLDERS, ABSENT, UNSHOWN, LABELS, BLIND, PAST, LOOKS, PATCHES = range(len(KINDS))
VIOLATIONS = {
    "token below zero": ({"tokens": {3: -1}}, IDS, 1),
    "token beyond the vocabulary": ({"tokens": {3: SIZE, 12: SIZE}}, IDS, 2),
    "target below zero": ({"target": {0: -1}}, IDS, 1),
    "target beyond the vocabulary": ({"target": {0: SIZE}}, IDS, 1),
    "a modality there is none of": ({"modality": {0: 7}}, IDS, 1),
    "media token without a patch": ({"slot": {5: -1}}, PLACEHOLDERS, 1),
    "text with a patch": ({"slot": {7: 0}}, PLACEHOLDERS, 1),
    "text that says placeholder": ({"tokens": {7: PICTURE}}, PLACEHOLDERS, 1),
    "empty place with a patch": ({"slot": {15: 0}}, PLACEHOLDERS, 1),
    "picture as text": ({"modality": {6: TEXT}}, PLACEHOLDERS, 1),
    "media token whose patch is empty": ({"slot": {5: 7}}, ABSENT, 1),
    "media token whose patch is beyond the row": ({"slot": {6: 10}}, ABSENT, 1),
    "sound in a row without": ({"modality": {6: AUDIO}}, ABSENT, 1),
    "patch that no token shows": ({"patch_order": {2: 2}, "patch_kind": {2: 1}}, UNSHOWN, 1),
    "picture without its token": ({"modality": {6: TEXT}, "slot": {6: -1}, "tokens": {6: 8}}, UNSHOWN, 1),
    "two tokens show one patch, no token the other": ({"slot": {6: 0}}, UNSHOWN, 1),
    "label twice": ({"order": {3: 2}}, LABELS, 1),
    "label that falls": ({"order": {3: 0}}, LABELS, 1),
    "two labels changed over": ({"order": {3: 4, 4: 3}}, LABELS, 1),
    "labels after a jump": ({"order": {4: 50}}, LABELS, 5),
    "label in an empty place": ({"order": {12: 12}}, LABELS, 1),
    "token without a label": ({"order": {3: -1}}, LABELS, 1),
    "trained token that sees nothing": ({"lo": {1: 2}}, BLIND, 1),
    "trained empty place": ({"weight": {14: 1.0}, "hi": {14: 3}}, BLIND, 1),
    "weight that is no number": ({"weight": {1: np.nan}}, BLIND, 1),
    "sees empty places, whose label is -1": ({"lo": {8: -1}}, PAST, 1),
    "sees another document": ({"lo": {8: 0}}, PAST, 1),
    "no label is in reach": ({"lo": {8: 50}, "hi": {8: 60}}, PAST, 1),
    "patch that sees another picture's": ({"patch_hi": {0: 2}}, PATCHES, 1),
    "patch that sees nothing": ({"patch_lo": {0: 2}}, PATCHES, 1),
    "patch of no kind": ({"patch_kind": {0: 0}}, PATCHES, 1),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_every_violation_is_counted_in_its_row_and_refused_on_the_host(name):
    changes, kind, expected = VIOLATIONS[name]
    batch = build([[C], [B, A]], BUCKET, VALUES, VOCAB)
    for field, values in changes.items():
        for place, value in values.items():
            getattr(batch, field)[1, place] = value
    found = np.array(count(batch))
    assert not found[[0, 2]].any()
    assert found[1, kind] >= expected
    with pytest.raises(InputError, match=f"^Row 1 .the documents b, a. .*[1-9] {KINDS[kind]}"):
        check(batch, VOCAB, [["c"], ["b", "a"], []])
    np.testing.assert_array_equal(_count(batch, SIZE, PICTURE, None, _Host), found)


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_rows_that_are_split_along_their_length_are_counted_whole(explicit):
    batch = build([[C], [B, A]], Bucket(2, 20, 10, 3), VALUES, VOCAB)
    for name in VIOLATIONS:
        for field, values in VIOLATIONS[name][0].items():
            for place, value in values.items():
                getattr(batch, field)[1, place] = value
    mesh = make_mesh(MeshConfig(2, 1, 1, 2, explicit=explicit), jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = jax.device_put(batch, batch_shardings(batch, mesh, Rules()))
        assert placed.tokens.addressable_shards[0].data.shape == (1, 10)
        found = jax.jit(functools.partial(violations, vocab_size=SIZE, placeholder=PICTURE))(placed)
    np.testing.assert_array_equal(found, _count(batch, SIZE, PICTURE, None, _Host))


def test_patch_beyond_a_row_that_is_full():
    """Where the last patch is not empty, an index that is clipped to it would pass for sound."""
    batch = build([[A]], Bucket(1, 6, 2, 1), VALUES, VOCAB)
    batch.slot[0, 2] = 2
    assert count(batch)[0, ABSENT] == 1
