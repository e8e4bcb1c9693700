"""What config.json says in published directories: where it is not what transformers takes anyway, as the hub has it."""

LLAMA3_SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_SCALING |= {"original_max_position_embeddings": 8192, "rope_type": "llama3"}
CLIP = {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model"}
CLIP |= {"num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768}
VICUNA = {"max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 32064}
LLAVA = {"model_type": "llava", "image_token_index": 32000, "projector_hidden_act": "gelu", "text_config": VICUNA}
LLAVA |= {"tie_word_embeddings": False, "vision_config": CLIP, "vision_feature_layer": -2}
LLAVA |= {"vision_feature_select_strategy": "default"}
NEXT = LLAVA | {"model_type": "llava_next", "use_image_newline_parameter": True}
MISTRAL = {"intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral", "vocab_size": 32064}
MISTRAL |= {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None}
SIGLIP = {"hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "model_type": "siglip_vision_model"}
SIGLIP |= {"num_attention_heads": 16, "num_hidden_layers": 26, "patch_size": 14, "vision_use_head": False}


def qwen(hidden: int, inner: int, layers: int, heads: int, kv: int, **more) -> dict:
    """A text model of Qwen's."""
    out = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "rms_norm_eps": 1e-6}
    out |= {"num_attention_heads": heads, "num_key_value_heads": kv, "hidden_act": "silu", "use_sliding_window": False}
    return out | {"rope_theta": 1000000.0, "sliding_window": 32768, "max_window_layers": layers} | more


QWEN2_7B = qwen(3584, 18944, 28, 28, 4)
MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
IDS = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652}
SEES2 = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "patch_size": 14}
SEES2 |= {"spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2}
SEES25 = {"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
SEES25 |= {"patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
SEES25 |= {"tokens_per_second": 2, "temporal_patch_size": 2, "in_chans": 3}
SEES3 = {"hidden_act": "gelu_pytorch_tanh", "in_channels": 3, "model_type": "qwen3_vl", "num_heads": 16}
SEES3 |= {"num_position_embeddings": 2304, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2}
SMALL3 = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
LARGE3 = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}


def qwen3_vl(tied: bool, sees: dict, *sizes: int) -> dict:
    scaling = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
    text = qwen(*sizes, head_dim=128, attention_bias=False, vocab_size=151936, rope_theta=5000000, rope_scaling=scaling)
    text |= {"model_type": "qwen3_vl_text", "tie_word_embeddings": tied}
    seen = SEES3 | sees | {"out_hidden_size": sizes[0]}
    return IDS | {"model_type": "qwen3_vl", "text_config": text, "vision_config": seen, "tie_word_embeddings": tied}


GEMMA3 = {"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912}
GEMMA3 |= {"model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1}
GEMMA3 |= {"query_pre_attn_scalar": 256, "rope_local_base_freq": 10000, "rope_theta": 1000000, "sliding_window": 512}
GEMMA3 |= {"sliding_window_pattern": 6, "vocab_size": 262144, "attn_logit_softcapping": None, "rope_scaling": None}
OPT_27B = {"model_type": "opt", "ffn_dim": 10240, "hidden_size": 2560, "num_attention_heads": 32}
OPT_27B |= {"num_hidden_layers": 32, "word_embed_proj_dim": 2560, "_remove_final_layer_norm": False}
IDEFICS = {"model_type": "idefics", "additional_vocab_size": 2, "alpha_type": "float", "cross_layer_interval": 4}
IDEFICS |= {"qk_layer_norms": True, "use_resampler": True, "tie_word_embeddings": False, "rms_norm_eps": 1e-6}
IDEFICS |= {"perceiver_config": {"qk_layer_norms_perceiver": True}, "vision_config": {"embed_dim": 1280}}
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27}
IDEFICS2 = {"model_type": "idefics2", "image_token_id": 32001, "perceiver_config": {"rms_norm_eps": 1e-5}}
IDEFICS2 |= {"text_config": MISTRAL | {"vocab_size": 32003, "rope_theta": 10000.0, "sliding_window": 4096}}
IDEFICS2 |= {"vision_config": SO400M | {"image_size": 980, "patch_size": 14, "model_type": "idefics2"}}
LLAMA3 = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8}
LLAMA3 |= {"num_attention_heads": 32, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": LLAMA3_SCALING}
IDEFICS3 = {"model_type": "idefics3", "image_token_id": 128257, "scale_factor": 2, "tie_word_embeddings": False}
IDEFICS3 |= {"vision_config": SO400M | {"image_size": 364, "patch_size": 14, "model_type": "idefics3"}}
IDEFICS3 |= {"text_config": LLAMA3 | {"vocab_size": 128259, "max_position_embeddings": 131072}}


def smolvlm(kind: str, layers: int, heads: int, kv: int, sizes: tuple[int, int], vocab: int = 49280, **more) -> dict:
    """SmolLM2, and SigLIP of 512 pixels where nothing else is said."""
    text = {"model_type": "llama", "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocab}
    text |= {"num_key_value_heads": kv, "hidden_size": sizes[0], "intermediate_size": sizes[1], "head_dim": 64}
    text |= {"rms_norm_eps": 1e-5, "rope_theta": 100000, "is_llama_config": True, "qk_layer_norms": False}
    seen = {"hidden_size": 768, "num_attention_heads": 12, "image_size": 512, "patch_size": 16}
    out = {"model_type": kind, "text_config": text, "vision_config": seen, "image_token_id": 49190, "scale_factor": 4}
    return out | {"tie_word_embeddings": False} | more


INTERNVIT = {"attention_bias": True, "hidden_size": 1024, "image_size": [448, 448], "intermediate_size": 4096}
INTERNVIT |= {"layer_scale_init_value": 0.1, "model_type": "internvl_vision", "norm_type": "layer_norm"}
INTERNVIT |= {"num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": [14, 14], "use_qk_norm": False}
DYNAMIC = {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}
NEMO = {"head_dim": 128, "hidden_size": 5120, "model_type": "mistral", "num_hidden_layers": 40, "rms_norm_eps": 1e-5}
NEMO |= {"num_key_value_heads": 8, "rope_theta": 1000000000.0, "sliding_window": None, "vocab_size": 131072}
BLIP2 = {"model_type": "blip-2", "image_token_index": 50265, "num_query_tokens": 32, "vision_config": {}}
BLIP2 |= {"qformer_config": {"model_type": "blip_2_qformer"}, "text_config": OPT_27B | {"vocab_size": 50304}}
T5_XL = {"model_type": "t5", "d_ff": 5120, "d_kv": 64, "d_model": 2048, "feed_forward_proj": "gated-gelu"}
T5_XL |= {"num_heads": 32, "num_layers": 24, "num_decoder_layers": 24, "tie_word_embeddings": False}
T5_XL |= {"decoder_start_token_id": 0, "vocab_size": 32128, "relative_attention_max_distance": 128}
BLIP2_T5 = BLIP2 | {"image_token_index": 32100, "text_config": T5_XL}
INSTRUCT = BLIP2 | {"model_type": "instructblip", "image_token_index": 32001, "qformer_config": {"vocab_size": 30523}}
INSTRUCT |= {"text_config": {"model_type": "llama", "rms_norm_eps": 1e-6, "vocab_size": 32064}}

SO400M = SIGLIP | {"num_hidden_layers": 27}
PALIGEMMA_SEES = {k: v for k, v in SO400M.items() if k != "image_size"} | {"projection_dim": 2048}
PALIGEMMA = {"model_type": "paligemma", "image_token_index": 257152, "vision_config": PALIGEMMA_SEES}
PALIGEMMA_TEXT = {"hidden_size": 2048, "intermediate_size": 16384, "model_type": "gemma", "num_attention_heads": 8}
PALIGEMMA_TEXT |= {"num_hidden_layers": 18, "num_key_value_heads": 1, "num_image_tokens": 256, "vocab_size": 257216}
PALIGEMMA2_TEXT = {"hidden_size": 2304, "intermediate_size": 9216, "model_type": "gemma2", "vocab_size": 257216}
PALIGEMMA2_TEXT |= {"num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4}
GEMMA3_TEXT = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
GEMMA3_TEXT |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
DEEPSEEK_TEXT = {"hidden_size": 2048, "intermediate_size": 5632, "model_type": "llama", "num_attention_heads": 16}
DEEPSEEK_TEXT |= {"max_position_embeddings": 16384, "num_hidden_layers": 24, "vocab_size": 102400}
DEEPSEEK_SEES = {"hidden_size": 1024, "image_size": 384, "intermediate_size": 4096, "num_attention_heads": 16}
DEEPSEEK_SEES |= {"model_type": "siglip_vision_model", "num_hidden_layers": 24, "patch_size": 16}

# Name on the hub → (config.json, parameters that its files hold).
PUBLISHED: dict[str, tuple[dict, int]] = {
    "meta-llama/Llama-2-7b-hf": ({"model_type": "llama", "rms_norm_eps": 1e-5, "pretraining_tp": 1}, 6_738_415_616),
    "meta-llama/Llama-3.1-8B": (
        {"model_type": "llama", "intermediate_size": 14336, "num_key_value_heads": 8, "rope_theta": 500000.0}
        | {"rms_norm_eps": 1e-5, "vocab_size": 128256, "rope_scaling": LLAMA3_SCALING, "mlp_bias": False},
        8_030_261_248,
    ),
    "meta-llama/Llama-3.2-1B": (
        {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
        | {"num_key_value_heads": 8, "head_dim": 64, "rope_theta": 500000.0, "rms_norm_eps": 1e-5}
        | {"vocab_size": 128256, "tie_word_embeddings": True, "rope_scaling": LLAMA3_SCALING | {"factor": 32.0}},
        1_235_814_400,
    ),
    "HuggingFaceTB/SmolLM2-135M": (
        {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        | {"num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "rope_theta": 100000}
        | {"tie_word_embeddings": True, "vocab_size": 49152, "is_llama_config": True, "rope_interleaved": False},
        134_515_008,
    ),
    "mistralai/Mistral-7B-v0.1": (
        {"model_type": "mistral", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096},
        7_241_732_096,
    ),
    "Qwen/Qwen2-0.5B": (
        qwen(896, 4864, 24, 14, 2, model_type="qwen2", tie_word_embeddings=True),
        494_032_768,
    ),
    "Qwen/Qwen2.5-7B": (QWEN2_7B | {"model_type": "qwen2", "vocab_size": 152064}, 7_615_616_512),
    "Qwen/Qwen3-0.6B": (
        qwen(1024, 3072, 28, 16, 8, model_type="qwen3", head_dim=128, tie_word_embeddings=True, sliding_window=None),
        596_049_920,
    ),
    "facebook/opt-2.7b": (OPT_27B, 2_651_596_800),
    "Salesforce/blip2-opt-2.7b": (BLIP2, 3_744_761_856),
    "Salesforce/blip2-flan-t5-xl": (BLIP2_T5, 3_942_446_592),
    "Salesforce/instructblip-vicuna-7b": (INSTRUCT, 7_913_726_720),
    "google-t5/t5-small": ({"model_type": "t5"}, 60_506_624),
    "google/flan-t5-xl": (T5_XL, 2_849_757_184),
    "google/gemma-2b": (
        {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": None, "hidden_size": 2048}
        | {"intermediate_size": 16384, "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1},
        2_506_172_416,
    ),
    "google/gemma-2-2b": (
        {"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256},
        2_614_341_888,
    ),
    "google/gemma-3-1b-it": (GEMMA3, 999_885_952),
    "google/paligemma-3b-pt-224": (
        PALIGEMMA | {"text_config": PALIGEMMA_TEXT, "hidden_size": 2048, "projection_dim": 2048},
        2_923_466_480,
    ),
    "google/paligemma2-3b-pt-224": (
        PALIGEMMA | {"text_config": PALIGEMMA2_TEXT, "hidden_size": 2304, "projection_dim": 2304},
        3_032_242_416,
    ),
    "google/gemma-3-4b-it": (
        {"model_type": "gemma3", "mm_tokens_per_image": 256, "image_token_index": 262144, "text_config": GEMMA3_TEXT}
        | {"vision_config": SO400M | {"image_size": 896}, "boi_token_index": 255999, "eoi_token_index": 256000},
        4_300_079_472,
    ),
    "deepseek-community/deepseek-vl-1.3b-chat": (
        {"model_type": "deepseek_vl", "image_token_id": 100015, "text_config": DEEPSEEK_TEXT}
        | {"vision_config": DEEPSEEK_SEES, "tie_word_embeddings": False},
        1_975_235_584,
    ),
    "llava-hf/llava-1.5-7b-hf": (LLAVA, 7_063_427_072),
    "llava-hf/llava-v1.6-vicuna-7b-hf": (NEXT, 7_063_431_168),
    "llava-hf/llava-v1.6-mistral-7b-hf": (NEXT | {"text_config": MISTRAL}, 7_566_747_648),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": (
        {"model_type": "llava_onevision", "image_token_index": 151646, "vision_aspect_ratio": "anyres_max_9"}
        | {"text_config": QWEN2_7B | {"model_type": "qwen2", "vocab_size": 152064}, "vision_config": SIGLIP}
        | {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "video_token_index": 151647},
        8_030_348_832,
    ),
    "meta-llama/Llama-3.2-11B-Vision": (
        {"model_type": "mllama", "image_token_index": 128256}
        | {"text_config": {"model_type": "mllama_text_model", "rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING}}
        | {"vision_config": {"model_type": "mllama_vision_model", "image_size": 560, "hidden_act": "gelu"}},
        10_670_220_835,
    ),
    "Qwen/Qwen2-VL-2B-Instruct": (
        qwen(1536, 8960, 28, 12, 2, vocab_size=151936, tie_word_embeddings=True)
        | MROPE
        | IDS
        | {"model_type": "qwen2_vl", "vision_config": SEES2 | {"hidden_size": 1536}},
        2_208_985_600,
    ),
    "Qwen/Qwen2-VL-7B-Instruct": (
        QWEN2_7B
        | MROPE
        | IDS
        | {"model_type": "qwen2_vl", "vocab_size": 152064, "vision_config": SEES2 | {"hidden_size": 3584}},
        8_291_375_616,
    ),
    "Qwen/Qwen2.5-VL-3B-Instruct": (
        qwen(2048, 11008, 36, 16, 2, vocab_size=151936, tie_word_embeddings=True)
        | MROPE
        | IDS
        | {"model_type": "qwen2_5_vl", "vision_config": SEES25 | {"out_hidden_size": 2048}},
        3_754_622_976,
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        QWEN2_7B
        | MROPE
        | IDS
        | {"model_type": "qwen2_5_vl", "vocab_size": 152064, "vision_config": SEES25 | {"out_hidden_size": 3584}},
        8_292_166_656,
    ),
    "Qwen/Qwen3-VL-2B-Instruct": (qwen3_vl(True, SMALL3, 2048, 6144, 28, 16, 8), 2_127_532_032),
    "Qwen/Qwen3-VL-4B-Instruct": (qwen3_vl(True, SMALL3, 2560, 9728, 36, 32, 8), 4_437_815_808),
    "Qwen/Qwen3-VL-8B-Instruct": (qwen3_vl(False, LARGE3, 4096, 12288, 36, 32, 8), 8_767_123_696),
    # The hub says 8.93 billion; the sum is that of the sizes in its config.json.
    "HuggingFaceM4/idefics-9b": (IDEFICS, 8_929_679_632),
    "HuggingFaceM4/idefics2-8b": (IDEFICS2, 8_402_768_112),
    "HuggingFaceM4/Idefics3-8B-Llama3": (IDEFICS3, 8_462_086_384),
    "HuggingFaceTB/SmolVLM-256M-Instruct": (smolvlm("idefics3", 30, 9, 3, (576, 1536)), 256_484_928),
    "HuggingFaceTB/SmolVLM-500M-Instruct": (smolvlm("idefics3", 32, 15, 5, (960, 2560)), 507_482_304),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": (
        smolvlm(
            "smolvlm",
            24,
            32,
            32,
            (2048, 8192),
            scale_factor=3,
            vision_config=SO400M | {"image_size": 384, "patch_size": 14},
        ),
        2_246_784_880,
    ),
    "OpenGVLab/InternVL3-8B-hf": (
        {"model_type": "internvl", "image_token_id": 151667, "vision_config": INTERNVIT, "tie_word_embeddings": False}
        | {"text_config": QWEN2_7B | {"model_type": "qwen2", "rope_scaling": DYNAMIC, "vocab_size": 151674}},
        7_944_373_760,
    ),
    "mistral-community/pixtral-12b": (
        {"model_type": "llava", "image_token_index": 10, "image_seq_length": 1, "vision_feature_layer": -1}
        | {"text_config": NEMO | {"intermediate_size": 14336, "max_position_embeddings": 1024000}}
        | {"vision_config": {"head_dim": 64, "hidden_act": "silu", "model_type": "pixtral", "rope_theta": 10000.0}}
        | {"vision_feature_select_strategy": "full"},
        12_682_739_712,
    ),
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": (
        {"model_type": "mistral3", "image_token_index": 10, "vision_feature_layer": -1, "tie_word_embeddings": False}
        | {"text_config": NEMO | {"intermediate_size": 32768}, "spatial_merge_size": 2}
        | {"vision_config": {"head_dim": 64, "model_type": "pixtral", "patch_size": 14, "image_size": 1540}},
        24_011_361_280,
    ),
    "microsoft/kosmos-2-patch14-224": ({"model_type": "kosmos-2", "latent_query_num": 64}, 1_664_485_376),
}
