"""Videos of the Qwen-VL families and LLaVA-OneVision against transformers 5.23: which pictures, size, ids, positions.

The processors of videos there need torchvision, which has no build for these tests. So their methods are called without
the class (choosing, sizes, cutting), and pictures are resized by Pillow; torch's own resizing differs by a grey level
or two.
"""

import importlib
import json
import random
import sys
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the `parity` extra")
pytest.importorskip("transformers", reason="needs the `parity` extra")

from parity.test_processors import DIRECTORIES, _any_part, directory, normalised, reference, rope, words, write
from PIL import Image as Pictures
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from mmjax.convert import processor
from mmjax.sequence import windows
from mmjax.sequence.document import Document, Image, Text, Video

__all__ = ["_any_part"]  # the fixture
ASKED = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
FUNCTIONAL = "torchvision.transforms.v2.functional"


def module(family):
    """The module of a family's video processor, imported although there is no torchvision."""
    parts = FUNCTIONAL.split(".")
    names = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    try:
        importlib.import_module(FUNCTIONAL)
        missing = []
    except ImportError:
        missing = names
    for name in missing:
        sys.modules[name] = types.ModuleType(name)
    try:
        return importlib.import_module(f"transformers.models.{family}.video_processing_{family}")
    finally:
        for name in missing:
            del sys.modules[name]


SIZES = {  # pixels of a picture, and of a clip for Qwen3-VL
    "qwen2_vl": {"size": {"shortest_edge": 40 * 40, "longest_edge": 90 * 90}},
    "qwen2_5_vl": {"size": {"shortest_edge": 40 * 40, "longest_edge": 120 * 120}},
    "qwen3_vl": {"size": {"shortest_edge": 4 * 64 * 64, "longest_edge": 8 * 96 * 96}},
}
CHOICES = {
    "qwen2_vl": [{}, {"do_sample_frames": True, "fps": 2.0}, {"do_sample_frames": True, "num_frames": 5}],
    "qwen2_5_vl": [{}, {"do_sample_frames": True, "fps": 3, "min_frames": 2, "max_frames": 7}],
    "qwen3_vl": [{}, {"fps": 4, "max_frames": 6}, {"do_sample_frames": False}, {"num_frames": 4, "fps": None}],
}


class Videos:
    """transformers' processor of videos, pictures resized by Pillow."""

    def __init__(self, name, settings, fps):
        self.name, self.fps, self.settings = name, fps, settings
        self.module = module("qwen3_vl" if name == "qwen3_vl" else "qwen2_vl")
        self.cls = getattr(self.module, "Qwen3VLVideoProcessor" if name == "qwen3_vl" else "Qwen2VLVideoProcessor")
        self.patch, self.merge_size, self.temporal_patch_size = (16 if name == "qwen3_vl" else 14), 2, 2

    def get(self, key):
        return self.settings.get(key, getattr(self.cls, key, None))

    def __call__(self, videos, **_):
        found = [self.one(video) for batch in videos for video in (batch if isinstance(batch, list) else [batch])]
        return {
            "pixel_values_videos": np.concatenate([patches for patches, _, _ in found]),
            "video_grid_thw": torch.tensor([grid for _, grid, _ in found]),
            "video_metadata": [metadata for _, _, metadata in found],
        }

    def one(self, video):
        metadata = VideoMetadata(total_num_frames=len(video), fps=self.fps)
        if self.get("do_sample_frames"):
            keys = ("num_frames", "fps", "min_frames", "max_frames", "temporal_patch_size")
            itself = types.SimpleNamespace(**{key: self.get(key) for key in keys})
            number = self.settings.get("num_frames")
            fps = None if number else itself.fps
            metadata.frames_indices = self.cls.sample_frames(itself, metadata, num_frames=number, fps=fps)
            video = video[np.asarray(metadata.frames_indices)]
        elif self.name == "qwen3_vl":
            metadata.frames_indices = list(range(len(video)))
        size, unit = self.settings["size"], self.patch * 2
        bounds = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"], "factor": unit}
        clip = {"num_frames": len(video)} if self.name == "qwen3_vl" else {}
        height, width = self.module.smart_resize(height=video.shape[1], width=video.shape[2], **clip, **bounds)
        drawn = [np.asarray(Pictures.fromarray(f).resize((width, height), Pictures.Resampling.BICUBIC)) for f in video]
        mean, deviation = ((np.float32(x) for x in pair) for pair in zip(*self.colours(), strict=True))
        pixels = (np.stack(drawn) / np.float32(255) - np.array(list(mean))) / np.array(list(deviation))
        tensor = torch.tensor(pixels.transpose(0, 3, 1, 2)[None], dtype=torch.float32)
        patches, *grid = self.cls.patchify(None, tensor, self.patch, 2, 2)
        return patches[0].numpy(), grid, metadata

    def colours(self):
        mean, deviation = self.get("image_mean"), self.get("image_std")
        return list(zip(mean, deviation, strict=True))


