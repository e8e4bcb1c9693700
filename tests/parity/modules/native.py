"""SigLIP, SigLIP 2 NaFlex, Pixtral, InternViT."""

import torch
import transformers as hf
from parity import pictures
from parity.harness import Compare, system, twin
from parity.modules.towers import Tower, compare

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96, "patch_size": 8}


@system("SigLIP vision")
def siglip(c: Compare) -> None:
    def call(model, x):
        out = model(x, interpolate_pos_encoding=True)
        return {"features": out.last_hidden_state, "pooled": out.pooler_output}

    model = twin(hf.SiglipVisionModel, hf.SiglipVisionConfig(**SIZES, image_size=32))
    compare(c, Tower(model, call, "encoder.layers.{}", 8, 0, "embeddings"))


@system("SigLIP vision without a head")
def headless(c: Compare) -> None:
    def call(model, x):
        return {"features": model(x, interpolate_pos_encoding=True).last_hidden_state}

    model = twin(hf.SiglipVisionModel, hf.SiglipVisionConfig(**SIZES, image_size=32, vision_use_head=False))
    compare(c, Tower(model, call, "encoder.layers.{}", 8, 0, "embeddings"))


@system("SigLIP 2 NaFlex vision")
def naflex(c: Compare) -> None:
    def call(model, x):
        rows, columns = x.shape[2] // 8, x.shape[3] // 8
        cut = torch.tensor(pictures.cut(x.numpy(), 8), dtype=x.dtype)[None]
        mask = torch.ones(1, rows * columns, dtype=torch.int64)
        out = model(cut, pixel_attention_mask=mask, spatial_shapes=torch.tensor([[rows, columns]]))
        return {"features": out.last_hidden_state, "pooled": out.pooler_output}

    model = twin(hf.Siglip2VisionModel, hf.Siglip2VisionConfig(**SIZES, num_patches=16))
    compare(c, Tower(model, call, "encoder.layers.{}", 8, 0, "embeddings"))


@system("Pixtral vision")
def pixtral(c: Compare) -> None:
    def call(model, x):
        return {"features": model(x, image_sizes=[tuple(x.shape[2:])]).last_hidden_state}

    # HF's frequencies are a table for image_size; the largest picture here has 9 columns.
    config = hf.PixtralVisionConfig(**SIZES, image_size=80, hidden_act="silu")
    model = twin(hf.PixtralVisionModel, config)
    compare(c, Tower(model, call, "transformer.layers.{}", 8, 0, "patch_conv"))


@system("InternViT")
def internvit(c: Compare) -> None:
    config = hf.InternVLVisionConfig(**SIZES, image_size=32, attention_bias=True, use_mean_pooling=False)
    model = twin(hf.InternVLVisionModel, config)
    compare(c, Tower(model, lambda m, x: {"features": m(x).last_hidden_state}, "encoder.layer.{}", 8, 1))


@system("InternViT-6B: RMSNorm, normed queries and keys, mean pooling")
def internvit_6b(c: Compare) -> None:
    # Queries and keys have an epsilon of their own, 1e-6 whatever the config says.
    config = hf.InternVLVisionConfig(
        **SIZES, image_size=32, use_qk_norm=True, norm_type="rms_norm", use_mask_token=True, layer_norm_eps=1e-2
    )
    model = twin(hf.InternVLVisionModel, config)
    compare(c, Tower(model, lambda m, x: {"features": m(x).last_hidden_state}, "encoder.layer.{}", 8, 1))
