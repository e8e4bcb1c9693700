import math
import os
import subprocess
import sys
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest

from mmjax.core.errors import InputError
from mmjax.data import mixture
from mmjax.data.mixture import Mixture, Place, permute
from mmjax.sequence.document import Document, Text


def source(n):
    return [Document(str(i), (Text("a"),)) for i in range(n)]


SIZES = {"pets": 7, "maps": 20, "signs": 3}


def mixed(weights=(5, 3, 2), sizes=SIZES, seed=0, **of):
    if "epochs" not in of:
        of = {"length": 500} | of
    return Mixture([source(n) for n in sizes.values()], weights, names=tuple(sizes), seed=seed, **of)


def deviation(mixture, n):
    """The largest distance of a source's count from its share of a prefix, over all prefixes and sources."""
    counts, worst = dict.fromkeys(mixture.names, 0), Fraction(0)
    shares = dict(zip(mixture.names, mixture.shares, strict=True))
    for i in range(n):
        counts[mixture.where(i).source] += 1
        worst = max(worst, *(abs(counts[name] - (i + 1) * shares[name]) for name in counts))
    return worst


@pytest.mark.parametrize(
    "weights",
    [
        (1,),
        (1, 1),
        (0.7, 0.2, 0.1),
        (1, 1, 1, 1, 1, 1, 1),
        (1000, 1, 1, 1, 1),
        (math.pi, math.e, 1.0, 1e-3),
        (Fraction(1, 3), Fraction(2, 3)),
        (1033, 2336, 62000),
    ],
)
def test_shares_hold_at_every_prefix(weights):
    made = Mixture(
        [source(5)] * len(weights), weights, names=[f"s{i}" for i in range(len(weights))], length=9000, seed=0
    )
    assert sum(made.shares) == 1
    assert deviation(made, 2500) < 1
    given = np.array([float(w) for w in weights])
    np.testing.assert_allclose([float(s) for s in made.shares], given / given.sum(), atol=1e-6)


def test_shares_hold_for_many_random_weights(rng):
    for _ in range(60):
        parts = [int(p) for p in rng.integers(1, 40, rng.integers(2, 12))]
        turn, given = mixture.schedule(parts, sum(parts))
        counts = np.cumsum(turn[:, None] == np.arange(len(parts)), 0)
        due = np.outer(np.arange(1, len(turn) + 1), parts)
        assert (abs(counts * sum(parts) - due) < sum(parts)).all()
        assert counts[-1].tolist() == parts
        for s in range(len(parts)):
            assert given[turn == s].tolist() == list(range(parts[s]))


def test_written_decimals_have_a_short_period():
    assert mixed((0.7, 0.2, 0.1)).shares == (Fraction(7, 10), Fraction(1, 5), Fraction(1, 10))
    assert len(mixed((0.7, 0.2, 0.1))._turn) == 10


def test_a_longer_mixture_begins_like_a_shorter_one(monkeypatch):
    """Also where the shares were rounded, and the schedule is as long as the shorter one only."""
    monkeypatch.setattr(mixture, "PERIOD", 64)
    for weights, period in (((5, 3, 2), 10), ((math.pi, math.e, 1), 29 + 25 + 9)):
        short, long = mixed(weights, length=50), mixed(weights, length=400)
        assert [short.where(n) for n in range(50)] == [long.where(n) for n in range(50)]
        turns = [long.where(n).source for n in range(400)]
        assert turns[period:] == turns[:-period]
        assert len(long._turn) == period


