"""BLIP-2's first stage against LAVIS, where text reads the queries' keys and values from a cache.

Of salesforce-lavis 1.0.2 only lavis/models/blip2_models/Qformer.py is read; without it nothing is compared. Its wheel
also installs a package named `tests`, which hides ours: unpack it rather.
"""

import contextlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import torch
import transformers as hf
from parity.harness import Compare, randomise, system
from parity.modules.qformer import (
    CONTRAST,
    INPUTS,
    QFORMER,
    QUERIES,
    VOCAB,
    WIDTH,
    Case,
    Tensors,
    compare,
    encode,
    hidden,
    joined,
    named,
    nest,
    unit,
)

from mmjax.connectors import qformer_heads
from mmjax.convert.families import qformer as table

LAVIS = importlib.util.find_spec("lavis")


class _Base(torch.nn.Module):
    """The few names of transformers 4's PreTrainedModel that LAVIS' Q-Former uses."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    def init_weights(self) -> None: ...

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def get_head_mask(self, mask: None, layers: int) -> list[None]:
        return [None] * layers

    def invert_attention_mask(self, mask: torch.Tensor) -> torch.Tensor:
        return (1.0 - mask[:, None, None, :].to(self.dtype)) * torch.finfo(self.dtype).min


@contextlib.contextmanager
def _old_names() -> Iterator[None]:
    """Names that transformers 5 no longer has."""
    files, models = types.ModuleType("transformers.file_utils"), types.ModuleType("transformers.modeling_utils")
    files.ModelOutput = hf.utils.ModelOutput
    models.PreTrainedModel = _Base
    models.apply_chunking_to_forward = lambda forward, size, dim, *tensors: forward(*tensors)
    models.find_pruneable_heads_and_indices = models.prune_linear_layer = None
    with mock.patch.dict(sys.modules, {m.__name__: m for m in (files, models)}):
        yield


def lavis() -> torch.nn.Module:
    """The parts of LAVIS' Blip2Qformer after its tower, with tied words, as transformers 4 ties them."""
    path = Path(next(iter(LAVIS.submodule_search_locations))) / "models" / "blip2_models" / "Qformer.py"
    spec = importlib.util.spec_from_file_location("lavis_qformer", path)
    code = importlib.util.module_from_spec(spec)
    config = hf.BertConfig(**{k: v for k, v in QFORMER.items() if k != "encoder_hidden_size"})
    more = {"encoder_width": INPUTS, "add_cross_attention": True, "cross_attention_freq": 2, "query_length": QUERIES}
    more |= {"position_embedding_type": "absolute", "use_cache": True, "use_return_dict": True, "is_decoder": False}
    config = types.SimpleNamespace(
        **(config.to_dict() | more | {"output_attentions": False, "output_hidden_states": False})
    )
    with _old_names():
        spec.loader.exec_module(code)
    model = torch.nn.Module()
    model.Qformer = code.BertLMHeadModel(config)
    model.query_tokens = torch.nn.Parameter(torch.zeros(1, QUERIES, WIDTH))
    model.vision_proj, model.text_proj = torch.nn.Linear(WIDTH, CONTRAST), torch.nn.Linear(WIDTH, CONTRAST)
    model.itm_head = torch.nn.Linear(WIDTH, 2)
    model.Qformer.cls.predictions.decoder.weight = model.Qformer.bert.embeddings.word_embeddings.weight
    return randomise(model.float().eval())


def stage_one(c: Compare) -> None:
    cfg = table.config(QFORMER, queries=QUERIES, words=True)
    heads = qformer_heads.Config(WIDTH, CONTRAST, VOCAB)
    model = lavis()

    def reference(model: Any, features: torch.Tensor, ids: torch.Tensor) -> Tensors:
        bert = model.Qformer.bert
        watched = [bert.embeddings, *bert.encoder.layer]
        see, past = {"query_embeds": model.query_tokens, "encoder_hidden_states": features}, []
        queries = hidden(watched, lambda: past.append(bert(**see, use_cache=True).past_key_values))
        logits: list[torch.Tensor] = []
        kwargs = {"attention_mask": torch.ones(1, QUERIES + ids.shape[1]), "past_key_values": past[0]}
        text = hidden(watched, lambda: logits.append(model.Qformer(ids, **kwargs).logits))
        vision = unit(model.vision_proj(queries[-1]))
        return named(joined(queries, text)) | {"vision": vision, "language": logits[0]}

    def ours(params: dict, row: dict) -> dict[str, jax.Array]:
        found = encode(params["qformer"], row, cfg, "generation")
        vision = qformer_heads.contrast_vision(params["heads"], found.queries, heads)
        language = qformer_heads.language(params["heads"], found.text, params["qformer"]["words"], heads)
        return {"hidden": found.hidden, "vision": vision, "language": language}

    nested = nest(cfg, table.rules(cfg, family="lavis"), heads, table.heads(heads, family="lavis"))
    compare(c, Case(model, *nested, reference, ours))


if LAVIS is not None:
    system("BLIP-2 stage 1 (LAVIS)")(stage_one)