def clip(rng, frames, height, width):
    return np.random.default_rng(rng.randint(0, 10**6)).integers(0, 256, (frames, height, width, 3), np.uint8)


@pytest.mark.parametrize(("name", "choice"), [(name, n) for name in CHOICES for n in range(len(CHOICES[name]))])
def test_qwen(name, choice, tmp_path):
    path = directory(tmp_path, name, "hub")
    settings = SIZES[name] | CHOICES[name][choice]
    kind = "Qwen3VLVideoProcessor" if name == "qwen3_vl" else "Qwen2VLVideoProcessor"
    write(path, "video_preprocessor_config.json", settings | {"video_processor_type": kind})
    ours, theirs = processor.load(path), reference(path, name)
    rng = random.Random(f"{name}{choice}")
    for frames, fps in [(8, 4.0), (7, 2.0), (12, 29.97), (5, 24.0), (30, 10.0)]:
        video = clip(rng, frames, rng.randint(30, 110), rng.randint(30, 110))
        picture = clip(rng, 1, 50, 70)[0]
        texts = [words(rng, False) for _ in range(2)]
        content = [
            {"type": "text", "text": texts[0]},
            {"type": "video", "video": video},
            {"type": "image", "image": Pictures.fromarray(picture)},
            {"type": "text", "text": texts[1]},
        ]
        spans = (
            Text(texts[0]),
            Video(*video.shape[:3], fps, video),
            Image(*picture.shape[:2], picture),
            Text(texts[1]),
        )
        theirs.video_processor = Videos(name, settings, fps)
        want = theirs.apply_chat_template([{"role": "user", "content": content}], **ASKED)
        document = Document("d", spans)
        batch, (x, _) = ours.batch([document]), ours.example(document)
        ids = np.asarray(want["input_ids"]).reshape(-1).tolist()
        assert batch.tokens[0, : len(ids)].tolist() == ids, (theirs.tokenizer.decode(ids), frames, fps)
        grids = [want["video_grid_thw"][0].tolist(), np.asarray(want["image_grid_thw"])[0].tolist()]
        assert x.grid.tolist() == grids
        patch = ours.patch
        n = int(np.prod(grids[0]))
        order, _, _ = windows.order(tuple(grids[0]), 2)
        raster = np.empty((n, 2 * patch * patch * 3), np.float32)
        found = want["pixel_values_videos"].reshape(n, 3, 2, patch, patch)
        raster[order] = found.transpose(0, 2, 3, 4, 1).reshape(n, -1)
        mine = normalised(ours, batch.patches[0, None, :n])[0]
        np.testing.assert_allclose(mine, raster[x.patch_raster[:n]], atol=1e-5)
        # A picture beside a video is there twice.
        still = batch.patches[0, n : len(x.patch_raster)].reshape(-1, 2, patch * patch * 3)
        np.testing.assert_array_equal(still[:, 0], still[:, 1])
        kinds = np.asarray(want["mm_token_type_ids"]).reshape(-1).tolist()
        given = {
            "image_grid_thw": torch.as_tensor(np.asarray(want["image_grid_thw"])),
            "video_grid_thw": want["video_grid_thw"],
        }
        if name == "qwen2_5_vl":
            given["second_per_grid_ts"] = torch.tensor(want["second_per_grid_ts"])
        expected = rope(name, DIRECTORIES[name][-1], ids, kinds, given)
        np.testing.assert_array_equal(batch.position[0, : len(ids)], expected)


