"""Sampling against the logits processors of transformers, in the order of its `generate`."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the `parity` extra")
pytest.importorskip("transformers", reason="needs the `parity` extra")

from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from mmjax.generate import sample
from mmjax.generate.sample import Sampling

V = 200
CASES = [
    Sampling(temperature=t, top_k=k, top_p=p, min_p=m, repetition_penalty=r)
    for t, k, p, m, r in itertools.product([0.6, 1.0, 1.7], [0, 1, 30, 1000], [0.3, 0.95, 1.0], [0.0, 0.1], [1.0, 1.4])
]


@pytest.fixture(scope="module")
def model():
    """For the order of its processors."""
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, **size))


def theirs(model, how: Sampling, ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
    cfg = GenerationConfig(
        do_sample=True,
        temperature=how.temperature,
        top_k=how.top_k,
        top_p=how.top_p,
        min_p=how.min_p or None,
        repetition_penalty=how.repetition_penalty,
    )
    cfg._eos_token_tensor = None
    processors = model._get_logits_processor(cfg, ids.shape[1], torch.tensor(ids), None, [], "cpu")
    scores = processors(torch.tensor(ids), torch.tensor(logits))
    return torch.log_softmax(scores, -1).numpy()


def test_every_combination(model):
    """The same tokens are left, with the same probabilities; all cases are rows of one batch here."""
    some = np.random.default_rng(0)
    logits = (some.normal(size=(len(CASES), V)) * 3).astype(np.float32)
    ids = some.integers(0, V, (len(CASES), 40))
    switches, values = sample.prepare(CASES)
    assert switches == sample.Switches(True, True, True, True, True)
    found = sample.penalised(jnp.asarray(logits), jnp.asarray(ids), jnp.asarray(values.penalty))
    found = np.asarray(sample.filtered(found, values, switches), np.float64)
    found = found - np.log(np.exp(found).sum(-1, keepdims=True))
    for n, how in enumerate(CASES):
        wanted = theirs(model, how, ids[n : n + 1], logits[n : n + 1])[0]
        assert (np.isfinite(found[n]) == np.isfinite(wanted)).all(), how
        kept = np.isfinite(wanted)
        np.testing.assert_allclose(found[n][kept], wanted[kept], rtol=1e-4, atol=1e-5)
