"""What an adapter's file calls the layers of every family is what transformers calls them: no number is computed."""

import dataclasses

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hub_configs import PUBLISHED

from mmjax.convert import adapter
from mmjax.convert import rules as tables
from mmjax.convert.model import Model, Origin
from mmjax.models import decoder, encoder_decoder, vlm
from mmjax.nn import lora

pytestmark = pytest.mark.slow


def whole() -> dict[str, dict]:
    """A config of every family, and language model in it."""
    out = {}
    for name, (config, _) in PUBLISHED.items():
        if not {"vision_config", "latent_query_num"} & config.keys():
            continue
        out.setdefault((config["model_type"], config.get("text_config", {}).get("model_type")), (name, config))
    return dict(out.values())


def alone() -> dict[str, dict]:
    """A config of every kind of language model by itself."""
    found = {}
    for name, (config, _) in PUBLISHED.items():
        if Origin.of(config).found.of in (decoder, encoder_decoder):
            found.setdefault(config["model_type"], (name, config))
    return dict(found.values())


@pytest.mark.parametrize("name", alone())
def test_names_of_language_models_alone(name):
    """As a fine-tuning has them (train.start.opened), in the class that peft finds for them."""
    config = alone()[name]
    origin = Origin.of(config)
    cfg = vlm.Config(None, None, origin.found.cfg)
    model = Model(vlm, cfg, {}, dataclasses.replace(origin, found=origin.found.within(vlm, cfg, "decoder")))
    made = tables.plan(vlm.spec(cfg), model.origin.found.rules)
    kind = transformers.AutoModelForSeq2SeqLM if cfg.decoder.answers else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        theirs = kind.from_config(transformers.AutoConfig.for_model(**config))
    there = dict(theirs.named_parameters(remove_duplicate=False)).keys()
    ours = {adapter.in_memory(piece.key, adapter.renamed(model)) for pieces in made.pieces.values() for piece in pieces}
    assert len(ours) > 10
    assert not sorted(ours - there)


@pytest.mark.parametrize("name", whole())
def test_names(name):
    config = whole()[name]
    origin = Origin.of(config)
    model = Model(vlm, origin.found.cfg, {}, origin)
    made = tables.plan(vlm.spec(model.cfg), origin.found.rules)
    with torch.device("meta"):
        theirs = transformers.AutoModelForImageTextToText.from_config(transformers.AutoConfig.for_model(**config))
    there = dict(theirs.named_parameters(remove_duplicate=False)).keys() | dict(theirs.named_buffers()).keys()
    table = adapter.renamed(model)
    ours = {adapter.in_memory(piece.key, table) for pieces in made.pieces.values() for piece in pieces}
    assert not sorted(ours - there)


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.2-11B-Vision", "HuggingFaceM4/idefics-9b"])
def test_what_is_adapted_by_default(name):
    """Where text looks at media by cross-attention too: every linear layer between the token table and the head."""
    origin = Origin.of(PUBLISHED[name][0])
    model = Model(vlm, origin.found.cfg, {}, origin)
    made, table = tables.plan(vlm.spec(model.cfg), origin.found.rules), adapter.renamed(model)
    kernels = lora.targets(vlm.spec(model.cfg), lora.Config(targets=lora.CROSSED))
    ours = {adapter.in_memory(piece.key, table) for kernel in kernels for piece in made.pieces[kernel]}
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(**PUBLISHED[name][0])
        theirs = transformers.AutoModelForImageTextToText.from_config(config)
    linear = [n for n, module in theirs.named_modules() if isinstance(module, torch.nn.Linear)]
    language = [n for n in linear if "layers." in n and not any(part in n for part in ("vision", "perceiver"))]
    assert ours == {f"{n}.weight" for n in language}
