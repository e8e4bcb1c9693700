"""Which patches a picture gets and in which order its tokens stand, against transformers."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the `parity` extra")
pytest.importorskip("transformers", reason="needs the `parity` extra")

from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches
from transformers.vision_utils import get_vision_window_index

from mmjax.sequence import windows
from mmjax.tokenizers.resolution import NaFlex
from mmjax.tokenizers.tiles import AnyRes


def sizes(n, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        yield tuple(int(s) for s in np.exp(rng.uniform(np.log(1), np.log(4000), 2)))


@pytest.mark.parametrize(("patch", "most"), [(16, 256), (16, 1024), (14, 100), (8, 7)])
def test_naflex_sizes(patch, most):
    policy = NaFlex(patch, most)
    for height, width in sizes(400):
        assert policy.size(height, width) == get_image_size_for_max_num_patches(height, width, patch, most)


@pytest.mark.parametrize("sides", [((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)), ((1, 1), (2, 3), (4, 1))])
def test_any_res_order_of_tokens(sides):
    """HF's own functions on features that are their own numbers: best grid, unpadding, newlines, thumbnail first."""
    patch, tile = 14, 70
    side = tile // patch
    policy = AnyRes(patch, tile, sides)
    pinpoints = [[h * tile, w * tile] for h, w in sides]
    for height, width in sizes(300, 1):
        best = select_best_resolution((height, width), pinpoints)
        assert tuple(b // tile for b in best) == policy.best(height, width)
        grid = get_anyres_image_grid_shape((height, width), pinpoints, tile)
        picture = policy.picture(height, width)
        assert len(picture.views) == 1 + grid[0] * grid[1]
        # As LlavaNextModel.pack_image_features lays them out.
        features = torch.arange(1, 1 + len(picture.views) * side * side, dtype=torch.float32)
        base, tiles = features[: side * side], features[side * side :]
        tiles = tiles.view(grid[0], grid[1], side, side, 1).permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
        tiles = unpad_image(tiles, (height, width))
        tiles = torch.cat([tiles, torch.zeros(1, tiles.shape[1], 1)], dim=-1).flatten(1, 2)[0]
        expected = torch.cat([base, tiles]).numpy().astype(int) - 1
        np.testing.assert_array_equal(picture.slots, expected)


@pytest.mark.parametrize("grid", [(1, 8, 12), (3, 16, 10), (2, 14, 14), (1, 2, 22)])
def test_qwen_windows(grid):
    index, borders = get_vision_window_index(torch.tensor([grid]), 2, 32, 4)
    patches, tokens, counts = windows.order(grid, 2, 32 // 4 // 2)
    np.testing.assert_array_equal(tokens, index)
    np.testing.assert_array_equal(np.cumsum(counts), torch.unique_consecutive(borders)[1:])
    assert sorted(patches) == list(range(np.prod(grid)))