def epochs_of(made):
    """The indices that each source gave in each epoch, in order."""
    out = defaultdict(lambda: defaultdict(list))
    for n in range(len(made)):
        place = made.where(n)
        out[place.source][place.epoch].append(place.index)
    return out


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_document_once_an_epoch_before_any_comes_again(shuffle):
    made = mixed(shuffle=shuffle)
    for name, epochs in epochs_of(made).items():
        assert list(epochs) == list(range(len(epochs)))  # one after the other
        for epoch, indices in epochs.items():
            whole = epoch < len(epochs) - 1
            assert len(indices) == SIZES[name] if whole else len(indices) <= SIZES[name]
            assert len(set(indices)) == len(indices)
            assert shuffle or indices == list(range(len(indices)))
        orders = {tuple(indices) for indices in list(epochs.values())[:-1]}
        assert len(orders) > min(5, len(epochs) // 2) if shuffle else len(orders) == 1


def test_whole_epochs_of_everything():
    made = mixed(None, epochs=3)
    assert len(made) == 3 * 30
    assert made.shares == (Fraction(7, 30), Fraction(2, 3), Fraction(1, 10))
    assert deviation(made, 90) < 1
    for name, epochs in epochs_of(made).items():
        assert [sorted(indices) for indices in epochs.values()] == [list(range(SIZES[name]))] * 3
    # Nothing of the second epoch before the first is over.
    assert [made.where(n).epoch for n in range(90)] == [0] * 30 + [1] * 30 + [2] * 30


def test_ids_are_unique_over_sources_and_epochs():
    made = mixed(None, epochs=3)
    ids = [made[n].id for n in range(len(made))]
    assert len(set(ids)) == 90
    for n, id in enumerate(ids):
        name, epoch, index = made.where(n)
        assert id == f"{name}{'' if epoch == 0 else f'~{epoch + 1}'}:{index}"
    assert Counter(id.split(":")[0] for id in ids)["maps~3"] == 20


def test_mixtures_of_mixtures_have_unique_ids():
    inner = mixed(None, epochs=2)
    outer = Mixture([inner, source(5)], names=("inner", "other"), epochs=2, seed=1)
    ids = {outer[n].id for n in range(len(outer))}
    assert len(ids) == len(outer) == 2 * 65
    assert "inner~2:pets~2:3" in ids


def test_documents_are_the_sources_own():
    documents = [Document("x", (Text("one"),)), Document("y", (Text("two"),))]
    made = Mixture([documents], names=("s",), epochs=1, seed=0)
    assert {(d.id, d.spans) for d in made} == {(f"s:{d.id}", d.spans) for d in documents}


def test_access_in_any_order_gives_the_same(rng):
    made = mixed()
    forwards = [made.where(n) for n in range(len(made))]
    for n in rng.permutation(len(made)):
        assert made.where(n) == forwards[n]
        assert made[n].id.endswith(f":{forwards[n].index}")
    assert isinstance(forwards[0], Place)
    for n in (-1, len(made)):
        with pytest.raises(IndexError):
            made[n]


def test_the_seed_decides_the_order():
    one, again, other = ([mixed(seed=seed).where(n) for n in range(500)] for seed in (0, 0, 1))
    assert one == again
    assert one != other
    assert [p.source for p in one] == [p.source for p in other]


PRINT = """
from mmjax.data.mixture import Mixture
from mmjax.sequence.document import Document, Text
made = Mixture([[Document(str(i), (Text("a"),)) for i in range(n)] for n in (7, 20, 3)], (5, 3, 2),
               names=("pets", "maps", "signs"), length=500, seed=0)
print(*[document.id for document in made])
"""


def test_another_process_gives_the_same():
    env = os.environ | {"PYTHONHASHSEED": "12345", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", PRINT], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [document.id for document in mixed()]


def test_the_order_is_one_for_ever():
    """A resumed run depends on it: a new version must not change it."""
    assert [permute(n, 10, bytes(32)) for n in range(10)] == [1, 3, 4, 5, 7, 0, 2, 6, 8, 9]
    assert [mixed()[n].id for n in range(6)] == ["pets:4", "maps:9", "pets:6", "signs:0", "pets:5", "maps:2"]


def test_another_source_changes_turns_but_no_sequence():
    sizes = SIZES | {"sounds": 11}
    before, after = mixed(), mixed((1, 3, 2, 4), sizes, length=1500)
    for name in SIZES:
        a, b = ([p for n in range(len(m)) if (p := m.where(n)).source == name] for m in (before, after))
        both = min(len(a), len(b))
        assert both > 90
        assert a[:both] == b[:both]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 100, 1000])
def test_permutations(size):
    for key in (b"a" * 32, b"b" * 32):
        assert sorted(permute(n, size, key) for n in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_orders_are_equally_frequent(size):
    times = 60 * math.factorial(size)
    found = Counter(tuple(permute(n, size, epoch.to_bytes(8, "little")) for n in range(size)) for epoch in range(times))
    assert len(found) == math.factorial(size)
    free = len(found) - 1
    square = sum((count - 60) ** 2 / 60 for count in found.values())
    assert square < free + 3.1 * math.sqrt(2 * free) + 5  # beyond this by chance: one in a thousand, at most


def test_large_orders_are_spread():
    """Neighbours end up anywhere: as far apart as two random places, and the same epoch after epoch."""
    size = 10**6 + 3
    found = np.array([permute(n, size, b"k") for n in range(2000)])
    assert len(set(found)) == 2000
    assert abs(found.mean() / size - 1 / 2) < 0.02
    assert abs(np.abs(np.diff(found)).mean() / size - 1 / 3) < 0.02
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.08


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weights": (5, 3, 0)}, r"'signs' .* weight 0; give a number above 0"),
        ({"weights": (5, -3, 1)}, r"'maps' .* weight -3"),
        ({"weights": (5, math.nan, 1)}, r"'maps' .* weight nan; give a finite"),
        ({"weights": (math.inf, 3, 1)}, r"'pets' .* weight inf"),
        ({"weights": (5, 3)}, "3 sources has 2 weights"),
        ({"weights": None}, "3 sources has none weights"),
        ({"weights": (1, 1, 1e-9)}, r"'signs' .* weight 1e-09, less than a millionth"),
        ({"sizes": SIZES | {"maps": 0}}, "'maps' of a mixture has no documents"),
        ({"sizes": {}, "weights": ()}, "0 sources"),
        ({"sizes": {"a": 3, "b:c": 4}, "weights": (1, 1)}, "called 'b:c'"),
        ({"sizes": {"a": 3, "b~2": 4}, "weights": (1, 1)}, "called 'b~2'"),
        ({"sizes": {"a": 3, " ": 4}, "weights": (1, 1)}, "called ' '"),
        ({"length": 0}, "length=0"),
        ({"epochs": -1, "weights": None}, "epochs=-1"),
        ({"length": None}, "exactly one"),
        ({"length": 5, "epochs": 1}, "exactly one"),
        ({"epochs": 1}, "leave out weights"),
    ],
)
def test_refusals(change, says):
    with pytest.raises(InputError, match=says) as error:
        mixed(**change)
    assert str(error.value).count("\n") == 0


def test_names_are_one_each():
    for names, says in ((("a", "a"), "2 sources of a mixture are called 'a'"), (("a",), "2 sources and 1 names")):
        with pytest.raises(InputError, match=says):
            Mixture([source(2), source(3)], (1, 1), names=names, length=5, seed=0)
