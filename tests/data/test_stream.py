import dataclasses
import functools

import grain
import jax
import numpy as np
import pytest

from mmjax.core.errors import InputError
from mmjax.data.stream import stream
from mmjax.sequence.batch import Batch, Bucket
from mmjax.sequence.document import Document, Image, Text
from mmjax.sequence.layout import layout
from mmjax.tokenizers.resolution import Native
from mmjax.tokenizers.vocab import Vocab

VOCAB = Vocab(0, 1, 2, 3, 4, 5, 6, 7, 8, size=35)
BUCKET = Bucket(3, 40, 24, 4)


class Letters:
    vocab = VOCAB

    def encode(self, text):
        return [9 + ord(letter) - ord("a") for letter in text]


LAYOUT = functools.partial(layout, tokenizer=Letters(), resolution=Native(4, 1, 16, 24 * 24))


def document(n):
    rng = np.random.default_rng(n)
    pictures = [rng.integers(0, 256, (4 * (1 + i % 2), 8, 3), np.uint8) for i in range(n % 3)]
    words = "".join("abcdefghij"[int(c)] for c in str(n))
    return Document(
        f"d{n}", (*(Image(*p.shape[:2], p) for p in pictures), Text(words), Text("k" * (n % 5), "assistant", True))
    )


def source(n):
    return grain.MapDataset.source([document(i) for i in range(n)]).to_iter_dataset(grain.ReadOptions(num_threads=0))


def make(n=60, **changes):
    return stream(source(n), LAYOUT, BUCKET, VOCAB, 4, **changes)


def said(batch):
    """The words of every document of a batch."""
    out = []
    for row in range(len(batch.tokens)):
        for d in range(batch.document[row].max() + 1):
            ids = batch.tokens[row, batch.document[row] == d]
            out.append(int("".join(str(i - 9) for i in ids if 9 <= i < 19)))
    return out


def test_every_document_once_in_full_static_rows():
    batches = list(make())
    assert all(isinstance(b, Batch) and b.tokens.shape == (3, 40) and b.patches.shape == (3, 24, 48) for b in batches)
    assert sorted(n for b in batches for n in said(b)) == list(range(60))
    filled = np.concatenate([(b.modality > 0).reshape(-1) for b in batches[:-2]])
    assert filled.mean() > 0.8


def test_a_longer_look_ahead_fills_better():
    fills = []
    for look_ahead in (1, 32):
        batches = list(make(200, look_ahead=look_ahead))
        fills.append(np.mean([(b.modality > 0).mean() for b in batches]))
    assert fills[1] > fills[0] + 0.03


def test_resumes_exactly():
    whole = list(make())
    it = iter(make())
    first = [next(it) for _ in range(2)]
    state = it.get_state()
    again = iter(make())
    again.set_state(state)
    for a, b in zip([*first, *again], whole, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_document_that_fits_no_row_is_named():
    big = grain.MapDataset.source([document(1), Document("big", (Text("a" * 47),))]).to_iter_dataset()
    with pytest.raises(InputError, match=r"'big' takes 50 tokens, more than a row of 40 tokens, 24 patches, 4 images;"):
        list(stream(big, LAYOUT, BUCKET, VOCAB, 4))
    small = dataclasses.replace(BUCKET, images=1)
    with pytest.raises(InputError, match="'d2' takes 2 images"):
        list(stream(source(4), LAYOUT, small, VOCAB, 4))
