"""DeepSeek-VL-1.3B (Lu et al. 2024, "DeepSeek-VL: towards real-world vision-language understanding"), trained whole.

    python -m mmjax.plan deepseek_vl --topology v5e:8x8     # any machine: memory, FLOPs, collectives, step time
    python -m mmjax.train deepseek_vl --data.sources.0.path chats.json --data.tokenizer deepseek-vl-1.3b-chat

SigLIP ViT-L/16 at 384 pixels; an MLP of two layers; DeepSeek-LLM-1.3B. `mmjax.convert.huggingface.load` reads
deepseek-community/deepseek-vl-1.3b-chat as this model. The defaults are for 64 chips with 16 GB or more (`v5e:8x8`).

`--model.decoder.vocab` must be at least what the tokenizer has (fewer are refused with the right number); 102,400 is
that of the published weights, padded.
"""

import dataclasses
from pathlib import Path

from mmjax.connectors import mlp as connector
from mmjax.core.meshes import MeshConfig
from mmjax.data import sets
from mmjax.encoders.published import ENCODERS
from mmjax.models import decoder, vlm
from mmjax.nn import rope, transformer
from mmjax.sequence import interleave
from mmjax.tokenizers.published import PUBLISHED
from mmjax.train.config import Config, Objective, Optimizer, Packing, Update

CHIPS = 64
PICTURE = 24 * 24  # patches, and media tokens, of a picture
PICTURES = 4  # in a row


def model() -> vlm.Config:
    """1.96 billion parameters; the published 1.98 billion count SigLIP's pooling head, which nothing reads."""
    siglip = ENCODERS["siglip-l16-384"]()
    seen = dataclasses.replace(siglip.blocks, remat="full")
    language = transformer.Config(
        width=2048,
        layers=24,
        heads=16,
        kv_heads=16,
        head=128,
        hidden=5632,
        rope=rope.Config(128, (64,)),
        remat="full",
    )
    return vlm.Config(
        vision=dataclasses.replace(siglip, blocks=seen, head=None),
        connector=connector.Config(seen.width, language.width),
        decoder=decoder.Config(102400, language, tied=False),
        placeholder=100015,
    )


def config() -> Config:
    return Config(
        model=model(),
        data=sets.Mixed((sets.Files(Path("chats.json")),), Path("deepseek-vl-1.3b-chat"), convention="deepseek-vl"),
        out=Path("runs/deepseek_vl"),
        steps=1000,
        resolution=PUBLISHED["deepseek-vl"].policy,
        packing=Packing(rows=CHIPS, tokens=4096, shapes=((PICTURES * PICTURE, PICTURES),)),
        sequence=interleave.Config(position="sequential"),
        optimizer=Optimizer(learning_rate=2e-5, warmup=0.03, final=0.0, b2=0.95, weight_decay=0.0),
        objective=Objective(chunk=2048),
        update=Update(compute="bfloat16"),
        mesh=MeshConfig(data=4, fsdp=16),
    )
