"""Batches whose pictures are resized on device, against the same batches from the host."""

import dataclasses
import functools
import io

import jax
import numpy as np
import PIL.Image
import pytest

from mmjax.core.errors import InputError
from mmjax.data import device, index
from mmjax.data.device import Canvases
from mmjax.data.source import Source
from mmjax.sequence import interleave
from mmjax.sequence.document import Document, Image, Text
from mmjax.sequence.layout import layout
from mmjax.tokenizers.resolution import Fixed, NaFlex, Native
from mmjax.tokenizers.slices import UHD
from mmjax.tokenizers.tiles import AnyRes, PanAndScan, Splits, Tiles
from mmjax.tokenizers.vocab import Vocab

PATCH = 4
VOCAB = Vocab(0, 1, 2, 3, 4, 5, 6, 7, 8, size=35)
CANVASES = Canvases((32, 64), 3)
POLICIES = {
    "crop": (Fixed(PATCH, 8, 12, "crop"), True),
    "native": (Native(PATCH, 2, 64, 24 * 24), True),
    "windows": (Native(PATCH, 2, 64, 40 * 24), True),
    "naflex": (NaFlex(PATCH, 9), True),
    "any-res": (AnyRes(PATCH, 8, ((1, 2), (2, 1)), newline=False), True),
    "tiles": (Tiles(PATCH, 8, 1, 4), True),
    "uhd": (UHD(PATCH, 8, 4, 4), True),
    "pad": (Fixed(PATCH, 8, 8, "pad"), False),
    "splits": (Splits(PATCH, 8, 24), False),
    "pan and scan": (PanAndScan(PATCH, 8, 4, 3), False),
}


class Letters:
    vocab = VOCAB

    def encode(self, text):
        return [9 for _ in text]


def png(pixels):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("name", POLICIES)
def test_patches_are_the_hosts(name, rng, monkeypatch):
    """Within one grey level, in the same places; nothing that can be done on device is done on the host."""
    policy, there = POLICIES[name]
    lay = functools.partial(layout, tokenizer=Letters(), resolution=policy)
    pictures = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in ((7, 23), (30, 17), (61, 40), (64, 9))]
    documents = [Document(f"{i}", (Image(*p.shape[:2], png(p)), Text("a" * i))) for i, p in enumerate(pictures)]
    cfg = interleave.Config(
        position="sequential", merge=getattr(policy, "merge", 1), window=2 if name == "windows" else 0
    )
    plan = index.once(documents, lay, tokens=160, rows=2)
    made = Source(documents, lay, plan, VOCAB, PATCH, cfg)
    if there:
        monkeypatch.setattr("mmjax.sequence.media.render", None)
    moved = dataclasses.replace(made, canvases=CANVASES)
    for step in range(len(plan.steps)):
        got = moved[step]
        monkeypatch.undo()
        want = made[step]
        if there:
            monkeypatch.setattr("mmjax.sequence.media.render", None)
        assert isinstance(got.patches, jax.Array)
        apart = np.abs(np.asarray(got.patches).astype(int) - want.patches)
        assert apart.max() <= 1
        assert (apart > 0).mean() < 0.01
        assert want.patches.any()
        for field in ("tokens", "slot", "patch_order", "patch_image", "grid"):
            np.testing.assert_array_equal(getattr(got, field), getattr(want, field))


def test_pictures_beyond_the_largest_canvas_and_arrays_stay_on_the_host(rng):
    pictures = [rng.integers(0, 256, (shape, 9, 3), np.uint8) for shape in (40, 80)]
    lay = functools.partial(layout, tokenizer=Letters(), resolution=NaFlex(PATCH, 9))
    documents = [
        Document("file", (Image(40, 9, png(pictures[0])), Text("a"))),
        Document("large", (Image(80, 9, png(pictures[1])), Text("a"))),
        Document("drawn", (Image(40, 9, lambda: pictures[0]), Text("a"))),
    ]
    plan = index.once(documents, lay, tokens=64, rows=1)
    made = Source(documents, lay, plan, VOCAB, PATCH)
    media = {d.id: dataclasses.replace(made, canvases=CANVASES).example(d)[1][0] for d in documents}
    assert [isinstance(m, device.OnDevice) for m in media.values()] == [True, False, False]
    for step in range(len(plan.steps)):
        got = dataclasses.replace(made, canvases=CANVASES)[step].patches
        assert np.abs(np.asarray(got).astype(int) - made[step].patches).max() <= 1


def test_few_programs_for_many_sizes(rng):
    """Pictures of 12 sizes in two canvases and three shapes of grids."""
    lay = functools.partial(layout, tokenizer=Letters(), resolution=NaFlex(PATCH, 9))
    before = device._cells._cache_size()
    for height in range(20, 44, 2):
        picture = Document("p", (Image(height, 30, png(rng.integers(0, 256, (height, 30, 3), np.uint8))), Text("a")))
        plan = index.once([picture], lay, tokens=64, rows=1)
        Source([picture], lay, plan, VOCAB, PATCH, canvases=CANVASES).example(picture)
    assert device._cells._cache_size() - before <= 4


@pytest.mark.parametrize("wrong", [{"sides": ()}, {"sides": (0,)}, {"step": 0}])
def test_canvases_that_hold_nothing_are_refused(wrong):
    with pytest.raises(InputError, match="holds no picture"):
        Canvases(**wrong)
