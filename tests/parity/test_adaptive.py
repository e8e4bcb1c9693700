"""APT's patch sizes against its rule, written down with torch's own histogram and interpolation."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the `parity` extra")

from mmjax.tokenizers.adaptive import Adaptive, entropy


def picture(seed, height, width):
    """Flat, smooth and noisy regions."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 120 // width, y * 90 // height, (x + y) % 200], -1)
    noise = rng.integers(0, 120, (height, width, 3)) * (np.sin(x / 9 + seed) * np.sin(y / 13) > 0.2)[..., None]
    flat = (((x // 64 + y // 64) % 2 == seed % 2) | ((x // 32 + y // 32) % 5 == 0))[..., None]
    return np.where(flat, 77, base + noise).clip(0, 255).astype(np.uint8)


def their_entropy(image, side):
    pixels = torch.from_numpy(image).permute(2, 0, 1).float()
    grey = 0.2989 * pixels[0] + 0.5870 * pixels[1] + 0.1140 * pixels[2]
    squares = grey.unfold(0, side, side).unfold(1, side, side)
    p = torch.stack([torch.histc(s, bins=512, min=0, max=255) for s in squares.reshape(-1, side * side)]) / side**2
    return -(p * torch.log2(p + 1e-10)).sum(1).reshape(squares.shape[:2]).numpy()


@pytest.mark.parametrize(("seed", "height", "width"), [(0, 192, 128), (1, 64, 320), (2, 128, 128)])
def test_entropy_and_sizes(seed, height, width):
    image, policy = picture(seed, height, width), Adaptive(16, (5.75, 4.0))
    maps = {side: their_entropy(image, 16 * side) for side in (1, 2, 4)}
    for side, theirs in maps.items():
        np.testing.assert_allclose(entropy(image, 16 * side), theirs, atol=2e-5)
    masks = {4: maps[4] < 4.0, 2: maps[2] < 5.75}
    masks[2] &= ~masks[4].repeat(2, 0).repeat(2, 1)
    masks[1] = ~(masks[2].repeat(2, 0).repeat(2, 1) | masks[4].repeat(4, 0).repeat(4, 1))
    want = [(row * side, column * side, side) for side in (1, 2, 4) for row, column in np.argwhere(masks[side])]
    cells = policy.cells(image)
    assert cells.tolist() == [list(map(int, cell)) for cell in want]
    assert {1, 4} <= set(cells[:, 2].tolist())
    # The pixels, within the half level of rounding to bytes.
    scaled = {
        side: torch.nn.functional.interpolate(
            torch.from_numpy(image).permute(2, 0, 1)[None].float(), scale_factor=1 / side, mode="bilinear"
        )[0].permute(1, 2, 0)
        for side in (1, 2, 4)
    }
    for (row, column, side), patch in zip(cells.tolist(), policy.patches(image, cells), strict=True):
        y, x = row // side * 16, column // side * 16
        theirs = scaled[side][y : y + 16, x : x + 16].numpy()
        assert np.abs(patch.reshape(16, 16, 3) - theirs).max() <= 0.5
