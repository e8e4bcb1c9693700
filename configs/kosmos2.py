"""Kosmos-2 (Peng et al. 2023, Kosmos-2: grounding multimodal large language models to the world), trained whole.

    python -m mmjax.plan kosmos2 --topology v5e:4x4        # any machine: memory, FLOPs, collectives, step time
    python -m mmjax.train kosmos2 --data.sources.0.path captions.jsonl --data.tokenizer kosmos-2

CLIP ViT-L/14 at 224 pixels, whose last norm sees every token; 64 latent queries that look once at features of length
one; a decoder of MAGNETO's blocks, with sinusoidal positions and a head that is its token table.
`mmjax.convert.huggingface.load` reads microsoft/kosmos-2-patch14-224 as this model. The defaults are for 16 chips with
16 GB or more (`v5e:4x4`).

`--model.decoder.vocab` must be what the tokenizer has; 65,037 is that of the published weights.
"""

import dataclasses
from pathlib import Path

from mmjax.connectors import perceiver
from mmjax.core.meshes import MeshConfig
from mmjax.data import sets
from mmjax.encoders.published import ENCODERS
from mmjax.models import decoder, vlm
from mmjax.nn import transformer
from mmjax.sequence import interleave
from mmjax.tokenizers.published import PUBLISHED
from mmjax.train.config import Config, Objective, Optimizer, Packing, Update

CHIPS = 16
PICTURES = 8  # in a row, of 256 patches and 64 tokens each


def model() -> vlm.Config:
    """1.66 billion parameters."""
    clip = ENCODERS["clip-l14"]()
    language = transformer.Config(
        width=2048,
        layers=24,
        heads=32,
        kv_heads=32,
        head=64,
        hidden=8192,
        activation="gelu",
        gated=False,
        bias=True,
        norm_kind="layer",
        epsilon=1e-5,
        inner_norm=True,
        remat="attention",
    )
    seen = dataclasses.replace(clip.blocks, remat="attention")
    return vlm.Config(
        vision=dataclasses.replace(clip, blocks=seen, final_norm=True, head=None),
        connector=perceiver.Config(
            seen.width,
            language.width,
            PUBLISHED["kosmos-2"].latents,
            layers=1,
            heads=language.heads,
            head=language.head,
            hidden=0,
            norm_kind="none",
            residual=False,
            bias=True,
            unit=True,
            prefix=True,
            dense=True,
        ),
        decoder=decoder.Config(
            65037, language, tied=True, embed_scale=language.width**0.5, positions=decoder.Positions(None, 2)
        ),
        scaled=True,
    )


def config() -> Config:
    return Config(
        model=model(),
        data=sets.Mixed((sets.Files(Path("captions.jsonl")),), Path("kosmos-2"), convention="kosmos-2"),
        out=Path("runs/kosmos2"),
        steps=1000,
        resolution=PUBLISHED["kosmos-2"].policy,
        packing=Packing(rows=4 * CHIPS, tokens=2048, shapes=((PICTURES * 256, PICTURES),)),
        sequence=interleave.Config(position="sequential"),
        optimizer=Optimizer(learning_rate=2e-4, warmup=0.01, final=0.0, b2=0.98, weight_decay=0.01),
        objective=Objective(chunk=2048),
        update=Update(compute="bfloat16"),
        mesh=MeshConfig(data=1, fsdp=CHIPS),
    )
