"""ViT, DeiT, DINOv2, DINOv2 with registers."""

import torch
import transformers as hf
from parity.harness import Compare, system, twin
from parity.modules.towers import Tower, compare

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}


def _call(model: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    out = model(x, interpolate_pos_encoding=True)
    return {"features": out.last_hidden_state} | ({} if out.pooler_output is None else {"pooled": out.pooler_output})


def _dino(model: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    out = model(x)
    return {"features": out.last_hidden_state, "pooled": out.pooler_output}


@system("ViT")
def vit(c: Compare) -> None:
    config = hf.ViTConfig(**SIZES, intermediate_size=96, pooler_output_size=20)
    compare(c, Tower(twin(hf.ViTModel, config), _call, "layers.{}", 8, 1))


@system("ViT, no biases of q, k and v")
def vit_plain(c: Compare) -> None:
    config = hf.ViTConfig(**SIZES, intermediate_size=96, qkv_bias=False, hidden_act="gelu_new")
    compare(c, Tower(twin(hf.ViTModel, config), _call, "layers.{}", 8, 1))


@system("ViT classifier")
def classifier(c: Compare) -> None:
    model = twin(hf.ViTForImageClassification, hf.ViTConfig(**SIZES, intermediate_size=96, num_labels=7))
    compare(c, Tower(model, lambda m, x: {"pooled": m(x, interpolate_pos_encoding=True).logits}, "vit.layers.{}", 8, 1))


@system("DeiT")
def deit(c: Compare) -> None:
    config = hf.DeiTConfig(**SIZES, intermediate_size=96, num_labels=7)
    model = twin(hf.DeiTForImageClassificationWithTeacher, config)
    compare(
        c, Tower(model, lambda m, x: {"pooled": m(x, interpolate_pos_encoding=True).logits}, "deit.layers.{}", 8, 2)
    )


@system("DINOv2")
def dinov2(c: Compare) -> None:
    model = twin(hf.Dinov2Model, hf.Dinov2Config(**SIZES, mlp_ratio=2, layerscale_value=0.5))
    compare(c, Tower(model, _dino, "encoder.layer.{}", 8, 1))


@system("DINOv2 giant's gated MLP, classifier")
def dinov2_gated(c: Compare) -> None:
    config = hf.Dinov2Config(**SIZES, mlp_ratio=2, use_swiglu_ffn=True, num_labels=7)
    model = twin(hf.Dinov2ForImageClassification, config)
    compare(c, Tower(model, lambda m, x: {"pooled": m(x).logits}, "dinov2.encoder.layer.{}", 8, 1))


@system("DINOv2 with registers")
def registers(c: Compare) -> None:
    config = hf.Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, num_register_tokens=3)
    compare(c, Tower(twin(hf.Dinov2WithRegistersModel, config), _dino, "encoder.layer.{}", 8, 4))
