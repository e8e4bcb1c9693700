"""PaliGemma-3B at 224 pixels (Beyer et al. 2024, "PaliGemma: a versatile 3B VLM for transfer"), trained whole.

    python -m mmjax.plan paligemma --topology v5e:8x8      # any machine: memory, FLOPs, collectives, step time
    python -m mmjax.train paligemma --data.sources.0.path chats.json --data.tokenizer paligemma-3b-pt-224

SigLIP So400m at 224 pixels; a linear map; Gemma-2B. A prefix-LM: the pictures and the question see each other in both
directions, the answer is causal and alone learnt. `mmjax.convert.huggingface.load` reads google/paligemma-3b-pt-224 as
this model. The defaults are for 64 chips with 16 GB or more (`v5e:8x8`).

In Hugging Face's older files media features are divided by √width and all vectors then multiplied by it; here, as in
its newer ones, those of the token table alone are (`embed_scale`).

`--model.decoder.vocab` must be at least what the tokenizer has (fewer are refused with the right number); 257,216 is
that of the published weights, padded: 1,024 of its words are places in a picture, 128 are segments.
"""

import dataclasses
from pathlib import Path

from mmjax.connectors import linear as connector
from mmjax.core.meshes import MeshConfig
from mmjax.data import sets
from mmjax.encoders import vit
from mmjax.encoders.published import ENCODERS
from mmjax.models import decoder, vlm
from mmjax.nn import rope, transformer
from mmjax.sequence import interleave
from mmjax.tokenizers.published import PUBLISHED
from mmjax.train.config import Config, Objective, Optimizer, Packing, Update

CHIPS = 64
PICTURE = 16 * 16  # patches, and media tokens, of a picture
PICTURES = 6  # in a row


def model() -> vlm.Config:
    """2.92 billion parameters."""
    siglip = ENCODERS["siglip-so400m14-384"]()
    seen = dataclasses.replace(siglip.blocks, remat="full")
    language = transformer.Config(
        width=2048,
        layers=18,
        heads=8,
        kv_heads=1,
        head=256,
        hidden=16384,
        activation="gelu_tanh",
        norm_offset=1.0,
        rope=rope.Config(256, (128,)),
        remat="full",
    )
    return vlm.Config(
        vision=dataclasses.replace(siglip, blocks=seen, table=vit.Table(16, 16), head=None),
        connector=connector.Config(seen.width, language.width),
        decoder=decoder.Config(257216, language, embed_scale=language.width**0.5),
        placeholder=257152,
    )


def config() -> Config:
    return Config(
        model=model(),
        data=sets.Mixed((sets.Files(Path("chats.json")),), Path("paligemma-3b-pt-224"), convention="paligemma"),
        out=Path("runs/paligemma"),
        steps=1000,
        resolution=PUBLISHED["paligemma"].policy,
        packing=Packing(rows=CHIPS, tokens=2048, shapes=((PICTURES * PICTURE, PICTURES),)),
        sequence=interleave.Config(position="sequential", see="prefix"),
        optimizer=Optimizer(learning_rate=1e-5, warmup=0.05, final=0.0, b2=0.999, weight_decay=1e-6),
        objective=Objective(chunk=512),  # of a vocabulary of a quarter of a million
        update=Update(compute="bfloat16"),
        mesh=MeshConfig(data=4, fsdp=16),
    )
