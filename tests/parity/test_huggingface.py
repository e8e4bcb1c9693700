"""Directories that transformers wrote: read, written again as the same bytes, and read by transformers again."""

import dataclasses
import importlib
import math
import os

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the `parity` extra")
transformers = pytest.importorskip("transformers")

from parity.harness import randomise
from safetensors.numpy import load_file, save_file

from mmjax.convert import files, rules
from mmjax.convert.huggingface import Origin, load, save
from mmjax.core import spec as specs
from mmjax.core.errors import InputError
from mmjax.core.meshes import MeshConfig, Rules, make_mesh

TOWER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
PICTURE = {"image_size": 16, "patch_size": 8}
VISION = TOWER | PICTURE
TEXT = TOWER | {"vocab_size": 50, "max_position_embeddings": 8, "projection_dim": 12}
DINO = {k: v for k, v in VISION.items() if k != "intermediate_size"} | {"mlp_ratio": 2}
QWEN = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN3 = QWEN | {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 12, "num_position_embeddings": 16}
QWEN3 |= {"deepstack_visual_indexes": [0]}
STAGES = {"num_encoder_blocks": 2, "depths": [1, 2], "hidden_sizes": [8, 16], "num_attention_heads": [1, 2]}
STAGES |= {"sr_ratios": [2, 1], "mlp_ratios": [2, 2], "patch_sizes": [4, 2], "strides": [4, 2]}
QFORMER = TOWER | {"vocab_size": 50, "encoder_hidden_size": 12, "max_position_embeddings": 8}
LANGUAGE = TOWER | {"vocab_size": 50, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KOSMOS2 = {"embed_dim": 16, "layers": 2, "attention_heads": 2, "ffn_dim": 24, "vocab_size": 50}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
MROPE = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]}
IDS = {"image_token_id": 48, "video_token_id": 49}
SEES = {k: v for k, v in VISION.items() if "layers" not in k}
SEES |= {"model_type": "clip_vision_model", "num_hidden_layers": 4}

