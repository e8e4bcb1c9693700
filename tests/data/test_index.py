import re

import numpy as np
import pytest

from mmjax.core.errors import InputError
from mmjax.data import index
from mmjax.sequence.batch import Bucket
from mmjax.sequence.document import Document, Text
from mmjax.sequence.layout import Layout

TOKENS, ROWS, WINDOW = 64, 3, 40


@pytest.fixture(autouse=True)
def window(monkeypatch):
    monkeypatch.setattr(index, "WINDOW", WINDOW)


class Documents(list):
    """Documents of random sizes: text alone, one picture, three pictures."""

    def __init__(self, n, seed=0):
        rng = np.random.default_rng(seed)
        pictures = rng.choice([0, 1, 3], n)
        patches = pictures * rng.integers(3, 9, n)
        self.sizes = np.stack([patches + rng.integers(4, 16, n), patches, pictures, 0 * patches, 0 * patches], 1)
        super().__init__(Document(str(i), (Text("a"),)) for i in range(n))

    def layout(self, document):
        return Layout(document.id, (), *self.sizes[int(document.id)].tolist())


def training(documents, steps, k=2, seed=0):
    return index.training(documents, documents.layout, steps=steps, k=k, tokens=TOKENS, rows=ROWS, seed=seed)


def most_steps(documents, k=2):
    """How many steps the documents fill, as the error says."""
    with pytest.raises(InputError, match=rf"documents fill \d+ steps of {ROWS} rows . {TOKENS} tokens") as error:
        training(documents, 10**6, k)
    assert "not 1000000" in str(error.value)
    return int(re.search(r"fill (\d+) steps", str(error.value))[1])


def used(plan):
    return [n for step in plan.steps for row in step.rows for n in row]


def check_rows_and_fill(plan, documents):
    """Every row fits its bucket; the fills are what a recount gives."""
    room = filled = np.zeros(5)
    for step in plan.steps:
        bucket = plan.buckets[step.bucket]
        assert len(step.rows) <= bucket.rows == ROWS
        for row in step.rows:
            assert row
            assert (documents.sizes[list(row)].sum(0) <= bucket.row).all()
            filled = filled + documents.sizes[list(row)].sum(0)
        room = room + np.multiply(bucket.row, ROWS)
    np.testing.assert_allclose((plan.fill_tokens, plan.fill_patches), (filled[:2] / room[:2]))
    assert plan.fill == pytest.approx(2 / (1 / plan.fill_tokens + 1 / plan.fill_patches))
    assert {step.bucket for step in plan.steps} == set(range(len(plan.buckets)))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_training_uses_every_document_once_until_the_last_step(k):
    documents = Documents(230)
    steps = most_steps(documents, k)
    plan = training(documents, steps, k)
    assert len(plan.steps) == steps
    assert 1 <= len(plan.buckets) <= k
    assert all(len(step.rows) == ROWS for step in plan.steps)
    check_rows_and_fill(plan, documents)
    numbers = used(plan)
    assert len(numbers) == len(set(numbers))
    # What is left over are rows that fill no step: fewer than ROWS in each bucket.
    left = sorted(set(range(230)) - set(numbers))
    assert documents.sizes[left, 0].sum() <= k * (ROWS - 1) * TOKENS
    assert plan.fill_tokens > 0.75


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_exactly_as_many_steps_as_asked_for(steps):
    documents = Documents(230)
    plan = training(documents, steps)
    assert len(plan.steps) == steps
    assert len(used(plan)) == len(set(used(plan)))
    check_rows_and_fill(plan, documents)


def test_a_bucket_that_no_step_uses_is_left_out():
    """Every other document is a large picture, which shares no row with the long texts between."""
    documents = Documents(230)
    documents.sizes[::2], documents.sizes[1::2] = (50, 0, 0, 0, 0), (50, 40, 1, 0, 0)
    plans = [training(documents, 1, seed=seed) for seed in range(6)]
    assert all(len(plan.buckets) == 1 and plan.steps[0].bucket == 0 for plan in plans)
    assert len({plan.buckets for plan in plans}) == 2
    assert len(training(documents, 9).buckets) == 2
    assert {plan.fill_tokens for plan in plans} == {50 / TOKENS}


def test_buckets_that_are_given_are_taken():
    documents = Documents(230)
    fixed = (Bucket(ROWS, TOKENS, 24, 3), Bucket(ROWS, TOKENS, 40, 5))
    of = {"steps": 8, "k": 1, "tokens": TOKENS, "rows": ROWS, "seed": 0}
    plan = index.training(documents, documents.layout, fixed=fixed, **of)
    assert plan.buckets == fixed
    check_rows_and_fill(plan, documents)
    with pytest.raises(InputError, match="fits none of the buckets"):
        index.training(documents, documents.layout, fixed=(Bucket(ROWS, TOKENS, 8, 2),), **of)