@pytest.mark.parametrize("chosen", [{}, {"fps": 2.0}, {"num_frames": 3}])
def test_llava_onevision(chosen, tmp_path):
    """Ids, and the features that stand in their places: torch's pooling of them."""
    path = directory(tmp_path, "llava_onevision", "hub")
    size = {"size": {"height": 60, "width": 60}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    settings = {"video_processor_type": "LlavaOnevisionVideoProcessor", "do_sample_frames": bool(chosen)}
    write(path, "video_preprocessor_config.json", settings | size | chosen)
    ours, theirs = processor.load(path), reference(path, "llava_onevision")
    rng = random.Random(3)
    for frames, fps in [(4, 2.0), (9, 3.5)]:
        video = clip(rng, frames, 40, 90)
        metadata = VideoMetadata(total_num_frames=frames, fps=fps)
        indices = range(frames)
        if chosen:
            indices = default_sample_indices_fn(metadata, chosen.get("num_frames"), chosen.get("fps"))
        drawn = [Pictures.fromarray(video[i]).resize((60, 60), Pictures.Resampling.BICUBIC) for i in indices]
        made = {"pixel_values_videos": np.zeros((1, len(drawn), 3, 60, 60))}
        theirs.video_processor = lambda _, made=made, **__: made
        content = [{"type": "video", "video": video}, {"type": "text", "text": "what?"}]
        want = theirs.apply_chat_template([{"role": "user", "content": content}], **ASKED)
        batch = ours.batch([Document("d", (Video(*video.shape[:3], fps, video), Text("what?")))])
        ids = np.asarray(want["input_ids"]).reshape(-1)
        np.testing.assert_array_equal(batch.tokens[0, : len(ids)], ids)
        features = torch.randn(len(drawn), 16, 5)
        pooled = torch.nn.functional.interpolate(
            features.reshape(-1, 4, 4, 5).permute(0, 3, 1, 2), size=(2, 2), mode="bilinear"
        )
        expected = pooled.permute(0, 2, 3, 1).reshape(-1, 5).numpy()
        np.testing.assert_allclose(mixed(batch, features.reshape(-1, 5).numpy()), expected, atol=1e-6)
        cut = np.stack([np.asarray(view)[:56, :56].reshape(4, 14, 4, 14, 3).swapaxes(1, 2) for view in drawn])
        np.testing.assert_array_equal(batch.patches[0, : len(drawn) * 16], cut.reshape(-1, 14 * 14 * 3))


class Films:
    """transformers' processor of SmolVLM's videos, pictures resized by Pillow."""

    def __init__(self, settings, fps):
        self.module, self.rate, self.settings = module("smolvlm"), fps, settings
        sampling = settings.get("video_sampling", {})
        self.num_frames, self.fps = sampling.get("max_frames"), sampling.get("fps")

    def __call__(self, videos, do_sample_frames=False, **_):
        (video,) = videos[0]
        known = VideoMetadata(len(video), self.rate, duration=len(video) / self.rate)
        known.frames_indices = range(len(video))
        if do_sample_frames:
            known.frames_indices = self.module.SmolVLMVideoProcessor.sample_frames(self, known)
        first = self.module.get_resize_output_image_size(torch.tensor(video[0].transpose(2, 0, 1)), 90)
        drawn = [Pictures.fromarray(video[n]) for n in known.frames_indices]
        for height, width in (first, (30, 30)):
            drawn = [picture.resize((width, height), Pictures.Resampling.LANCZOS) for picture in drawn]
        self.drawn = np.stack(drawn)
        return {"pixel_values": self.drawn[None], "video_metadata": [known]}


@pytest.mark.parametrize(
    "chosen", [{}, {"video_sampling": {"fps": 2, "max_frames": 4, "video_size": {"longest_edge": 1}}}]
)
def test_smolvlm(chosen, tmp_path):
    """Ids with every frame's time, of long clips and short ones, and the bytes of the frames that are shown."""
    path = directory(tmp_path, "smolvlm", "hub")
    images = json.loads((path / "preprocessor_config.json").read_text())
    write(path, "preprocessor_config.json", images | chosen)
    ours, theirs = processor.load(path), reference(path, "smolvlm")
    theirs.chat_template = None  # what it takes for videos is its own
    rng = random.Random(4)
    for frames, fps in [(4, 2.0), (9, 0.11), (21, 1.5), (30, 0.01)] if chosen else [(4, 2.0), (9, 3.5)]:
        video = clip(rng, frames, 40, 90 + frames)
        theirs.video_processor = Films(chosen, fps)
        content = [{"type": "video", "video": video}, {"type": "text", "text": "what?"}]
        want = theirs.apply_chat_template([{"role": "user", "content": content}], **ASKED)
        batch = ours.batch([Document("d", (Video(*video.shape[:3], fps, video), Text("what?")))])
        ids = np.asarray(want["input_ids"]).reshape(-1)
        got = batch.tokens[0, : len(ids)]
        assert got.tolist() == ids.tolist(), (theirs.tokenizer.decode(ids), ours.chat.decode(got.tolist()))
        drawn = theirs.video_processor.drawn
        assert batch.grid[0, 0].tolist() == [len(drawn), 2, 2]
        cut = drawn[:, :28, :28].reshape(-1, 2, 14, 2, 14, 3).swapaxes(2, 3).reshape(-1, 14 * 14 * 3)
        np.testing.assert_array_equal(batch.patches[0, : len(cut)], cut)


@pytest.mark.parametrize(
    "chosen", [{}, {"fps": 2.0}, {"num_frames": 3}, {"num_frames": 4, "initial_shift": False}, {"initial_shift": 1.5}]
)
def test_internvl(chosen, tmp_path):
    """Every frame is a picture of its own, with its number before it."""
    path = directory(tmp_path, "internvl", "hub")
    size = {"size": {"height": 56, "width": 56}}
    sampled = chosen | ({} if "num_frames" in chosen or not chosen else {"fps": 2.0})
    settings = {"video_processor_type": "InternVLVideoProcessor", "do_sample_frames": bool(chosen)}
    write(path, "video_preprocessor_config.json", settings | size | sampled)
    ours, theirs = processor.load(path), reference(path, "internvl")
    cls = module("internvl").InternVLVideoProcessor
    rng = random.Random(4)
    for frames, fps in [(4, 2.0), (9, 3.5), (23, 7.3)]:
        video = clip(rng, frames, 40, 90)
        metadata = VideoMetadata(total_num_frames=frames, fps=fps)
        indices = range(frames)
        if chosen:
            own = types.SimpleNamespace(num_frames=None, initial_shift=sampled.get("initial_shift", True))
            own.num_frames = sampled.get("num_frames")
            indices = cls.sample_frames(own, metadata, fps=sampled.get("fps")).tolist()
        drawn = [Pictures.fromarray(video[i]).resize((56, 56), Pictures.Resampling.BICUBIC) for i in indices]
        made = {"pixel_values_videos": torch.zeros((1, len(drawn), 3, 56, 56))}
        theirs.video_processor = lambda _, made=made, **__: made
        content = [{"type": "video", "video": video}, {"type": "text", "text": "what?"}]
        want = theirs.apply_chat_template([{"role": "user", "content": content}], **ASKED)
        document = Document("d", (Video(*video.shape[:3], fps, video), Text("what?")))
        batch, (x, _) = ours.batch([document]), ours.example(document)
        ids = np.asarray(want["input_ids"]).reshape(-1)
        np.testing.assert_array_equal(batch.tokens[0, : len(ids)], ids)
        assert x.grid.tolist() == [[1, 4, 4]] * len(drawn)
        np.testing.assert_array_equal(x.slot[x.slot >= 0], np.arange(4 * len(drawn)))
        cut = np.stack([np.asarray(view).reshape(4, 14, 4, 14, 3).swapaxes(1, 2) for view in drawn])
        np.testing.assert_array_equal(batch.patches[0, : len(drawn) * 16], cut.reshape(-1, 14 * 14 * 3)[x.patch_raster])


def mixed(batch, features):
    """The media tokens that stand in a batch's first row, in order."""
    places = np.flatnonzero(batch.slot[0] >= 0)
    slots = np.concatenate([batch.slot[0, places, None], batch.mix_slot[0, places]], axis=1)
    return (features[slots] * (batch.mix_share[0, places] * (slots >= 0))[..., None]).sum(1)


def test_a_tiled_picture_of_too_many_tokens_is_shrunk(tmp_path):
    """LLaVA-OneVision's anyres_max_2: what stands in the places is what its model puts there."""
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    ours = processor.load(directory(tmp_path, "llava_onevision", "five"))
    model = LlavaOnevisionModel.__new__(LlavaOnevisionModel)
    torch.nn.Module.__init__(model)
    _, _, _, _, _, _, settings, _, vision = DIRECTORIES["llava_onevision"]
    points = settings["image_grid_pinpoints"]
    model.config = types.SimpleNamespace(vision_config=types.SimpleNamespace(**vision), image_grid_pinpoints=points)
    rng = random.Random(0)
    ratios = []
    for height, width in [(40, 300), (200, 170), (180, 180), (300, 90), (50, 50), (61, 130)]:
        pixels = clip(rng, 1, height, width)[0]
        batch = ours.batch([Document("d", (Image(height, width, pixels), Text("x")))])
        n = int(batch.grid[0].prod(-1).sum())
        features = np.random.default_rng(1).normal(size=(n, 5)).astype(np.float32)
        newline = torch.full((5,), 7.0)
        packed, _ = model.pack_image_features(
            [torch.tensor(features.reshape(-1, 16, 5))], torch.tensor([[height, width]]), newline, "anyres_max_2"
        )
        expected = packed[0].numpy()
        places = np.flatnonzero(batch.tokens[0] == ours.vocab.image)
        got = np.full((len(places), 5), 7.0, np.float32)
        got[batch.slot[0, places] >= 0] = mixed(batch, features)
        np.testing.assert_allclose(got, expected, atol=1e-5)
        ratios.append(bool((batch.mix_slot[0] >= 0).any()))
    assert set(ratios) == {True, False}