# model_type, class, its config.
SYSTEMS = [
    ("vit", "ViTModel", VISION),
    ("vit", "ViTForImageClassification", VISION | {"num_labels": 3}),
    ("deit", "DeiTModel", VISION),
    ("dinov2", "Dinov2Model", DINO),
    ("dinov2_with_registers", "Dinov2WithRegistersModel", DINO),
    ("clip", "CLIPModel", {"text_config": TEXT, "vision_config": VISION, "projection_dim": 12}),
    ("clip_vision_model", "CLIPVisionModel", VISION),
    ("clip_text_model", "CLIPTextModel", TEXT),
    ("siglip", "SiglipModel", {"text_config": TEXT | {"projection_size": 16}, "vision_config": VISION}),
    ("siglip_vision_model", "SiglipVisionModel", VISION),
    ("siglip_text_model", "SiglipTextModel", TEXT),
    ("siglip2", "Siglip2Model", {"text_config": TEXT, "vision_config": TOWER | {"patch_size": 8, "num_patches": 9}}),
    ("siglip2_vision_model", "Siglip2VisionModel", TOWER | {"patch_size": 8, "num_patches": 9}),
    ("pixtral", "PixtralVisionModel", VISION),
    ("qwen2_vl_vision", "Qwen2VisionTransformerPretrainedModel", QWEN | {"embed_dim": 16, "hidden_size": 12}),
    (
        "qwen2_5_vl_vision",
        "Qwen2_5_VisionTransformerPretrainedModel",
        QWEN | {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 12, "fullatt_block_indexes": [1]},
    ),
    ("qwen3_vl_vision", "Qwen3VLVisionModel", QWEN3),
    ("internvl_vision", "InternVLVisionModel", VISION | {"image_size": [16, 16], "patch_size": [8, 8]}),
    ("swin", "SwinModel", {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2]}),
    ("pvt", "PvtModel", STAGES | {"image_size": 16, "sequence_reduction_ratios": [2, 1]}),
    ("pvt_v2", "PvtV2Model", STAGES | {"image_size": 16, "patch_sizes": [7, 3]}),
    ("blip_2_qformer", "Blip2QFormerModel", QFORMER),
    ("instructblip_qformer", "InstructBlipQFormerModel", QFORMER),
    ("llama", "LlamaForCausalLM", LANGUAGE | {"attention_bias": True, "mlp_bias": True}),
    ("mistral", "MistralForCausalLM", LANGUAGE),
    ("qwen2", "Qwen2ForCausalLM", LANGUAGE | {"tie_word_embeddings": True}),
    ("qwen3", "Qwen3ForCausalLM", LANGUAGE | {"head_dim": 4}),
    ("gemma", "GemmaForCausalLM", LANGUAGE | {"head_dim": 8}),
    ("gemma2", "Gemma2ForCausalLM", LANGUAGE | SLIDING | {"head_dim": 8}),
    ("gemma3_text", "Gemma3ForCausalLM", LANGUAGE | SLIDING | {"head_dim": 8, "tie_word_embeddings": False}),
    (
        "llava",
        "LlavaForConditionalGeneration",
        {"vision_config": SEES, "text_config": LANGUAGE | {"model_type": "llama"}, "image_token_index": 48},
    ),
    (
        "llava_next",
        "LlavaNextForConditionalGeneration",
        {"vision_config": SEES, "text_config": LANGUAGE | {"model_type": "qwen2"}, "image_token_index": 48},
    ),
    (
        "llava_onevision",
        "LlavaOnevisionForConditionalGeneration",
        {
            "vision_config": VISION | {"model_type": "siglip_vision_model"},
            "text_config": LANGUAGE | {"model_type": "qwen2", "tie_word_embeddings": True},
            "image_token_index": 48,
            "video_token_index": 49,
        },
    ),
    (
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        IDS
        | {
            "vision_config": QWEN | {"embed_dim": 16, "hidden_size": 16},
            "text_config": LANGUAGE | {"rope_parameters": MROPE},
            "tie_word_embeddings": True,
        },
    ),
    (
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        IDS
        | {
            "vision_config": QWEN3 | {"out_hidden_size": 16, "fullatt_block_indexes": [1]},
            "text_config": LANGUAGE | {"rope_parameters": MROPE},
        },
    ),
    (
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        IDS
        | {
            "vision_config": QWEN3 | {"out_hidden_size": 16},
            "text_config": LANGUAGE | {"rope_parameters": MROPE, "head_dim": 8},
        },
    ),
    (
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        {
            "vision_config": VISION | {"model_type": "siglip_vision_model"},
            "text_config": LANGUAGE | SLIDING | {"model_type": "gemma2", "head_dim": 8},
            "projection_dim": 16,
        },
    ),
    (
        "gemma3",
        "Gemma3ForConditionalGeneration",
        {
            "vision_config": VISION | {"model_type": "siglip_vision_model"},
            "text_config": LANGUAGE | SLIDING | {"head_dim": 8},
            "mm_tokens_per_image": 1,
        },
    ),
    (
        "deepseek_vl",
        "DeepseekVLForConditionalGeneration",
        {
            "vision_config": VISION | {"model_type": "siglip_vision_model"},
            "text_config": LANGUAGE | {"model_type": "llama"},
            "tie_word_embeddings": False,
        },
    ),
    (
        "internvl",
        "InternVLForConditionalGeneration",
        {
            "vision_config": VISION | {"model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [8, 8]},
            "text_config": LANGUAGE | {"model_type": "qwen2"},
            "image_token_id": 48,
        },
    ),
    (
        "mistral3",
        "Mistral3ForConditionalGeneration",
        {
            "vision_config": VISION | {"model_type": "pixtral"},
            "text_config": LANGUAGE | {"model_type": "mistral"},
            "image_token_index": 48,
            "tie_word_embeddings": False,
        },
    ),
    (
        "kosmos-2",
        "Kosmos2ForConditionalGeneration",
        {"vision_config": VISION, "text_config": KOSMOS2, "latent_query_num": 3},
    ),
]
HEADS = ("paligemma", "gemma3", "deepseek_vl")  # whose towers have a pooling head that nothing reads
MODULES = {
    "qwen2_vl_vision": "transformers.models.qwen2_vl.configuration_qwen2_vl",
    "qwen2_5_vl_vision": "transformers.models.qwen2_5_vl.configuration_qwen2_5_vl",
    "qwen3_vl_vision": "transformers.models.qwen3_vl.configuration_qwen3_vl",
    "internvl_vision": "transformers.models.internvl.configuration_internvl",
    "blip_2_qformer": "transformers.models.blip_2.configuration_blip_2",
    "instructblip_qformer": "transformers.models.instructblip.configuration_instructblip",
}
PLACES = {
    "Qwen2VisionTransformerPretrainedModel": "transformers.models.qwen2_vl.modeling_qwen2_vl",
    "Qwen2_5_VisionTransformerPretrainedModel": "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "Qwen3VLVisionModel": "transformers.models.qwen3_vl.modeling_qwen3_vl",
    "InternVLVisionModel": "transformers.models.internvl.modeling_internvl",
    "PvtV2Model": "transformers.models.pvt_v2.modeling_pvt_v2",
    "Blip2QFormerModel": "transformers.models.blip_2.modeling_blip_2",
    "InstructBlipQFormerModel": "transformers.models.instructblip.modeling_instructblip",
}


