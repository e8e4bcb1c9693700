"""MiniGPT-4 with Vicuna-7B (Zhu et al. 2023): one linear map from BLIP-2's frozen Q-Former to a frozen Vicuna.

    python -m mmjax.plan minigpt4 --topology v5e:4x4             # any machine: memory, FLOPs, collectives, step time
    python -m mmjax.train minigpt4 --data.sources.0.path chats.json --data.tokenizer vicuna/tokenizer.model

EVA-CLIP's ViT-g/14 and the Q-Former stay as they are in BLIP-2, Vicuna as it is; only connector/projection is trained,
768 → 4,096. A picture becomes 32 tokens, between <Img> and </Img>, which are words and no control tokens. The defaults
are the first stage's, 20,000 steps of 256 pictures, for 16 chips with 16 GB or more, a v5e:4x4. The second:
`--steps 400 --packing.rows 16 --packing.shapes 256 1 --optimizer.learning-rate 3e-5 --optimizer.final 0.33`.

Parameters start at random. With published weights: MiniGPT-4 is a directory of model_type blip-2 whose text_config is
Llama's (image_token_index 0; "image_token": "<unk>" in tokenizer_config.json; a chat_template.jinja with the prompt).
`convert.huggingface.opened` gives the parts of BLIP-2 and Vicuna, `Origin.of` takes config.json of the whole, `save`
writes it, and `python -m mmjax.train finetune --model DIR --stages connector/projection:400:3e-5` trains the map.

`--model.decoder.vocab` must be at least what the tokenizer has: 32,000 in Vicuna v1.1, 32,001 in the v0 of the paper.
"""

import dataclasses
from pathlib import Path

from mmjax.connectors.published import CONNECTORS
from mmjax.core.meshes import MeshConfig
from mmjax.data import sets
from mmjax.encoders.published import ENCODERS
from mmjax.models import decoder, vlm
from mmjax.nn import rope, transformer
from mmjax.sequence import interleave
from mmjax.tokenizers.convention import Convention
from mmjax.tokenizers.parts import Around, Symbol
from mmjax.tokenizers.resolution import Fixed
from mmjax.train.config import Config, Objective, Optimizer, Packing, Update

CHIPS = 16
PATCHES, PICTURES = 16 * 16, 8  # of a picture; in a row

# MiniGPT-4's code tokenizes three strings apart: up to the picture, up to the answer, and the answer with its ###. The
# spaces before </Img> and before the answer are those that Llama's tokenizer writes before each string.
MINIGPT4 = Convention(
    "minigpt-4",
    begin=(Symbol("<s>"),),
    user=Around(("###Human: ",), (" ###Assistant: ",)),
    assistant=Around((" ",), ("###",)),
    image=Around(("<Img>",), (" </Img> ",)),
    prompt=(),
    media="first",
    apart=True,
    one_turn=True,
    pad="</s>",
    stop="</s>",
    placeholder="<unk>",
)


def model() -> vlm.Config:
    """7.83 billion parameters, of which 3.15 million are trained."""
    eva = ENCODERS["eva-g14"]()
    language = transformer.Config(
        width=4096,
        layers=32,
        heads=32,
        kv_heads=32,
        head=128,
        hidden=11008,
        rope=rope.Config(128, (64,)),
        remat="attention",
    )
    return vlm.Config(
        vision=dataclasses.replace(eva, blocks=dataclasses.replace(eva.blocks, remat="attention")),
        connector=dataclasses.replace(CONNECTORS["blip2-opt-2.7b"](), outputs=language.width),
        decoder=decoder.Config(32000, language, tied=False),
        placeholder=0,
    )


def config() -> Config:
    return Config(
        model=model(),
        data=sets.Mixed((sets.Files(Path("chats.json")),), Path("tokenizer.model"), convention=MINIGPT4),
        out=Path("runs/minigpt4"),
        steps=20_000,
        resolution=Fixed(14, 224, 224),
        # A picture, its question and its answer take about 120 tokens.
        packing=Packing(rows=2 * CHIPS, tokens=1024, shapes=((PICTURES * PATCHES, PICTURES),)),
        sequence=interleave.Config(position="sequential"),
        optimizer=Optimizer(learning_rate=1e-4, warmup=0.25, final=0.8, b2=0.999, weight_decay=0.05),
        objective=Objective(chunk=1024),
        update=Update(compute="bfloat16", frozen=("!connector/projection",)),
        mesh=MeshConfig(data=1, fsdp=CHIPS),
    )
