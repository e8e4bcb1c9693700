"""Position ids of the three Qwen families against transformers' get_rope_index: host, device, padded and packed."""

import types

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the `parity` extra")
pytest.importorskip("transformers")

from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from mmjax.sequence import positions
from mmjax.sequence.layout import IMAGE, TEXT, Piece

TOKENS, MEDIA, DOCUMENTS = 1536, 128, 500


def family(cls, tokens_per_second):
    """The model's method without the model: it reads two numbers of its config."""
    model = cls.__new__(cls)
    torch.nn.Module.__init__(model)
    vision = types.SimpleNamespace(spatial_merge_size=2, tokens_per_second=tokens_per_second)
    model.config = types.SimpleNamespace(vision_config=vision)
    return model


def document(rng, tokens_per_second, by_frame):
    """Pieces as ours, and token types, image grids, video grids and seconds per step as theirs."""
    pieces, kinds, images, videos, seconds = [], [], [], [], []

    def add(piece, kind):
        pieces.append(piece)
        kinds.extend([kind] * piece.length)

    for _ in range(rng.integers(1, 6)):
        add(Piece(TEXT, int(rng.integers(1, 9))), 0)
        kind = rng.integers(3)
        rows, columns = (2 * rng.integers(1, 6, 2)).tolist()
        if kind == 1:
            images.append((1, rows, columns))
            add(Piece(IMAGE, rows * columns // 4, (), images[-1]), 1)
        elif kind == 2:
            frames = int(rng.integers(1, 9))
            videos.append((frames, rows, columns))
            seconds.append(np.float32(rng.choice([0.5, 1.0, 0.37, 1.7, 0.04])))
            if by_frame:
                for grid in positions.frames(videos[-1]):
                    add(Piece(IMAGE, rows * columns // 4, (), grid), 2)
                    add(Piece(TEXT, 2), 0)  # a time stamp
            else:
                interval = float(seconds[-1] * np.float32(tokens_per_second)) if tokens_per_second else 1.0
                add(Piece(IMAGE, frames * rows * columns // 4, (), videos[-1], interval=interval), 2)
    return tuple(pieces), kinds, images, videos, seconds


def descriptors(rows):
    """What mrope_ids reads, for rows of packed documents."""
    ids = np.full((2, len(rows), TOKENS), -1, np.int32)
    grid, interval = np.zeros((len(rows), MEDIA, 3), np.int32), np.zeros((len(rows), MEDIA), np.float32)
    for r, documents in enumerate(rows):
        at = slot = number = 0
        for d, pieces in enumerate(documents):
            for piece in pieces:
                ids[0, r, at : at + piece.length] = d
                if piece.grid:
                    ids[1, r, at : at + piece.length] = np.arange(slot, slot + piece.length)
                    grid[r, number], interval[r, number] = piece.grid, piece.interval
                    slot, number = slot + piece.length, number + 1
                at += piece.length
    return *ids, grid, interval


@pytest.mark.parametrize(
    ("cls", "tokens_per_second"), [(Qwen2VLModel, None), (Qwen2_5_VLModel, 2), (Qwen3VLModel, None)]
)
def test_position_ids_equal_get_rope_index(rng, cls, tokens_per_second):
    model = family(cls, tokens_per_second)
    ours = jax.jit(lambda d, s, g, i: positions.mrope_ids(d, s, g, positions.QWEN_VL, interval=i))
    made = []
    while len(made) < DOCUMENTS:
        pieces, kinds, images, videos, seconds = document(rng, tokens_per_second, cls is Qwen3VLModel)
        pad = int(rng.integers(0, 5))
        types_ = torch.tensor([[0] * pad + kinds])
        mask = torch.tensor([[0] * pad + [1] * len(kinds)])
        timing = {"second_per_grid_ts": torch.tensor(np.array(seconds))} if tokens_per_second else {}
        expected, _ = model.get_rope_index(
            torch.zeros_like(types_),
            types_,
            torch.tensor(images) if images else None,
            torch.tensor(videos) if videos else None,
            attention_mask=mask,
            **timing,
        )
        expected = expected[:, 0, pad:].T.numpy()
        np.testing.assert_array_equal(positions.mrope(pieces, positions.QWEN_VL), expected)
        made.append((pieces, expected))
    # Packed as they come, eight rows of several documents at a time.
    rows, used = [[]], 0
    for item in made:
        if used + len(item[1]) > TOKENS or sum(bool(p.grid) for d, _ in [*rows[-1], item] for p in d) > MEDIA:
            rows.append([])
            used = 0
        rows[-1].append(item)
        used += len(item[1])
    for first in range(0, len(rows), 8):
        chosen = rows[first : first + 8] + [[]] * (8 - len(rows[first : first + 8]))
        got = np.asarray(ours(*descriptors([[pieces for pieces, _ in row] for row in chosen])))
        for row, documents in zip(got, chosen, strict=True):
            expected = np.concatenate([e for _, e in documents] or [np.zeros((0, 3))])
            np.testing.assert_array_equal(row[: len(expected)], expected)
            assert not row[len(expected) :].any()
