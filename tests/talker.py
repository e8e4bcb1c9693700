"""A tiny model and its processor, made in a second and of no directory."""

import functools
from dataclasses import replace

import canvases
import numpy as np
from tiny import randomised, tiny_model
from tokenizer_files import CORPUS

from mmjax.connectors import perceiver
from mmjax.convert.huggingface import Model
from mmjax.convert.processor import Processor
from mmjax.models import vlm
from mmjax.nn import cross_attention
from mmjax.sequence import interleave
from mmjax.sequence.document import Document, Image, Text
from mmjax.tokenizers import text
from mmjax.tokenizers.chat import Chat
from mmjax.tokenizers.convention import Convention
from mmjax.tokenizers.parts import Around, Symbol
from mmjax.tokenizers.resolution import Native
from mmjax.tokenizers.template import Template
from mmjax.tokenizers.vocab import CONTROLS

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{% else %}<|assistant|>{% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|image_start|><|image|><|image_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@functools.cache
def made(see: str = "causal", cross: str = "none") -> tuple[Model, Processor]:
    """The same for every test of the process."""
    if cross != "none":
        return _beside(cross)
    tokenizer = text.load(text.train(CORPUS, 340))
    symbols = [control.symbol for control in CONTROLS]
    template = Template(TEMPLATE, symbols, media={"image": "<|image|>"})
    convention = Convention("tiny", pad="<|pad|>", stop="<|end|>", placeholder="<|image|>")
    chat, plain = Chat(tokenizer, replace(convention, template=template)), Chat(tokenizer, convention)
    cfg = tiny_model(vocab=chat.size)
    ends = (chat.controls["<|end|>"],)
    policy = Native(patch=4, min_pixels=16, max_pixels=16 * 16)
    processor = Processor(chat, plain, interleave.Config(see=see), ends, policy, patch=4)
    return Model(vlm, cfg, randomised(vlm.spec(cfg))), processor


def _beside(cross: str) -> tuple[Model, Processor]:
    """A Flamingo: its decoder looks at the latents of a resampler. Of "last_images", one with pictures on canvases."""
    tokenizer = text.load(text.train(CORPUS, 340))
    turn = Around((Symbol("<|user|>"),), (Symbol("<|end|>"),))
    said = Around((Symbol("<|assistant|>"),), (Symbol("<|end|>"),))
    mark = Around((), (), Around((Symbol("<|image_start|>"), Symbol("<|image|>")), (Symbol("<|image_end|>"),)))
    convention = Convention("tiny", user=turn, assistant=said, image=mark, pad="<|pad|>", stop="<|end|>")
    chat, cfg = Chat(tokenizer, convention), tiny_model(vocab=340)
    ends = (chat.controls["<|end|>"],)
    if cross == "last_images":
        cfg = canvases.model()
        cfg = replace(cfg, decoder=replace(cfg.decoder, vocab=chat.size), placeholder=None)
        how = {"patch": 4, "per_picture": cfg.vision.per_picture, "prompts": True}
        sequence = replace(canvases.SEQUENCE, position="sequential")
        processor = Processor(chat, chat, sequence, ends, canvases.POLICY, **how)
        return Model(vlm, cfg, randomised(vlm.spec(cfg))), processor
    looks = cross_attention.Config(16, 16, 2, 8, 24, every=1)
    cfg = replace(cfg, decoder=replace(cfg.decoder, vocab=chat.size, cross=looks), placeholder=None)
    cfg = replace(cfg, connector=perceiver.Config(16, 16, 3, 1, 2, 8, 24))
    policy = Native(patch=4, min_pixels=16, max_pixels=16 * 16)
    sequence = interleave.Config(cross=cross, position="sequential")
    how = {"patch": 4, "per_picture": 3, "prompts": True}
    processor = Processor(chat, chat, sequence, ends, policy, **how)
    return Model(vlm, cfg, randomised(vlm.spec(cfg))), processor


def picture(seed: int = 0, height: int = 12, width: int = 8) -> Image:
    some = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image(height, width, some)


def asked(*spans: Text | Image | str) -> Document:
    """A question, or several turns of which the answers are Text already."""
    return Document("q", tuple(Text(s) if isinstance(s, str) else s for s in spans))
