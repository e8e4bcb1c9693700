"""A vocabulary of thirty ids, documents of a few tokens, and a bucket for them."""

import numpy as np

from mmjax.sequence.batch import Bucket
from mmjax.sequence.interleave import Config, Example, interleave
from mmjax.sequence.layout import IMAGE, TEXT, Layout, Piece
from mmjax.tokenizers.vocab import Vocab

PAD, PICTURE, SIZE, VALUES = 9, 6, 30, 12
VOCAB = Vocab(PAD, 1, 2, 3, 4, 5, PICTURE, 7, 8, size=SIZE)
BUCKET = Bucket(rows=3, tokens=20, patches=10, images=3)


def document(name: str, *grids: tuple[int, int], words: int = 2) -> tuple[Example, list[np.ndarray]]:
    """A document of pictures and an answer, and the patches of its pictures: all bytes of one patch are its number."""
    pieces = [Piece(TEXT, 1, (1,))]
    for rows, columns in grids:
        pieces += [Piece(IMAGE, rows * columns, grid=(1, rows, columns)), Piece(TEXT, 1, (8,))]
    pieces.append(Piece(TEXT, words, tuple(range(20, 20 + words)), train=True))
    layout = Layout.of(name, tuple(pieces))
    pictures = [np.tile(np.arange(r * c, dtype=np.uint8)[:, None], VALUES) for r, c in grids]
    return interleave(layout, VOCAB, Config(see="bidirectional_images")), pictures
