import numpy as np
import pytest

from mmjax.core.errors import InputError
from mmjax.sequence.batch import Bucket
from mmjax.sequence.buckets import choose, fills, fits, harmonic, refuse_too_large
from mmjax.sequence.pack import pack_shapes

TOKENS = 128


def conversations(rng, n=300):
    """Text alone, one picture with few words, and several pictures: (tokens, patches, images)."""
    pictures = rng.choice([0, 1, 3], n, p=[0.3, 0.4, 0.3])
    patches = pictures * rng.integers(9, 26, n)
    return sized(patches + rng.integers(6, 30, n), patches, pictures)


def sized(tokens, patches, pictures):
    return np.stack([tokens, patches, pictures, *[np.zeros_like(tokens)] * 2], 1)


def fill(sizes, buckets):
    """Harmonic mean of the shares of tokens and of patches that are not padding, but for the last rows."""
    shapes = [b.row for b in buckets]
    packed, _ = pack_shapes(sizes, shapes, keep=len(sizes) // 8)
    return harmonic(*fills(sizes, packed, shapes)[:2])


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_at_most_k_and_every_document_fits(rng, k):
    sizes = conversations(rng)
    found = choose(sizes, k, TOKENS, rows=4)
    assert 1 <= len(found) <= k
    assert len(set(found)) == len(found)
    assert all(b.rows == 4 and b.tokens == TOKENS for b in found)
    assert fits(sizes, found).all()


def test_two_kinds_of_documents_fill_two_buckets_better_than_one(rng):
    """Half of the documents are a fifth patches, half four fifths, at all lengths."""
    tokens = rng.integers(20, 110, 300)
    patches = np.round(tokens * rng.choice([0.2, 0.8], 300)).astype(int)
    sizes = sized(tokens, patches, np.ones_like(tokens))
    one, two = (fill(sizes, choose(sizes, k, TOKENS, rows=4)) for k in (1, 2))
    assert two > one + 0.05
    assert two > 0.88


def test_one_bucket_is_well_filled(rng):
    sizes = conversations(rng)
    assert fill(sizes, choose(sizes, 1, TOKENS, rows=4)) > 0.9


def test_being_allowed_more_buckets_never_wastes_more(rng):
    sizes = conversations(rng)
    fills = [fill(sizes, choose(sizes, k, TOKENS, rows=4)) for k in (1, 2, 3, 4)]
    assert (np.diff(fills) > -1e-3).all()


def test_rare_documents_full_of_patches_get_a_bucket(rng):
    """One document in twenty is a large picture, the others are short text: one shape for both is mostly empty."""
    patches = np.where(rng.random(300) < 0.05, rng.integers(90, 100, 300), 0)
    sizes = sized(patches + rng.integers(6, 28, 300), patches, (patches > 0).astype(int))
    assert fill(sizes, choose(sizes, 2, TOKENS, rows=4)) > 0.85


def test_one_kind_of_document_is_nearly_all_filled():
    """Rows of 100 tokens, documents of 20 of which 15 are patches: five to a row, 75 patches, rounded up to eights."""
    (bucket,) = choose(np.tile([20, 15, 1, 0, 0], (40, 1)), 3, 100, rows=2)
    assert (bucket.rows, bucket.tokens, bucket.images) == (2, 100, 5)
    assert bucket.patches == 80


def test_text_alone():
    (bucket,) = choose(np.tile([10, 0, 0, 0, 0], (7, 1)), 2, 40, rows=1)
    assert bucket == Bucket(1, 40, 1, 1)


def test_one_document():
    (bucket,) = choose(np.array([[40, 33, 2, 0, 0]]), 4, 40, rows=1)
    assert all(np.array(bucket.row) >= (40, 33, 2, 0, 0))


def one_sentence(error):
    message = str(error.value)
    return message.endswith(".") and ". " not in message and "\n" not in message


def test_refuses_a_document_longer_than_a_row(rng):
    sizes = conversations(rng, 20)
    sizes[13] = (TOKENS + 1, 100, 4, 0, 0)
    with pytest.raises(InputError, match=r"number 13 takes 129 tokens.*100.*row of 128") as error:
        choose(sizes, 2, TOKENS, rows=4)
    assert one_sentence(error)


def test_refuses_nothing_at_all():
    with pytest.raises(InputError, match="no document") as error:
        choose(np.zeros((0, 5), np.int64), 2, TOKENS, rows=4)
    assert one_sentence(error)


def test_refuses_what_fits_no_bucket_by_name():
    buckets = (Bucket(2, 64, 8, 9), Bucket(2, 64, 32, 2))
    sizes = np.array([(30, 15, 1, 0, 0), (20, 12, 5, 0, 0), (64, 8, 9, 0, 0)])
    assert fits(sizes, buckets).tolist() == [True, False, True]
    with pytest.raises(InputError, match=r"Document b \(20 tokens, 12 patches, 5 images\)") as error:
        refuse_too_large(sizes, buckets, "abc".__getitem__)
    assert one_sentence(error)


def answered(rng, n=300):
    """Conversations whose answers are longer than all before them: (tokens, patches, images, frames, answers)."""
    sizes = conversations(rng, n)
    sizes[:, 4] = rng.integers(1, 60, n)
    return sizes


def test_no_row_has_more_answers_than_it_holds(rng):
    sizes = answered(rng)
    found = choose(sizes, 3, TOKENS, rows=4, answers=64)
    assert {b.answers for b in found} == {64}
    assert fits(sizes, found).all()
    packed, _ = pack_shapes(sizes, [b.row for b in found])
    used = np.array([sizes[row].sum(0) for _, row in packed])
    assert used[:, 4].max() <= 64
    assert np.mean(used[:, 4]) > 55  # they are what a row is short of
    assert not choose(sizes * (1, 1, 1, 1, 0), 1, TOKENS, rows=4)[0].answers


def test_rows_that_are_full_of_answers_need_fewer_patches():
    """Ten answers fill a row, so ten pictures of nine patches are all that it shows, however many tokens it has."""
    (bucket,) = choose(np.tile([15, 9, 1, 0, 40], (60, 1)), 1, 2048, rows=2, answers=400)
    assert bucket == Bucket(2, 2048, 96, 10, 0, 400)


def test_refuses_an_answer_longer_than_a_row_has(rng):
    with pytest.raises(InputError, match=r"Document number \d+ has an answer of 59 .* room for 40.*\.answer") as error:
        choose(answered(rng), 1, TOKENS, rows=4, answers=40)
    assert one_sentence(error)
    sizes = np.array([(30, 0, 0, 0, 5), (20, 0, 0, 0, 9)])
    with pytest.raises(InputError, match=r"Document b \(20 tokens, 0 patches, 0 images, 9 answer tokens\)") as error:
        refuse_too_large(sizes, (Bucket(2, 64, 8, 9, answers=8),), "ab".__getitem__)
    assert one_sentence(error)


def test_harmonic():
    assert harmonic(0.5, 1.0) == pytest.approx(2 / 3)
    assert harmonic(0.7, 0.0) == 0.7  # nothing uses the other
    assert harmonic(0.0) == 0.0
