"""Q-Formers' tables name every parameter in every family, and configs are read or refused."""

import jax
import numpy as np
import pytest
from tiny import randomised

from mmjax.connectors import qformer, qformer_heads
from mmjax.convert.families import qformer as table
from mmjax.convert.rules import Arrays, load, save
from mmjax.core.errors import InputError

FULL = qformer.Config(6, 8, 2, 5, 2, 12, text=True, vocab=9, positions=4, cross_every=3)
HEADS = qformer_heads.Config(8, 4, 9)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("family", ["blip_2", "instructblip", "lavis"])
def test_there_and_back(family):
    params, spec, rules = randomised(qformer.spec(FULL)), qformer.spec(FULL), table.rules(FULL, "model.", family)
    tensors = save(spec, rules, params)
    assert all(key.startswith("model.") for key in tensors)
    looking = {key.split("layer.")[1][0] for key in tensors if "crossattention" in key}
    assert looking == {"0", "3"}
    same(load(spec, rules, Arrays(tensors)), params)


def test_heads_there_and_back():
    params, spec = randomised(qformer_heads.spec(HEADS)), qformer_heads.spec(HEADS)
    rules = table.heads(HEADS, family="lavis")
    tensors = save(spec, rules, params)
    same(load(spec, rules, Arrays(tensors)), params)
    assert "Qformer.cls.predictions.transform.LayerNorm.weight" in tensors


def test_old_buffers_and_tied_words_are_dropped():
    spec, rules = qformer.spec(FULL), table.rules(FULL, family="lavis")
    tensors = save(spec, rules, randomised(spec))
    tensors |= {
        "Qformer.bert.embeddings.position_ids": np.arange(4),
        "Qformer.cls.predictions.decoder.weight": np.ones(3),
    }
    load(spec, rules, Arrays(tensors), drop=table.DROPPED)
    with pytest.raises(InputError, match="2 surplus"):
        load(spec, rules, Arrays(tensors))


def test_reads_published_defaults():
    found = table.read({"model_type": "blip_2_qformer"}, frozenset())
    assert found.cfg == qformer.Config(1408, 768, None, 12, 12, 3072)
    found = table.read({"model_type": "instructblip_qformer", "vocab_size": 30523}, frozenset())
    assert found.cfg == qformer.Config(1408, 768, None, 12, 12, 3072, text=True, vocab=30523)
    cfg = table.config({"use_qformer_text_input": True}, queries=32, outputs=2560)
    assert (cfg.text, cfg.vocab, cfg.queries, cfg.outputs) == (True, None, 32, 2560)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"model_type": "bert"}, "'bert'; a Q-Former's is"),
        ({"model_type": "blip_2_qformer", "hidden_act": "mish"}, "'hidden_act' is 'mish'"),
        ({"model_type": "blip_2_qformer", "hidden_size": 0}, "'hidden_size' is 0"),
        ({"model_type": "blip_2_qformer", "hidden_size": 20}, "12 heads"),
        ({"model_type": "instructblip_qformer", "position_embedding_type": "relative_key"}, "absolute"),
    ],
)
def test_refuses(raw, said):
    with pytest.raises(InputError, match=said):
        table.read(raw, frozenset())


def test_refuses_a_projection_without_a_name():
    with pytest.raises(ValueError, match="no projection"):
        table.rules(qformer.Config(6, 8, 2, 1, 2, 12, outputs=3), family="lavis")