def test_windows_come_in_order_and_nothing_waits_for_ever():
    """What waits for a next window is a quarter of one at most, and goes with it."""
    documents = Documents(230)
    plan = training(documents, most_steps(documents))
    latest = [max(n // WINDOW for row in step.rows for n in row) for step in plan.steps]
    assert np.corrcoef(latest, np.arange(len(latest)))[0, 1] > 0.9
    late = set(range(3 * WINDOW)) - set(used(plan))  # in rows that filled no step
    assert len(late) < 0.05 * 3 * WINDOW
    mixed = [row for step in plan.steps for row in step.rows if len({n // WINDOW for n in row}) > 1]
    assert mixed


def test_windows_that_wait_for_each_other_fill_better(monkeypatch):
    documents = Documents(1000)
    fills = []
    for keep in (4, 10**6):
        monkeypatch.setattr(index, "KEEP", keep)
        fills.append(training(documents, most_steps(documents)).fill)
    assert fills[0] > fills[1] + 0.02


def test_the_largest_document_may_come_later():
    """The shapes are chosen from a sample, but they hold what the config says may come."""
    documents = Documents(200)
    documents.sizes[150] = (60, 58, 3, 0, 0)
    with pytest.raises(InputError, match=r"number 150 .*58 patches.*fits none"):
        training(documents, 10**6)
    plan = index.training(documents, documents.layout, steps=20, k=2, tokens=TOKENS, rows=ROWS, seed=0, patches=58)
    assert max(b.patches for b in plan.buckets) >= 58


@pytest.mark.parametrize("n", [1, 3, 95, 230])
def test_an_epoch_uses_every_document_exactly_once(n):
    documents = Documents(n)
    plan = training(documents, None)
    assert sorted(used(plan)) == list(range(n))
    short = [step.bucket for step in plan.steps if len(step.rows) < ROWS]
    assert len(short) == len(set(short))
    check_rows_and_fill(plan, documents)


def test_table_tells_what_will_be_compiled():
    plan = training(Documents(230), 9)
    table = plan.table()
    assert len(table.splitlines()) == len(plan.buckets) + 2
    for bucket, steps in zip(plan.buckets, plan.steps_of, strict=True):
        assert f"{ROWS} × {TOKENS}, {bucket.patches}, {bucket.images}, 0" in table
        assert f" {steps} " in table
    assert f"{len(plan.buckets)} programs to compile; expected fill {plan.fill:.1%}" in table
    assert sum(plan.steps_of) == 9


def test_later_documents_do_not_change_earlier_steps():
    few, many = Documents(230), Documents(230)
    many.extend(Document(str(i), (Text("a"),)) for i in range(100))
    assert training(few, 9) == training(many, 9)


def test_deterministic_and_shuffled_by_the_seed():
    documents = Documents(230)
    one, again, other = (training(documents, 9, seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert one.steps != other.steps
    assert one.buckets == other.buckets


def test_the_order_of_steps_is_the_same_in_every_version():
    """A resumed run would otherwise see documents twice; NumPy's own orders may change."""
    documents = Documents(0)
    documents.sizes = np.tile([TOKENS, 0, 0, 0], (120, 1))  # a row each, packed in order
    documents.extend(Document(str(i), (Text("a"),)) for i in range(120))
    rows = [step.rows for step in training(documents, 30, k=1, seed=7).steps]
    assert rows[:3] == [((1,), (18,), (10,)), ((15,), (0,), (13,)), ((4,), (20,), (24,))]


def test_no_more_is_measured_than_is_needed():
    documents, measured = Documents(230), []

    def layout(document):
        measured.append(int(document.id))
        return documents.layout(document)

    index.training(documents, layout, steps=1, k=2, tokens=TOKENS, rows=ROWS, seed=0)
    assert measured == list(range(WINDOW))


def test_too_few_documents():
    assert most_steps(Documents(4)) == 0
    assert most_steps(Documents(0)) == 0
    documents = Documents(120)
    steps = most_steps(documents)
    with pytest.raises(InputError, match=f"^120 documents fill {steps} steps .* not {steps + 1};"):
        training(documents, steps + 1)


@pytest.mark.parametrize("plan", [training, lambda documents, steps: once(documents)])
def test_document_longer_than_a_row(plan):
    documents = Documents(100)
    documents.sizes[30] = (TOKENS + 1, 5, 1, 0, 0)
    with pytest.raises(InputError, match=r"number 30 \('.*'\) takes 65 tokens"):
        plan(documents, 3)


def test_document_of_a_later_window_that_fits_nowhere_is_named():
    documents = Documents(200)
    documents.sizes[3 * WINDOW + 5] = (TOKENS + 1, 5, 1, 0, 0)
    with pytest.raises(InputError, match=f"number {3 * WINDOW + 5} "):
        training(documents, 10**6)


class Words:
    """Documents of words; a word takes as many tokens as it has letters, and every document two more."""

    def __init__(self, n, seed=0):
        rng = np.random.default_rng(seed)
        words = [[Text("a" * int(k)) for k in rng.integers(1, 30, rng.integers(1, 8))] for _ in range(n)]
        self.documents = [Document(str(i), tuple(w)) for i, w in enumerate(words)]

    def layout(self, document):
        return Layout(document.id, (), 2 + sum(len(s.text) for s in document.spans), 0, 0)


def test_documents_longer_than_a_row_are_split_if_asked():
    words = Words(150)
    options = {"steps": None, "k": 2, "tokens": TOKENS, "rows": ROWS, "seed": 0}
    with pytest.raises(InputError, match=r"number \d+ \(.*\) takes \d+ tokens"):
        index.training(words.documents, words.layout, **options)
    plan = index.training(words.documents, words.layout, long="split", **options)
    long = [d for d in words.documents if words.layout(d).tokens > TOKENS]
    assert 20 < len(long) < 100
    numbers = used(plan)
    assert len(numbers) == len(set(numbers))
    found = [plan.document(words.documents, n) for n in numbers]
    assert all(words.layout(d).tokens <= TOKENS for d in found)
    # Every document's spans, in order, once.
    spans = {}
    for d in sorted(found, key=lambda d: [int(x) for x in d.id.split("#")]):
        spans.setdefault(d.id.split("#")[0], []).extend(d.spans)
    assert spans == {d.id: list(d.spans) for d in words.documents}
    for step in plan.steps:
        for row in step.rows:
            assert sum(words.layout(plan.document(words.documents, n)).tokens for n in row) <= TOKENS


def once(documents):
    return index.once(documents, documents.layout, tokens=TOKENS, rows=ROWS)


@pytest.mark.parametrize("n", [1, 5, 130])
def test_once_covers_every_document_exactly_once(n):
    documents = Documents(n, seed=3)
    plan = once(documents)
    assert sorted(used(plan)) == list(range(n))
    assert len(plan.buckets) == 1
    assert [len(step.rows) for step in plan.steps[:-1]] == [ROWS] * (len(plan.steps) - 1)
    assert plan == once(documents)
    room = np.multiply(plan.buckets[0].row, ROWS * len(plan.steps))
    np.testing.assert_allclose((plan.fill_tokens, plan.fill_patches), documents.sizes.sum(0)[:2] / room[:2])
    for step in plan.steps:
        for row in step.rows:
            assert (documents.sizes[list(row)].sum(0) <= plan.buckets[0].row).all()


def test_once_in_a_shape_that_is_known():
    """Several plans of one shape run one program; rows are the shape's."""
    every = Documents(60, seed=3)
    shape = once(every).buckets[0]
    few = Documents(7, seed=3)
    plan = index.once(few, few.layout, tokens=TOKENS, rows=ROWS, shape=shape)
    assert plan.buckets == (shape,)
    assert sorted(used(plan)) == list(range(7))
    assert once(few).buckets != (shape,)
    for rows, tokens in ((2, 40), (5, 300)):
        given = Bucket(rows, tokens, 60, 6)
        plan = index.once(few, few.layout, tokens=TOKENS, rows=ROWS, shape=given)
        assert plan.buckets == (given,)
        assert sorted(used(plan)) == list(range(7))
        for step in plan.steps:
            assert len(step.rows) <= rows
            assert all((few.sizes[list(row)].sum(0) <= given.row).all() for row in step.rows)
    assert len(plan.steps) == 1  # all seven in a row of 300


@pytest.mark.parametrize(("dimension", "says"), [(0, "tokens"), (1, "patches"), (2, "pictures|images")])
def test_once_refuses_what_does_not_fit_the_shape(dimension, says):
    documents = Documents(7, seed=3)
    room = documents.sizes.max(0)
    shape = Bucket(ROWS, *room.tolist())
    index.once(documents, documents.layout, tokens=TOKENS, rows=ROWS, shape=shape)
    documents.sizes[4] = room
    documents.sizes[4, dimension] += 1
    with pytest.raises(InputError, match=rf"number 4 .*({says})"):
        index.once(documents, documents.layout, tokens=TOKENS, rows=ROWS, shape=shape)


def test_once_refuses_nothing_at_all():
    with pytest.raises(InputError, match="no document"):
        once(Documents(0))


def test_fill_of_text_alone_is_that_of_its_tokens():
    documents = Documents(20)
    documents.sizes[:, 0] -= documents.sizes[:, 1]
    documents.sizes[:, 1:] = 0
    plan = once(documents)
    assert plan.fill_patches == 0
    assert plan.fill == plan.fill_tokens > 0


def test_measure():
    documents = Documents(9)
    np.testing.assert_array_equal(index.measure(documents, range(2, 6), documents.layout), documents.sizes[2:6])
    assert index.measure(documents, range(0), documents.layout).shape == (0, 5)