def config(kind: str, values: dict):
    if kind not in MODULES:
        return transformers.AutoConfig.for_model(kind, **values)
    of = vars(importlib.import_module(MODULES[kind])).values()
    return next(c for c in of if getattr(c, "model_type", None) == kind)(**values)


def theirs(system):
    kind, name, values = system
    cls = getattr(importlib.import_module(PLACES[name]) if name in PLACES else transformers, name)
    return randomise(cls(config(kind, values)).eval())


def contents(path) -> dict[str, bytes]:
    """Of config.json and the weights: tokenizers and the like are not this module's."""
    names = sorted(set(os.listdir(path)) - {"generation_config.json"})
    return {name: (path / name).read_bytes() for name in names}


def mixed(model):
    """bfloat16, and whatever has "norm" in its name in float32, as large models are trained."""
    model = model.to(torch.bfloat16)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data = p.data.float()
    return model


FORMATS = {
    "float32": lambda m: m,
    "float16": lambda m: m.half(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "mixed": mixed,
}


@pytest.fixture(params=SYSTEMS, ids=lambda s: s[1])
def system(request):
    return request.param


@pytest.mark.parametrize("dtype", FORMATS)
def test_unchanged_is_written_as_the_same_bytes(system, dtype, tmp_path):
    model = FORMATS[dtype](theirs(system))
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    # In several files, and in one.
    model.save_pretrained(tmp_path / "in", max_shard_size=total // 3 if dtype in ("float32", "mixed") else "1GB")
    assert (len(contents(tmp_path / "in")) > 3) == (dtype in ("float32", "mixed"))
    ours = load(tmp_path / "in")
    save(tmp_path / "out", ours)
    assert contents(tmp_path / "out") == contents(tmp_path / "in")
    found = {x.dtype.name for x in jax.tree.leaves(ours.params)}
    assert found == ({"bfloat16", "float32"} if dtype == "mixed" else {dtype})


def test_onto_a_mesh_and_changed_and_back_into_transformers(system, tmp_path):
    model = theirs(system)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(tmp_path / "in", max_shard_size=total // 3)
    whole = load(tmp_path / "in")
    for explicit in (False, True):
        mesh = make_mesh(MeshConfig(2, 2, 2, explicit=explicit))
        ours = load(tmp_path / "in", mesh=mesh)
        wanted = specs.shardings(ours.of.spec(ours.cfg), mesh, Rules())
        assert jax.tree.map(lambda x: x.sharding, ours.params) == wanted
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), ours.params, whole.params))
    params = jax.tree.map(lambda x: np.asarray(x) * np.float32(0.5), ours.params)
    halved = dataclasses.replace(ours, params=params)
    save(tmp_path / "out", halved)
    again, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    before = dict(model.named_parameters())
    for name, p in again.named_parameters():
        # What our model does not compute with is as it was.
        unused = any(name.endswith(key) for key in ours.origin.kept)
        torch.testing.assert_close(p, before[name] if unused else 0.5 * before[name], rtol=0, atol=0)
    assert bool(ours.origin.kept) == (system[0].startswith("llava") or system[0] in HEADS)
    assert load(tmp_path / "out").cfg == ours.cfg


