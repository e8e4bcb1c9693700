"""Equal values have one name in every process; any other value has another."""

import dataclasses
import enum
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmjax.core.errors import InputError
from mmjax.core.fingerprint import fingerprint


class Color(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = 1


@dataclasses.dataclass(frozen=True)
class Other:
    size: int = 1


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    name: str = "a"
    share: float = 0.1
    parts: tuple = (1, 2)


DIFFERENT = [
    None,
    0,
    False,
    0.0,
    -0.0,
    float("nan"),
    1,
    True,
    1.0,
    "1",
    b"1",
    "",
    b"",
    (),
    ("",),
    ("", ""),
    ("a", "b"),
    ("ab",),
    (("a",), "b"),
    ("a", ("b",)),
    ("a", "bstr c"),
    ("astr b", "c"),
    {},
    {"a": 1},
    {"a": {"b": 1}},
    Color.RED,
    Color.BLUE,
    Path("a"),
    np.dtype("float32"),
    np.zeros(2, np.float32),
    np.zeros(2, np.int32),
    np.zeros((2, 1), np.float32),
    np.array([0, 1], np.float32),
    dataclasses.make_dataclass("Same", [("a", int)])(1),
    dataclasses.make_dataclass("Same", [("b", int)])(1),
    Inner(),
    Inner(2),
    Other(),
    Outer(),
    Outer(Inner(2)),
    Outer(Other()),
    Outer(name="b"),
    Outer(share=0.1 + 1e-17 + 1e-16),
    Outer(parts=(1, 2, 3)),
    Outer(parts=((1, 2), 3)),
]


def test_other_values_have_other_names():
    names = [fingerprint(value) for value in DIFFERENT]
    for (a, one), (b, two) in itertools.combinations(zip(names, DIFFERENT, strict=True), 2):
        assert a != b, (one, two)
    assert fingerprint(1, 2) != fingerprint(12) != fingerprint((1, 2)) != fingerprint(1, 2)


def test_equal_values_have_one_name():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    assert fingerprint(array) == fingerprint(np.asfortranarray(array)) == fingerprint(array[::-1][::-1])
    assert fingerprint(Outer()) == fingerprint(Outer(Inner(1)))


def test_another_process_finds_the_same_name():
    code = (
        "from mmjax.core.fingerprint import fingerprint; from mmjax.tokenizers.resolution import Native; "
        "print(fingerprint('x', {'b': 1, 'a': 2.5}, Native()))"
    )
    environments = [os.environ | {"PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"} for seed in ("1", "2")]
    names = {subprocess.check_output([sys.executable, "-c", code], env=e, text=True) for e in environments}
    assert len(names) == 1
    assert len(names.pop().strip()) == 64


@pytest.mark.parametrize("value", [object(), Inner, lambda: 1, {1, 2}, np.array([object()])])
def test_what_cannot_be_read_is_refused(value):
    with pytest.raises(InputError, match="has no fingerprint"):
        fingerprint(Outer(name=value))
