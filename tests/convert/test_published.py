"""config.json of published directories: the sizes they give, and what is refused in them."""

import dataclasses
import json
import math

import pytest
from hub_configs import PUBLISHED

from mmjax.convert import rules
from mmjax.convert.huggingface import Origin
from mmjax.core import config, tree
from mmjax.core.errors import InputError
from mmjax.models import vlm
from mmjax.nn.rope_scaling import Dynamic, LongRope, Yarn
from mmjax.train.prepare import refuse_model, refuse_rows

# CLIP's last block and the norm after it; SigLIP's; SigLIP's pooling head; the norm alone.
UNUSED = {"llava": 12_598_272, "llava_next": 12_598_272, "llava_onevision": 2304, "deepseek_vl": 12_595_200}
UNUSED |= {"idefics": 2560}
# The config that is the same model.
SAME = {
    "Salesforce/blip2-opt-2.7b": "blip2_opt",
    "Salesforce/blip2-flan-t5-xl": "blip2_flan_t5",
    "Salesforce/instructblip-vicuna-7b": "instructblip",
    "google/paligemma-3b-pt-224": "paligemma",
    "google/gemma-3-4b-it": "gemma3",
    "deepseek-community/deepseek-vl-1.3b-chat": "deepseek_vl",
    "llava-hf/llava-1.5-7b-hf": "llava_7b",
    "llava-hf/llava-v1.6-vicuna-7b-hf": "llava_next",
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": "llava_onevision",
    "HuggingFaceM4/idefics-9b": "idefics",
    "meta-llama/Llama-3.2-11B-Vision": "llama3_2_vision",
    "Qwen/Qwen2-VL-7B-Instruct": "qwen2_vl",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5_vl_7b",
    "Qwen/Qwen3-VL-8B-Instruct": "qwen3_vl",
    "HuggingFaceM4/idefics2-8b": "idefics2",
    "HuggingFaceM4/Idefics3-8B-Llama3": "idefics3",
    "HuggingFaceTB/SmolVLM-256M-Instruct": "smolvlm",
    "OpenGVLab/InternVL3-8B-hf": "internvl",
    "mistral-community/pixtral-12b": "pixtral",
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": "mistral3",
    "microsoft/kosmos-2-patch14-224": "kosmos2",
}
LLAMA, _ = PUBLISHED["HuggingFaceTB/SmolLM2-135M"]
QWEN2, _ = PUBLISHED["Qwen/Qwen2-0.5B"]
BLIP2, _ = PUBLISHED["Salesforce/blip2-opt-2.7b"]
LLAVA, _ = PUBLISHED["llava-hf/llava-1.5-7b-hf"]
NEXT, _ = PUBLISHED["llava-hf/llava-v1.6-vicuna-7b-hf"]
PALIGEMMA, _ = PUBLISHED["google/paligemma-3b-pt-224"]
GEMMA3, _ = PUBLISHED["google/gemma-3-4b-it"]
ONEVISION, _ = PUBLISHED["llava-hf/llava-onevision-qwen2-7b-ov-hf"]
MLLAMA, _ = PUBLISHED["meta-llama/Llama-3.2-11B-Vision"]


def found(given: dict):
    return Origin.of(given).found


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name):
    given, count = PUBLISHED[name]
    of = found(given)
    spec, unused = of.of.spec(of.cfg), UNUSED.get(given["model_type"], 0) if of.rest else 0
    assert sum(math.prod(p.shape) for p in tree.flatten(spec).values()) + unused == count
    rules.plan(spec, of.rules)


@pytest.mark.parametrize("name", SAME)
def test_the_config_of_the_same_name_is_the_published_model(name):
    cfg = config.load(SAME[name])

    def plain(blocks):
        return dataclasses.replace(blocks, remat="none")

    stacks = {name: plain(stack) for name, stack in cfg.model.vision.stacks.items()}
    vision = dataclasses.replace(cfg.model.vision, **stacks)
    language = dataclasses.replace(cfg.model.decoder, blocks=plain(cfg.model.decoder.blocks))
    if language.answers:
        language = dataclasses.replace(language, answer=plain(language.answer))
    model = dataclasses.replace(cfg.model, vision=vision, decoder=language)
    assert found(PUBLISHED[name][0]).cfg == model
    refuse_model(cfg)
    refuse_rows(cfg, cfg.mesh.data * cfg.mesh.fsdp)


def rope(**scaling):
    return found(LLAMA | {"rope_scaling": scaling, "max_position_embeddings": 64}).cfg.blocks.rope.scaling


def test_scalings_take_what_is_left_out_from_the_positions():
    assert rope(type="yarn", factor=2.0) == Yarn(2.0, 64)
    assert rope(rope_type="yarn", factor=None, original_max_position_embeddings=16) == Yarn(4.0, 16)
    assert rope(rope_type="dynamic", factor=2.0) == Dynamic(2.0, 64)
    given = {"short_factor": [1.0] * 32, "long_factor": [2] * 32, "original_max_position_embeddings": 16}
    assert rope(rope_type="longrope", **given) == LongRope((1.0,) * 32, (2.0,) * 32, 16, 4.0)


