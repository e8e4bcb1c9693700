"""Sampling against an oracle in NumPy that sorts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.core.errors import InputError
from mmjax.generate import sample
from mmjax.generate.sample import GREEDY, Sampling

V = 50


def oracle(logits: np.ndarray, how: Sampling) -> np.ndarray:
    """Which tokens are left, bool[V]; those that are equally likely together."""
    x = logits.astype(np.float64) / how.temperature
    if how.top_k:
        x = np.where(x >= np.sort(x)[::-1][min(how.top_k, len(x)) - 1], x, -np.inf)
    p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    if how.top_p < 1:
        below = np.array([p[x <= v].sum() for v in x])
        x = np.where((below > 1 - how.top_p) | (x == x.max()), x, -np.inf)
    p = np.exp(x - x.max())
    return (p >= how.min_p) & np.isfinite(x)


def filtered(logits: np.ndarray, rows: list[Sampling]) -> np.ndarray:
    switches, values = sample.prepare(rows)
    return np.asarray(sample.filtered(jnp.asarray(logits), values, switches))


HOW = [
    Sampling(temperature=0.7),
    Sampling(temperature=1.3, top_k=5),
    Sampling(temperature=1.0, top_k=1000),
    Sampling(temperature=1.0, top_p=0.6),
    Sampling(temperature=1.0, top_p=0.0),
    Sampling(temperature=1.0, min_p=0.1),
    Sampling(temperature=1.0, min_p=1.0),
    Sampling(temperature=2.0, top_k=20, top_p=0.9, min_p=0.05),
]


def test_each_row_is_filtered_by_its_own_numbers(rng):
    logits = rng.normal(size=(len(HOW), V)).astype(np.float32) * 3
    found = filtered(logits, HOW)
    for row, how, out in zip(logits, HOW, found, strict=True):
        kept = oracle(row, how)
        assert 1 <= kept.sum() <= V
        assert (np.isfinite(out) == kept).all(), how
        scaled = (row - row.max()) / how.temperature
        np.testing.assert_allclose(out[kept], scaled[kept], rtol=1e-6, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-4, 4), min_size=12, max_size=12),  # many are equal
    st.integers(0, 14),
    st.sampled_from([0.0, 0.1, 0.5, 0.93, 1.0]),
    st.sampled_from([0.0, 0.2, 1.0]),
)
def test_ties_are_kept_or_removed_together(values, top_k, top_p, min_p):
    how = Sampling(temperature=0.9, top_k=top_k, top_p=top_p, min_p=min_p)
    # One program for all of them: the other rows turn every switch on.
    rows = [how, Sampling(temperature=1.0, top_k=1, top_p=0.5, min_p=0.5)]
    found = filtered(np.array([values, values], np.float32), rows)[0]
    assert (np.isfinite(found) == oracle(np.array(values), how)).all()


def test_numbers_change_nothing_where_they_are_neutral(rng):
    """Rows without top-k, top-p and min-p, in a batch that has them."""
    logits = rng.normal(size=(2, V)).astype(np.float32) * 30  # some probabilities are zero in float32
    found = filtered(logits, [Sampling(temperature=0.5), HOW[-1]])[0]
    assert np.isfinite(found).all()


def test_the_penalty_reads_prompt_and_answer(rng):
    logits = rng.normal(size=(3, V)).astype(np.float32)
    tokens = np.array([[3, 3, 7, -1], [-1, -1, -1, -1], [0, V - 1, V, 5]], np.int32)
    penalty = np.array([1.5, 2.0, 0.5], np.float32)
    wanted = logits.copy()
    for r, row in enumerate(tokens):
        for t in {t for t in row.tolist() if 0 <= t < V}:
            wanted[r, t] *= penalty[r] if wanted[r, t] < 0 else 1 / penalty[r]
    found = sample.penalised(jnp.asarray(logits), jnp.asarray(tokens), jnp.asarray(penalty))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert (np.asarray(found)[1] == logits[1]).all()


def choose(logits: np.ndarray, rows: list[Sampling], label=None, tokens=None) -> np.ndarray:
    switches, values = sample.prepare(rows)
    label = np.zeros(len(rows), np.int32) if label is None else label
    tokens = np.full((len(rows), 1), -1, np.int32) if tokens is None else tokens
    out = sample.choose(jnp.asarray(logits), jnp.asarray(tokens), jnp.asarray(label), values, switches)
    assert out.dtype == jnp.int32
    return np.asarray(out)


def test_temperature_zero_is_greedy_and_the_first_of_equals_wins():
    logits = np.zeros((3, V), np.float32)
    logits[0, [4, 9]] = 1.0
    logits[2, 7] = np.inf
    for rows in ([GREEDY] * 3, [GREEDY, Sampling(temperature=1.0), GREEDY]):
        found = choose(logits, rows)
        assert found[0] == 4
        assert found[2] == 7
    tokens = np.array([[4], [0], [-1]], np.int32)
    assert choose(logits, [Sampling(repetition_penalty=1.1)] * 3, tokens=tokens)[0] == 9


def test_the_smallest_temperature_is_greedy_too(rng):
    logits = rng.normal(size=(2, V)).astype(np.float32) * 1e4
    for tiny in (1e-30, 1e-38):
        assert (choose(logits, [Sampling(temperature=tiny)] * 2) == logits.argmax(-1)).all()


def test_a_row_draws_the_same_alone_and_in_a_batch(rng):
    logits = rng.normal(size=(4, V)).astype(np.float32)
    rows = [Sampling(temperature=1.0, seed=n, top_k=20) for n in (5, 6, 7, 5)]
    label = np.array([3, 3, 4, 3], np.int32)
    together = choose(logits, rows, label)
    for n, how in enumerate(rows):
        assert choose(logits[n : n + 1], [how], label[n : n + 1])[0] == together[n]


def test_draws_are_as_likely_as_they_should_be():
    """A hundred draws a seed, two hundred seeds: each share within 5 standard deviations; none of what is removed."""
    probabilities = np.array([0.4, 0.3, 0.2, 0.1])
    logits = np.tile(np.log(probabilities * 7), (200, 1)).astype(np.float32)
    switches, values = sample.prepare([Sampling(temperature=1.0, top_k=3, seed=n) for n in range(200)])
    tokens = jnp.full((200, 1), -1)

    @jax.jit
    def draws(logits):
        labels = jnp.tile(jnp.arange(100)[:, None], (1, 200))
        return jax.lax.map(lambda label: sample.choose(logits, tokens, label, values, switches), labels)

    found = np.asarray(draws(jnp.asarray(logits)))
    counts = np.bincount(found.reshape(-1), minlength=4) / found.size
    wanted = np.array([4, 3, 2, 0]) / 9
    assert (np.abs(counts - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / found.size)).all(), counts
    # Seeds and labels both matter.
    assert len({tuple(row) for row in found.T.tolist()}) == 200
    assert len({tuple(row) for row in found.tolist()}) == 100


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"seed": 2**32}, "seed"),
    ],
)
def test_numbers_that_are_none_are_refused(bad, what):
    with pytest.raises(InputError, match=what):
        Sampling(**bad)