def test_saved_from_nothing_but_a_config(system, tmp_path):
    """Origin.of must come to the same table as the files do, for the class that the family takes without files."""
    theirs(system).save_pretrained(tmp_path / "in")
    ours = load(tmp_path / "in")
    origin = Origin.of(dict(ours.origin.raw))
    if (origin.found.of, origin.found.cfg) != (ours.of, ours.cfg):
        with pytest.raises(InputError, match="is not that of its origin"):
            save(tmp_path / "out", dataclasses.replace(ours, origin=origin))
        return
    save(tmp_path / "out", dataclasses.replace(ours, origin=origin))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), load(tmp_path / "out").params, ours.params))


def test_wrong_tensors_are_refused(system, tmp_path):
    theirs(system).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    given = load_file(path)
    ours = load(tmp_path)
    made = rules.plan(ours.of.spec(ours.cfg), ours.origin.found.rules)

    def refused(change: dict, says: str, without: str = "") -> None:
        save_file({k: x for k, x in (given | change).items() if k != without}, path, metadata={"format": "pt"})
        with pytest.raises(InputError, match=says):
            load(tmp_path)

    # A few of each: which tensors are there may tell a family what it is, so a missing one may be said otherwise.
    keys = [k for k in given if k in made.tensors]
    for key in sorted(keys, key=len)[:: max(1, len(keys) // 2)]:
        x = given[key]
        refused({}, "missing|surplus|no ", without=key)
        refused({key: np.zeros([*x.shape, 2], x.dtype)}, "another shape|shape")
        if math.prod(x.shape) > 1:
            refused({key: np.zeros([n + 1 for n in x.shape], x.dtype)}, "another shape|shape")
        refused({key: x.astype(np.int8)}, "holds int8 where|several number formats")
    refused({"surplus.weight": np.zeros(3, np.float32)}, r"1 surplus \(surplus.weight\)")
    save_file(given, path, metadata={"format": "pt"})
    load(tmp_path)
    assert files.Directory(tmp_path).shapes().keys() == given.keys()


@pytest.mark.parametrize("change", ["without a head", "without a table", "both, equal", "both, unequal"])
def test_a_tied_head_is_what_transformers_takes_it_for(change, tmp_path):
    theirs(("llama", "LlamaForCausalLM", LANGUAGE | {"tie_word_embeddings": True})).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    given = load_file(path)
    table = given.pop("model.embed_tokens.weight")
    if change != "without a table":
        given["model.embed_tokens.weight"] = table
    if change != "without a head":
        given["lm_head.weight"] = table + (change == "both, unequal")
    save_file(given, path, metadata={"format": "pt"})
    ours, again = load(tmp_path), transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    np.testing.assert_array_equal(ours.params["embed"], again.model.embed_tokens.weight.detach())
    np.testing.assert_array_equal(ours.params["embed" if ours.cfg.tied else "head"], again.lm_head.weight.detach())
    assert ours.cfg.tied == (again.lm_head.weight is again.model.embed_tokens.weight)
