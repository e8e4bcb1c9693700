import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.core.errors import InputError
from mmjax.sequence import positions
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
        got = mrope(tuple(pieces), positions.MRope(advance="all"))
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == np.int32


def row_of(documents, tokens, media):
    """The descriptors of one row of packed documents, as the loader makes them."""
    document, slot = np.full((1, tokens), -1, np.int32), np.full((1, tokens), -1, np.int32)
    grid, interval = np.zeros((1, media, 3), np.int32), np.ones((1, media), np.float32)
    at = used = number = 0
    for d, pieces in enumerate(documents):
        for piece in pieces:
            document[0, at : at + piece.length] = d
            if piece.grid:
                slot[0, at : at + piece.length] = np.arange(used, used + piece.length)
                grid[0, number], interval[0, number] = piece.grid, piece.interval
                used, number = used + piece.length, number + 1
            at += piece.length
    return document, slot, grid, interval


def random_document(rng, merge):
    pieces = []
    for _ in range(rng.integers(1, 6)):
        if rng.random() < 0.5:
            pieces.append(text(int(rng.integers(1, 6))))
        else:
            f, r, c = rng.integers(1, 5, 3).tolist()
            pieces.append(
                Piece(IMAGE, f * r * c, (), (f, r * merge, c * merge), interval=float(rng.choice([1, 0.5, 2.75])))
            )
    return tuple(pieces)


@pytest.mark.parametrize("advance", ["sides", "all"])
@pytest.mark.parametrize("merge", [1, 2])
def test_device_equals_host_packed_or_alone(rng, merge, advance):
    """Media side by side, documents that begin and end with media, rows that are full, empty places."""
    cfg = positions.MRope(merge, advance)
    run = jax.jit(lambda d, s, g, i: positions.mrope_ids(d, s, g, cfg, interval=i))
    for _ in range(25):
        documents = [random_document(rng, merge) for _ in range(3)]
        expected = np.concatenate([mrope(d, cfg) for d in documents])
        got = np.asarray(run(*row_of(documents, 1024, 24)))[0]
        np.testing.assert_array_equal(got[: len(expected)], expected)
        assert not got[len(expected) :].any()


def test_rows_are_independent_and_full_rows_work():
    a, b = (text(2), image(1, 2, 2)), (image(1, 1, 3), text(3))
    rows = [np.concatenate(x) for x in zip(row_of([a], 6, 2), row_of([b], 6, 2), strict=True)]
    got = positions.mrope_ids(*map(jnp.asarray, rows[:3]))
    np.testing.assert_array_equal(got[0], mrope(a))
    np.testing.assert_array_equal(got[1], mrope(b))


def test_after_a_video():
    """Five frames of 2 × 3 tokens, half a second apart at 2.5 numbers a second: times 0 1 2 3 5."""
    video = Piece(IMAGE, 30, (), (5, 4, 6), interval=1.25)
    assert mrope((video, text(1)), positions.MRope(2))[-1].tolist() == [3, 3, 3]
    ours = mrope((video, text(1)), positions.MRope(2, "all"))
    assert ours[::6, 0].tolist() == [0, 1, 2, 3, 5, 6]
    assert ours[-1].tolist() == [6, 6, 6]


def test_a_piece_that_is_not_its_grid_is_refused():
    with pytest.raises(InputError, match=r"\(1, 4, 4\) patches has 16 tokens, but M-RoPE that merges 2 × 2"):
        mrope((Piece(IMAGE, 16, (), (1, 4, 4)),), positions.MRope(2))


def test_lengths_of_documents():
    document = jnp.array([[0, 0, 0, 1, 1, -1]])
    position = jnp.array([[[0, 0], [4, 2], [1, 9], [0, 0], [1, 1], [0, 0]]])
    assert positions.lengths(document, position).tolist() == [[10, 10, 10, 2, 2, 0]]