def test_left_out_parts_are_those_of_transformers():
    cfg = found({"model_type": "llava"}).cfg
    assert (cfg.vision.blocks.layers, cfg.vision.table.rows, cfg.decoder.blocks.hidden) == (23, 24, 11008)
    assert found({"model_type": "llava_onevision"}).cfg.vision.blocks.layers == 26
    cfg = found({"model_type": "mistral3"}).cfg
    assert (cfg.vision.embed.patch, cfg.decoder.blocks.hidden, cfg.decoder.tied, cfg.placeholder) == (
        14,
        32768,
        True,
        10,
    )
    assert found({"model_type": "internvl"}).cfg.placeholder == 151_667
    cfg = found({"model_type": "paligemma"}).cfg
    assert (cfg.vision.table.rows, cfg.vision.blocks.hidden, cfg.decoder.vocab, cfg.placeholder) == (
        16,
        4096,
        257152,
        256000,
    )
    cfg = found(PUBLISHED["google/paligemma2-3b-pt-224"][0]).cfg.decoder
    assert (cfg.window, cfg.window_ahead, cfg.blocks.windowed[:2], cfg.softcap) == (4096, False, (0, 2), 30.0)
    text = found({"model_type": "qwen2_5_vl"}).cfg.decoder
    assert (text.vocab, text.blocks.layers, text.blocks.epsilon) == (152064, 80, 1e-5)
    assert found(LLAVA | {"vision_feature_layer": 3}).cfg.vision.blocks.layers == 3
    assert found(LLAVA | {"vision_feature_layer": [-2]}).cfg.vision.blocks.layers == 23
    assert found({"model_type": "mistral", "num_key_value_heads": None, "head_dim": None}).cfg.blocks.kv_heads == 32
    window = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 20}
    assert found(QWEN2 | window).cfg.blocks.windowed == (20, 21, 22, 23)


