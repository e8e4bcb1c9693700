"""IDEFICS-9B (Laurençon et al. 2023, OBELICS), an open Flamingo, trained whole as its instructed model was.

    python -m mmjax.plan idefics --topology v5e:8x8               # any machine: memory, FLOPs, collectives, step time
    python -m mmjax.train idefics --data.sources.0.path chats.json --data.tokenizer idefics/tokenizer.json

OpenCLIP's ViT-H/14, a resampler that makes 64 tokens of each picture, and LLaMA-7B with a layer of gated
cross-attention before each four of its blocks: text looks at the last picture so far, which takes three tokens in the
sequence. `mmjax.convert.huggingface.load` reads HuggingFaceM4/idefics-9b as this model, and `python -m mmjax.generate`
asks it. The defaults are for 64 chips with 16 GB or more, a v5e-64 (`v5e:8x8`).

`--model.decoder.vocab` must be what the tokenizer has: 32,000 of LLaMA's and two that were added, <image> and
<fake_token_around_image>; the instructed model has <end_of_utterance> too.
"""

from pathlib import Path

from mmjax.connectors import perceiver
from mmjax.core.meshes import MeshConfig
from mmjax.data import sets
from mmjax.encoders import vit
from mmjax.models import decoder, vlm
from mmjax.nn import cross_attention, patch_embed, rope, transformer
from mmjax.sequence import interleave
from mmjax.tokenizers.resolution import Fixed
from mmjax.train.config import Config, Objective, Optimizer, Packing, Update

CHIPS = 64
PICTURES = 8  # in a row


def model() -> vlm.Config:
    """8.93 billion parameters."""
    seen = transformer.Config(
        width=1280,
        layers=32,
        heads=16,
        kv_heads=16,
        head=80,
        hidden=5120,
        activation="gelu",
        gated=False,
        bias=True,
        norm_kind="layer",
        epsilon=1e-5,
        remat="attention",
    )
    language = transformer.Config(
        width=4096,
        layers=32,
        heads=32,
        kv_heads=32,
        head=128,
        hidden=11008,
        epsilon=1e-6,
        rope=rope.Config(128, (64,)),
        remat="attention",
    )
    cross = cross_attention.Config(
        width=4096,
        media=1280,
        heads=32,
        head=128,
        hidden=11008,
        every=4,
        epsilon=1e-6,
        activation="silu",
        gated=True,
        norm_kind="rms",
        qk_norm=True,
    )
    resampler = perceiver.Config(
        inputs=1280,
        width=1280,
        latents=64,
        layers=6,
        heads=16,
        head=96,
        hidden=5120,
        qk_norm=True,
        activation="relu",
        prefix=True,
    )
    tower = vit.Config(
        embed=patch_embed.Config(14, 1280, 3, *patch_embed.OPENAI, bias=False),
        blocks=seen,
        table=vit.Table(16, 16),
        classes=1,
        pre_norm=True,
        final_norm=False,
    )
    return vlm.Config(tower, resampler, decoder.Config(32_002, language, tied=False, cross=cross))


def config() -> Config:
    return Config(
        model=model(),
        data=sets.Mixed((sets.Files(Path("chats.json")),), Path("tokenizer.json"), convention="idefics"),
        out=Path("runs/idefics"),
        steps=1000,
        resolution=Fixed(14, 224, 224),
        packing=Packing(rows=CHIPS, tokens=2048, shapes=((PICTURES * 256, PICTURES),)),
        sequence=interleave.Config(cross="last_image", position="sequential"),
        optimizer=Optimizer(learning_rate=1e-5, warmup=0.03, final=0.0, b2=0.999, weight_decay=0.0),
        objective=Objective(chunk=2048),
        update=Update(compute="bfloat16"),
        mesh=MeshConfig(data=2, fsdp=32),
    )
