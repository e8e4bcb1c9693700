import numpy as np

from mmjax.sequence.layout import IMAGE, TEXT, Piece
from mmjax.sequence.positions import grid_positions, mrope


def text(length):
    return Piece(TEXT, length, tuple(range(length)))


def image(*grid):
    return Piece(IMAGE, int(np.prod(grid)), (), grid)


def test_worked_by_hand():
    """Text, a picture of 2 × 3 patches, text, one of 3 × 1, text: after a picture, one more than its largest number."""
    got = mrope((text(2), image(1, 2, 3), text(2), image(1, 3, 1), text(1)))
    expected = [
        (0, 0, 0),
        (1, 1, 1),
        *[(2, 2, 2), (2, 2, 3), (2, 2, 4)],
        *[(2, 3, 2), (2, 3, 3), (2, 3, 4)],
        (5, 5, 5),  # 2 + max(2, 3)
        (6, 6, 6),
        (7, 7, 7),
        (7, 8, 7),
        (7, 9, 7),
        (10, 10, 10),  # 7 + max(3, 1)
    ]
    np.testing.assert_array_equal(got, expected)


def test_grid_positions_in_raster_order():
    expected = [(f, r, c) for f in range(2) for r in range(3) for c in range(4)]
    np.testing.assert_array_equal(grid_positions((2, 3, 4)), expected)


def test_random_documents_against_a_loop(rng):
    """Every piece starts at the largest number so far, in any of the three, plus one (as Qwen2-VL's own code does)."""
    for _ in range(50):
        pieces, expected = [], []
        for _ in range(rng.integers(1, 8)):
            start = 1 + max((max(triple) for triple in expected), default=-1)
            if rng.random() < 0.5:
                pieces.append(text(int(rng.integers(1, 6))))
                expected += [(start + i,) * 3 for i in range(pieces[-1].length)]
            else:
                frames, rows, columns = rng.integers(1, 5, 3).tolist()
                pieces.append(image(frames, rows, columns))
                for f in range(frames):
                    for r in range(rows):
                        expected += [(start + f, start + r, start + c) for c in range(columns)]
        got = mrope(tuple(pieces))
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == np.int32