REFUSED = [
    (LLAMA | {"hidden_act": "mish"}, "'hidden_act' is 'mish'"),
    (LLAMA | {"quantization_config": {"bits": 4}}, "'quantization_config'"),
    (LLAMA | {"rope_scaling": {"type": "su"}}, "rope_type is 'su'"),
    (LLAMA | {"rope_scaling": {"type": "linear"}}, "no 'factor'"),
    (LLAMA | {"rope_scaling": {"type": "linear", "factor": "2"}}, "'factor' is '2'"),
    (LLAMA | {"rope_theta": -1}, "'rope_theta' is -1"),
    (LLAMA | {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is '0.5'"),
    (LLAMA | {"num_key_value_heads": 2}, "9 heads and 2 of keys"),
    (LLAMA | {"attention_bias": 1}, "'attention_bias' is 1"),
    ({"model_type": "opt", "do_layer_norm_before": False}, "'do_layer_norm_before' is 'False'"),
    ({"model_type": "opt", "word_embed_proj_dim": 512}, "'word_embed_proj_dim' is '512'"),
    (BLIP2 | {"text_config": {"model_type": "gpt2"}}, "model_type is 'gpt2'"),
    (BLIP2 | {"image_token_index": -1}, "'image_token_index' is '-1'"),
    (BLIP2 | {"qformer_config": {"position_embedding_type": "relative"}}, "'position_embedding_type'"),
    ({"model_type": "t5", "feed_forward_proj": "gelu"}, "'feed_forward_proj' is 'gelu'"),
    ({"model_type": "t5", "relative_attention_num_buckets": 7}, "give an even number"),
    (QWEN2 | {"layer_types": ["full_attention"]}, "one for each of 24 layers"),
    (QWEN2 | {"layer_types": ["linear_attention"] * 24}, "'layer_types' is 'linear_attention'"),
    (QWEN2 | {"layer_types": ["sliding_attention"] * 24}, "'sliding_window'"),
    ({"model_type": "gemma", "use_bidirectional_attention": True}, "'use_bidirectional_attention'"),
    ({"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1.0}}, "Gemma 3 has them for"),
    (PALIGEMMA | {"projection_dim": 2304}, "'projection_dim' is 2304"),
    (PALIGEMMA | {"text_config": {"model_type": "llama"}}, "'llama'; paligemma has gemma or gemma2"),
    (
        PALIGEMMA | {"text_config": PALIGEMMA["text_config"] | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}},
        "(Dyn",
    ),
    (PALIGEMMA | {"vision_config": {"model_type": "clip_vision_model"}}, "'model_type' is 'clip_vision_model'"),
    (GEMMA3 | {"mm_tokens_per_image": 200}, "'mm_tokens_per_image' is 200"),
    (GEMMA3 | {"mm_tokens_per_image": 81}, "'mm_tokens_per_image' is 81"),
    (GEMMA3 | {"text_config": {"final_logit_softcapping": 30.0}}, "'final_logit_softcapping' is '30.0'"),
    (GEMMA3 | {"text_config": {"attn_logit_softcapping": 50.0}}, "'attn_logit_softcapping' is '50.0'"),
    (GEMMA3 | {"text_config": {"use_bidirectional_attention": True}}, "'use_bidirectional_attention' is 'True'"),
    ({"model_type": "deepseek_vl_hybrid"}, "whose second encoder, SAM's"),
    (LLAVA | {"text_config": {"model_type": "mixtral"}}, "model_type is 'mixtral'"),
    (LLAVA | {"text_config": "llama"}, "'text_config' is 'llama'"),
    (LLAVA | {"vision_config": {"model_type": "siglip2_vision_model"}}, "tower's model_type is 'siglip2_vision_model'"),
    (NEXT | {"vision_config": {"model_type": "pixtral"}}, "tower's model_type is 'pixtral'"),
    (LLAVA | {"vision_config": {"model_type": "pixtral"}, "vision_feature_layer": -1}, "'default'; mmjax"),
    ({"model_type": "internvl", "downsample_ratio": 0.4}, "'downsample_ratio' is 0.4"),
    ({"model_type": "internvl", "vision_feature_select_strategy": "full"}, "'full'; mmjax"),
    ({"model_type": "internvl", "vision_config": {"norm_type": "rms_norm", "use_mean_pooling": False}}, "RMSNorm"),
    (MLLAMA | {"quantization_config": {"bits": 4}}, "'quantization_config'"),
    (MLLAMA | {"text_config": {"tie_word_embeddings": True}}, "'tie_word_embeddings' is 'True'"),
    (MLLAMA | {"text_config": {"cross_attention_layers": [3, 40]}}, "'cross_attention_layers' is [3, 40]"),
    (MLLAMA | {"text_config": {"cross_attention_layers": []}}, "0 layers of cross-attention in 40"),
    (MLLAMA | {"text_config": {"head_dim": 64}}, "'head_dim' is '64'"),
    (MLLAMA | {"vision_config": {"intermediate_layers_indices": [7, 3]}}, "'intermediate_layers_indices' is [7, 3]"),
    (MLLAMA | {"vision_config": {"supported_aspect_ratios": [[1, 1], [2, 1]]}}, "'supported_aspect_ratios' are"),
    (MLLAMA | {"vision_config": {"vision_output_dim": 1280}}, "'vision_output_dim' is '1280'"),
    ({"model_type": "mistral3", "vision_feature_layer": [-1, -2]}, "'vision_feature_layer' is"),
    (LLAVA | {"vision_feature_layer": [-2, -5]}, "'vision_feature_layer' is"),
    (LLAVA | {"vision_feature_layer": -25}, "'vision_feature_layer' is -25"),
    (LLAVA | {"vision_feature_select_strategy": "full"}, "'vision_feature_select_strategy' is 'full'"),
    (ONEVISION | {"vision_feature_select_strategy": "default"}, "'vision_feature_select_strategy' is 'default'"),
    (LLAVA | {"vision_config": {"layer_norm_eps": "1e-5"}}, "'layer_norm_eps' is '1e-5'"),
    (LLAVA | {"vision_config": {"layer_norm_eps": -5}}, "'layer_norm_eps' is -5"),
    (
        ONEVISION | {"vision_config": {"model_type": "siglip_vision_model", "vision_use_head": "no"}},
        "'vision_use_head'",
    ),
    ({"model_type": "qwen2_5_vl", "vision_config": {"fullatt_block_indexes": [40]}}, "'fullatt_block_indexes' is"),
    ({"model_type": "qwen3_vl", "vision_config": {"deepstack_visual_indexes": [-1, 0]}}, "'deepstack_visual_indexes'"),
    (PUBLISHED["Qwen/Qwen2-VL-2B-Instruct"][0] | {"rope_scaling": {"mrope_section": [1, 2, 3]}}, "'mrope_section'"),
]


@pytest.mark.parametrize(("given", "says"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_not_computed_is_refused_by_name(given, says):
    with pytest.raises(InputError) as error:
        found(json.loads(json.dumps(given)))
    assert says in str(error.value)
    assert len(str(error.value)) < 400


def test_a_family_of_another_layout_is_refused_by_name():
    with pytest.raises(InputError, match=r"model_type 'internvl_chat': did you mean internvl\?"):
        found({"model_type": "internvl_chat", "vision_config": {}, "llm_config": {}})


def test_onevision_has_two_placeholders_and_a_newline():
    cfg = found(ONEVISION).cfg
    assert (cfg.placeholder, cfg.newline) == ((151646, 151647), True)
    assert vlm.spec(cfg)["newline"].shape == (3584,)
