"""Sizes, tiles and pixels of every published policy against the `*Pil` image processors of transformers 5.23."""

import importlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="needs the `parity` extra")
pytest.importorskip("transformers", reason="needs the `parity` extra")

from transformers import image_processing_backends

from mmjax.nn import patch_embed
from mmjax.tokenizers.patches import patchify
from mmjax.tokenizers.published import PUBLISHED
from mmjax.tokenizers.view import Resize, render

PINPOINTS = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def square(side):
    return {"height": side, "width": side}


# name in PUBLISHED: (module and class in transformers, its settings)
PROCESSORS = {
    "vit-base-16": ("vit.ViT", {}),
    "clip-large-14-336": ("clip.CLIP", {"size": {"shortest_edge": 336}, "crop_size": square(336)}),
    "siglip-so400m-14-384": ("siglip.Siglip", {"size": square(384)}),
    "siglip2-naflex-16": ("siglip2.Siglip2", {}),
    "llava-1.5": ("llava.Llava", {"do_pad": True, "size": {"shortest_edge": 336}, "crop_size": square(336)}),
    "llava-next": ("llava_next.LlavaNext", {"size": {"shortest_edge": 336}, "crop_size": square(336)}),
    "llava-onevision": ("llava_onevision.LlavaOnevision", {"image_grid_pinpoints": PINPOINTS, **HALF}),
    "minicpm-v-4.6": ("minicpmv4_6.MiniCPMV4_6", {}),
    "qwen2-vl": ("qwen2_vl.Qwen2VL", {}),
    "qwen2.5-vl": ("qwen2_vl.Qwen2VL", {}),
    "qwen3-vl": (
        "qwen2_vl.Qwen2VL",
        {"patch_size": 16, "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}, **HALF},
    ),
    "kosmos-2": ("clip.CLIP", {"use_square_size": True}),
    "pixtral-12b": ("pixtral.Pixtral", {}),
    "mistral-small-3.1": ("pixtral.Pixtral", {"patch_size": square(28), "size": {"longest_edge": 1540}}),
    "internvl-3": (
        "got_ocr2.GotOcr2",
        {
            "size": square(448),
            "crop_to_patches": True,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
    ),
    "idefics2": ("idefics2.Idefics2", {}),
    "idefics3": ("idefics3.Idefics3", {}),
    "smolvlm2": ("smolvlm.SmolVLM", {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}, **HALF}),
    "paligemma": ("siglip.Siglip", {}),
    "deepseek-vl": ("deepseek_vl.DeepseekVL", {}),
    "gemma-3": (
        "gemma3.Gemma3",
        {
            "size": square(896),
            "do_pan_and_scan": True,
            "pan_and_scan_min_crop_size": 256,
            "pan_and_scan_max_num_crops": 4,
            "pan_and_scan_min_ratio_to_activate": 1.2,
        },
    ),
}


def processor(name):
    path, settings = PROCESSORS[name]
    module, stem = path.split(".")
    found = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    return getattr(found, f"{stem}ImageProcessorPil")(**settings)


def views_of(name, output):
    """What the processor made, as views [height, width, 3]."""
    if "target_sizes" in output:  # MiniCPM: strips of patches, side by side
        strip, out, at = np.asarray(output["pixel_values"])[0], [], 0
        for rows, columns in np.asarray(output["target_sizes"]):
            part = strip[:, :, at : at + rows * columns * 14].reshape(3, 14, rows, columns, 14)
            out.append(part.transpose(2, 1, 3, 4, 0).reshape(rows * 14, columns * 14, 3))
            at += rows * columns * 14
        return out
    if "image_grid_thw" in output:  # Qwen: patches, 2 × 2 together, doubled in time
        (_, rows, columns), patch = output["image_grid_thw"][0], PUBLISHED[name].policy.patch
        x = np.asarray(output["pixel_values"]).reshape(rows // 2, columns // 2, 2, 2, 3, 2, patch, patch)
        np.testing.assert_array_equal(x[..., 0, :, :], x[..., 1, :, :])
        return [x[..., 0, :, :].transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * patch, columns * patch, 3)]
    if "spatial_shapes" in output:  # SigLIP 2: patches, padded
        rows, columns = np.asarray(output["spatial_shapes"][0])
        x = np.asarray(output["pixel_values"][0])[: rows * columns].reshape(rows, columns, 16, 16, 3)
        return [x.swapaxes(1, 2).reshape(rows * 16, columns * 16, 3)]
    found = output["pixel_values"]
    while np.ndim(found[0]) == 4:  # a batch of one picture of several views
        found = found[0]
    return [np.moveaxis(np.asarray(view), 0, -1) for view in found]


def theirs(name, picture, **options):
    options = {"do_rescale": False, "do_normalize": False} | options
    return views_of(name, processor(name)(images=[picture], **options))


def shown(name, view):
    """What a convolution of the patch's size sees of a view."""
    patch = PUBLISHED[name].policy.patch
    return view[: view.shape[0] // patch * patch, : view.shape[1] // patch * patch]


def sizes(n, largest=5000):
    rng = np.random.default_rng(0)
    yield from [(1, 1), (1, 90), (90, 1), (336, 336), (1024, 1024), (1000, 4000), (4000, 1000), (600, 600), (200, 659)]
    for _ in range(n):
        height = np.exp(rng.uniform(np.log(8), np.log(largest)))
        width = np.clip(height * np.exp(rng.normal(0, 0.8)), max(8, height / 60), height * 60)
        yield int(height), int(width)


@pytest.mark.parametrize("name", PROCESSORS)
def test_sizes_and_tiles(name, monkeypatch):
    """On 2,000 sizes: every resize they order, in their order, and every view they return."""
    ordered = []

    def resize(image, size, **_):
        ordered.append((image.shape[-2:], tuple(map(int, size))))
        return np.broadcast_to(np.uint8(0), (3, *map(int, size)))

    monkeypatch.setattr(image_processing_backends, "np_resize", resize)
    # Nothing is computed on these pictures: only their shapes count.
    monkeypatch.setattr(np, "pad", lambda x, by, *_, **__: np.broadcast_to(np.uint8(0), padded(x.shape, by)))
    made, policy = processor(name), PUBLISHED[name].policy
    options = {
        "do_rescale": False,
        "do_normalize": False,
        "do_convert_rgb": False,
        "input_data_format": "channels_last",
    }
    if name == "deepseek-vl":  # it resizes by a name of its own
        monkeypatch.setattr(sys.modules[type(made).__module__], "np_resize", resize)
    options |= {"do_pad": False} if name not in ("llava-1.5", "siglip2-naflex-16", "deepseek-vl") else {}
    for height, width in sizes(2000):
        ordered.clear()
        picture = np.broadcast_to(np.uint8(0), (height, width, 3))
        if PROCESSORS[name][0] == "qwen2_vl.Qwen2VL":  # their patches of pictures of nothing would take minutes
            unit = policy.patch * policy.merge
            found = [made.resize(picture.transpose(2, 0, 1), made.size, made.resample, unit).shape[1:]]
        else:
            found = [view.shape[:2] for view in views_of(name, made(images=[picture], **options))]
        views, patch = policy.views(height, width), policy.patch
        ends = [(view[-1].height, view[-1].width) for view in views]
        assert ends == [(h // patch * patch, w // patch * patch) for h, w in found], (height, width)
        assert [(rows * patch, columns * patch) for rows, columns in grids(policy, height, width)] == ends
        assert {step for view in views for step in resizes(view, height, width)} == {
            (before, after) for before, after in ordered if before != after
        }


def resizes(view, height, width):
    """From which size to which, where they differ."""
    for step in view:
        before, (height, width) = (height, width), (step.height, step.width)
        if isinstance(step, Resize) and before != (height, width):
            yield before, (height, width)


def padded(shape, by):
    return tuple(n + sum(b) for n, b in zip(shape, by, strict=True))


def grids(policy, height, width):
    return policy.picture(height, width).views if hasattr(policy, "picture") else (policy.grid(height, width),)


SHAPES = [(61, 47), (300, 451), (191, 384), (640, 427), (131, 700)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels(name, shape):
    """Byte by byte: a noisy picture, which shows every difference, on a slope, which shows where it is from."""
    rng = np.random.default_rng(1)
    slope = np.add.outer(np.arange(shape[0]), np.arange(shape[1]))[..., None] * 200 // sum(shape)
    picture = (slope + rng.integers(0, 56, (*shape, 3))).astype(np.uint8)
    ours = render(picture, PUBLISHED[name].policy.views(*shape))
    found = theirs(name, Image.fromarray(picture))
    assert len(ours) == len(found)
    for mine, view in zip(ours, found, strict=True):
        np.testing.assert_array_equal(mine, shown(name, view))


@pytest.mark.parametrize("name", PROCESSORS)
def test_normalised_on_device(name):
    """Bytes, normalised inside the patch embedding, are the numbers they train with."""
    shape = (37, 60)
    picture = np.random.default_rng(2).integers(0, 256, (*shape, 3), np.uint8)
    entry = PUBLISHED[name]
    ours = render(picture, entry.policy.views(*shape))
    found = theirs(name, Image.fromarray(picture), do_rescale=True, do_normalize=True)
    for mine, view in zip(ours, found, strict=True):
        cut = patchify(mine, entry.policy.patch)
        cfg = patch_embed.Config(entry.policy.patch, 1, mean=entry.mean, deviation=entry.deviation)
        got = patch_embed.normalise(jnp.asarray(cut[None]), cfg)[0]
        rows, columns = mine.shape[0] // entry.policy.patch, mine.shape[1] // entry.policy.patch
        want = shown(name, view).reshape(rows, entry.policy.patch, columns, -1).swapaxes(1, 2)
        np.testing.assert_allclose(got, want.reshape(got.shape), atol=1e-6)
