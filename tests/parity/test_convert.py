"""`python -m mmjax.convert` on directories that transformers wrote: the same bytes, which it loads, with its logits."""

import json
import os

import pytest

torch = pytest.importorskip("torch", reason="needs the `parity` extra")
transformers = pytest.importorskip("transformers", reason="needs the `parity` extra")

from parity.harness import twin

from mmjax.convert.__main__ import main

BLOCKS = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 2}
TEXT = BLOCKS | {"num_key_value_heads": 1, "vocab_size": 50}
CLIP = BLOCKS | {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8}
QWEN = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN |= {"embed_dim": 16, "hidden_size": 16}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
MODELS = {
    # The last block of its tower is no parameter of ours.
    "LlavaForConditionalGeneration": {"vision_config": CLIP, "text_config": TEXT | {"model_type": "llama"}},
    "LlamaForCausalLM": TEXT | {"tie_word_embeddings": True},
    "Qwen2VLForConditionalGeneration": {"vision_config": QWEN, "text_config": TEXT | {"rope_parameters": ROPE}},
    "CLIPModel": {"vision_config": CLIP, "text_config": TEXT, "projection_dim": 12},
}


def contents(path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in sorted(os.listdir(path))}


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_what_comes_back(tmp_path, name):
    cls = getattr(transformers, name)
    model = twin(cls, cls.config_class(**MODELS[name]))
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    (tmp_path / "in/tokenizer_config.json").write_text("{}")
    assert main([str(tmp_path / "in"), str(tmp_path / "step"), "--mesh.fsdp", "2"]) == 0
    assert main([str(tmp_path / "step"), str(tmp_path / "out")]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "in")
    again = cls.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    inputs = {"input_ids": torch.arange(1, 9)[None]}
    if name == "CLIPModel":
        inputs["pixel_values"] = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    with torch.no_grad():
        (a, b) = (next(iter(m(**inputs).values())) for m in (model, again))
    assert torch.equal(a, b)

    # In another format: what torch makes of it, to the bit, in every tensor.
    assert main([str(tmp_path / "step"), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    assert "bfloat16" in json.loads((tmp_path / "half/config.json").read_text()).values()
    half = cls.from_pretrained(tmp_path / "half", dtype="auto").state_dict()
    for key, x in model.to(torch.bfloat16).state_dict().items():
        assert half[key].dtype == x.dtype, key
        assert torch.equal(half[key], x), key
