"""SmolVLM-256M (Marafioti et al. 2025, "SmolVLM: redefining small and efficient multimodal models"), trained whole.

    python -m mmjax.plan smolvlm --topology v5e:4x4        # any machine: memory, FLOPs, collectives, step time
    python -m mmjax.train smolvlm --data.sources.0.path chats.jsonl --data.tokenizer smolvlm

SigLIP-B on tiles of 512 pixels and the whole picture at that size, 4 × 4 of whose patches become one of 64 media
tokens; SmolLM2-135M. `mmjax.convert.huggingface.load` reads HuggingFaceTB/SmolVLM-256M-Instruct, and
SmolVLM2-256M-Video-Instruct, as this model. The defaults are for 16 chips with 16 GB or more, a v5e-16 (`v5e:4x4`).

`--model.decoder.vocab` must be at least what the tokenizer has (fewer are refused with the right number); 49,280 is
that of the published weights, padded.
"""

import dataclasses
from pathlib import Path

from mmjax.connectors import pixel_shuffle
from mmjax.core.meshes import MeshConfig
from mmjax.data import sets
from mmjax.encoders import vit
from mmjax.encoders.published import ENCODERS
from mmjax.models import decoder, vlm
from mmjax.nn import rope, transformer
from mmjax.sequence import interleave
from mmjax.tokenizers.published import PUBLISHED
from mmjax.train.config import Config, Objective, Optimizer, Packing, Update

CHIPS = 16
SIDE = 32  # patches of a tile
VIEWS = 17  # of a picture: 4 × 4 tiles and the whole


def model() -> vlm.Config:
    """256,484,928 parameters."""
    siglip = ENCODERS["siglip-b16-224"]()
    seen = dataclasses.replace(siglip.blocks, remat="full")
    language = transformer.Config(
        width=576,
        layers=30,
        heads=9,
        kv_heads=3,
        head=64,
        hidden=1536,
        epsilon=1e-5,
        rope=rope.Config(64, (32,), 100_000.0),
        remat="full",
    )
    return vlm.Config(
        vision=dataclasses.replace(siglip, blocks=seen, table=vit.Table(SIDE, SIDE, "bucket"), head=None),
        connector=pixel_shuffle.Config(seen.width, language.width, side=4, norm=False, layers=1, bias=False),
        decoder=decoder.Config(49_280, language, tied=False),
        placeholder=49_190,
    )


def config() -> Config:
    return Config(
        model=model(),
        data=sets.Mixed((sets.Files(Path("chats.jsonl")),), Path("smolvlm"), convention="smolvlm"),
        out=Path("runs/smolvlm"),
        steps=1000,
        resolution=PUBLISHED["smolvlm2"].policy,
        # A picture takes up to 1,150 tokens.
        packing=Packing(rows=CHIPS, tokens=2048, shapes=((VIEWS * SIDE * SIDE, VIEWS),)),
        sequence=interleave.Config(position="sequential", merge=4),
        optimizer=Optimizer(learning_rate=1e-4, warmup=0.03, final=0.0, b2=0.999, weight_decay=0.0),
        objective=Objective(chunk=2048),
        update=Update(compute="bfloat16"),
        mesh=MeshConfig(data=2, fsdp=CHIPS // 2),
    )
