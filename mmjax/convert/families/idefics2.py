"""Idefics2, Idefics3 and SmolVLM: SigLIP's tower with places as shares of the picture, a connector, a text decoder."""

from dataclasses import dataclass

from mmjax.connectors import Connector, pixel_shuffle
from mmjax.convert import raw
from mmjax.convert.families import clip, connectors, decoder, perceiver, siglip
from mmjax.convert.families.clip import prefixed
from mmjax.convert.found import Found
from mmjax.encoders import vit
from mmjax.models import vlm
from mmjax.nn import patch_embed


@dataclass(frozen=True)
class Family:
    """What transformers 5.23 takes where config.json is silent: the text model, two of the tower's sizes, an id."""

    text: str
    width: int
    heads: int
    image: int


_THIRD = Family("llama", 1152, 16, 128_257)
FAMILIES = {"idefics2": Family("mistral", 768, 12, 32_001), "idefics3": _THIRD, "smolvlm": _THIRD}
TEXT_AT, HEAD = "model.text_model.", "lm_head.weight"


def read(config: dict, keys: frozenset[str]) -> Found:
    """A directory of Idefics2ForConditionalGeneration, Idefics3For… or SmolVLMFor…, which all have the same names."""
    kind = config["model_type"]
    text = text_config(config)
    one = decoder.configure(text, False)  # refuses what it must, before the rest is read
    tower = vision(raw.part(config, "vision_config", {}), FAMILIES[kind])
    sizes = {"hidden_size": one.blocks.width, "intermediate_size": one.blocks.hidden}
    if kind == "idefics2":
        raw.refuse(raw.part(config, "perceiver_config", {}), "qk_layer_norms_perceiver", False)
        own = raw.part(config, "vision_config", {}) | {"hidden_size": tower.blocks.width}
        connector: Connector = perceiver.idefics2_config(config | {"vision_config": own, "text_config": text | sizes})
        between = perceiver.idefics2(connector)
    else:
        raw.refuse(config, "use_resampler", False)
        side = raw.size(config, "scale_factor", 2)
        connector = pixel_shuffle.Config(tower.blocks.width, one.blocks.width, side, norm=False, layers=1, bias=False)
        between = connectors.idefics3(connector)

    def found(tied: bool) -> Found:
        image = raw.size(config, "image_token_id", FAMILIES[kind].image)
        cfg = vlm.Config(tower, connector, decoder.configure(text, tied), placeholder=image)
        table = prefixed("vision", siglip.vision_rules(tower, "model.vision_model.", "siglip"))
        table += prefixed("connector", between)
        table += prefixed("decoder", decoder.rules(cfg.decoder, TEXT_AT, HEAD, keys))
        return Found(vlm, cfg, tuple(table), decoder.DROPPED | clip.DROPPED)

    tied = decoder.tied(config, text, keys, HEAD, nested=False)
    return decoder.tie(found, tied, keys, f"{TEXT_AT}embed_tokens.weight", HEAD)


def text_config(config: dict) -> dict:
    """The config of the text model; one that is left out has an epsilon of its own."""
    text = raw.part(config, "text_config", {"rms_norm_eps": 1e-5})
    for key in ("qk_layer_norms", "use_resampler"):  # of the code that the first files were made with
        raw.refuse(text, key, False)
    return {"model_type": FAMILIES[config["model_type"]].text} | text


def vision(config: dict, family: Family) -> vit.Config:
    """The tower: SigLIP's, without a head, whose table is read by buckets."""
    of = clip.tower(config, family.width, 3072, 12, family.heads, "gelu_pytorch_tanh", 1e-6)
    patch = raw.square(config, "patch_size", 32)
    side = raw.square(config, "image_size", 224) // patch
    return vit.Config(
        embed=patch_embed.Config(patch, of.width, raw.size(config, "num_channels", 3), *raw.HALF),
        blocks=of,
        table=vit.Table(side, side, "bucket"),
    )
