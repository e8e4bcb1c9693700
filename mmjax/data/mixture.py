"""Several datasets as one: shares that hold at every moment, every document once an epoch, no state to be saved.

Document number n of a mixture is a function of n alone, so the index pass plans over it as over one dataset, any host
can read any document, and a run resumes from its step. Which document number n is: a schedule says which source's turn
it is and how many that source has given before; that number, divided by the source's size, gives the epoch and the
place in the epoch's order; a keyed permutation turns the place into an index.
"""

import array
import dataclasses
import hashlib
import heapq
import math
import operator
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Int

from mmjax.core.errors import InputError
from mmjax.sequence.document import Document

PERIOD = 2**20  # documents after which a schedule by weights starts again, at most: 8 bytes each
ROUNDS = 16  # of the permutation; all orders of two to five documents are then equally frequent (at 8 they are not)
RESERVED = ":~"  # in names: they part name, epoch and the document's own id


class Place(NamedTuple):
    """Where a document of a mixture comes from; epochs count from 0."""

    source: str
    epoch: int
    index: int


class Mixture(Sequence):
    """Documents of several sources, interleaved; random access, the same on every machine.

    After any n documents a source has given n · share of them, less than one document more or less: what is due is
    given in the order of its deadlines, which keeps every share within these bounds (Baruah et al. 1996, Proportionate
    progress, Theorem 2; one processor). An epoch of a source is one pass over it, in an order of its own that depends
    on seed, name and epoch alone: another source or other weights change which turns a source has, not what it gives in
    them. So adding a source keeps every source's own sequence.

    Ids: document "x" of the source "pets" is "pets:x" in the first epoch, "pets~2:x" in the second and so on, which no
    other document of the mixture is called if ids are unique within each source.

    Memory: the schedule's period, two int32 for each document of it. A period has as many documents as the shares'
    common denominator, PERIOD at most; shares with a larger one are rounded to parts of PERIOD (see `shares`, which the
    bound above holds for). With `epochs` nothing is rounded, and a period is the sum of the sizes by their greatest
    common divisor. Nothing is kept for the order in an epoch.

    Args:
      sources: datasets with a length and random access; a length must not change.
      weights: how many documents of each, in proportion. Decimals are taken as they are written: 0.7, 0.2, 0.1 has a
        period of 10.
      names: of the sources, for ids and messages.
      length: of the mixture; sources are begun again as often as it takes.
      epochs: instead of weights and length: so many epochs of every source, mixed in proportion to the sizes.
      seed: of the orders.
      shuffle: False: every epoch in the source's own order.

    Raises:
      InputError: no source, an empty one, names that are blank, taken or hold ":" or "~"; weights that are not above
        zero, or less than a PERIODth of their sum; not exactly one of length and epochs.
    """

    def __init__(
        self,
        sources: Sequence[Sequence],
        weights: Sequence[float | int | Fraction] | None = None,
        *,
        names: Sequence[str],
        length: int | None = None,
        epochs: int | None = None,
        seed: int,
        shuffle: bool = True,
    ):
        if (length is None) == (epochs is None):
            raise InputError(f"A mixture has length={length} and epochs={epochs}; give exactly one of them.")
        if min(n for n in (length, epochs) if n is not None) < 1:
            raise InputError(f"A mixture has length={length} and epochs={epochs}; give at least 1.")
        self.sources, self.names, self.seed, self.shuffle = tuple(sources), tuple(names), seed, shuffle
        _check_names(self.names, len(self.sources))
        self.sizes = tuple(len(source) for source in self.sources)
        for name, size in zip(self.names, self.sizes, strict=True):
            if not size:
                raise InputError(f"Source {name!r} of a mixture has no documents; leave it out.")
        if epochs is None:
            self._parts = _parts(weights, self.names)
            self.length = length
        elif weights is not None:
            raise InputError("A mixture by epochs takes every source whole, in proportion to sizes; leave out weights.")
        else:
            self._parts = _lowest(self.sizes)
            self.length = epochs * sum(self.sizes)
        self._turn, self._given = schedule(self._parts, min(self.length, sum(self._parts)))

    @property
    def shares(self) -> tuple[Fraction, ...]:
        """What part of the documents each source gives, exactly."""
        return tuple(Fraction(part, sum(self._parts)) for part in self._parts)

    def where(self, n: SupportsIndex) -> Place:
        """Which document number n is."""
        source, epoch, index = self._find(n)
        return Place(self.names[source], epoch, index)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, n: SupportsIndex) -> Document:
        source, epoch, index = self._find(n)
        document = self.sources[source][index]
        again = f"~{epoch + 1}" if epoch else ""
        return dataclasses.replace(document, id=f"{self.names[source]}{again}:{document.id}")

    def _find(self, n: SupportsIndex) -> tuple[int, int, int]:
        n = operator.index(n)
        if not 0 <= n < self.length:
            raise IndexError(n)
        cycle, at = divmod(n, sum(self._parts))
        source = int(self._turn[at])
        epoch, index = divmod(cycle * self._parts[source] + int(self._given[at]), self.sizes[source])
        if self.shuffle:
            key = hashlib.blake2b(f"{self.seed}/{epoch}/{self.names[source]}".encode(), digest_size=32).digest()
            index = permute(index, self.sizes[source], key)
        return source, epoch, index


def schedule(parts: Sequence[int], length: int) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """The first `length` turns of a period: whose turn it is, and how many turns it had before.

    parts: turns of each source in a whole period of sum(parts). Its k-th turn (from 0) is due when share · turns
    passes k and must not be later than when it reaches k + 1; of those due, the one with the earliest deadline.
    """
    period = sum(parts)
    turn, given, taken = array.array("i"), array.array("i"), [0] * len(parts)
    waiting, due = [(0, s) for s in range(len(parts))], []
    for n in range(length):
        while waiting and waiting[0][0] <= n:
            _, s = heapq.heappop(waiting)
            deadline = -(-(taken[s] + 1) * period // parts[s])
            heapq.heappush(due, (deadline, s))
        _, s = heapq.heappop(due)
        turn.append(s)
        given.append(taken[s])
        taken[s] += 1
        heapq.heappush(waiting, (taken[s] * period // parts[s], s))
    return np.array(turn, np.int32), np.array(given, np.int32)


def permute(number: int, size: int, key: bytes) -> int:
    """Where a number below `size` goes in a random order of all of them: a permutation, in constant memory.

    A Feistel network on a grid of about √size × √size, walked on from where it leaves the range (Black & Rogaway 2002,
    Ciphers with arbitrary finite domains). NumPy's orders may change with its version; this one must not, for a resumed
    run would see some documents twice.
    """
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    while True:
        column, row = divmod(number, rows)
        for i in range(0, ROUNDS, 2):
            row = (row + _hash(i, column, key)) % rows
            column = (column + _hash(i + 1, row, key)) % columns
        number = column * rows + row
        if number < size:
            return number


def _hash(i: int, value: int, key: bytes) -> int:
    data = hashlib.blake2b(b"%d/%d" % (i, value), key=key, digest_size=8).digest()
    return int.from_bytes(data, "little")


def _check_names(names: tuple[str, ...], sources: int) -> None:
    if not sources or len(names) != sources:
        raise InputError(
            f"A mixture has {sources} sources and {len(names)} names; give at least one, each with a name."
        )
    for name, times in Counter(names).items():
        if times > 1:
            raise InputError(f"{times} sources of a mixture are called {name!r}; give each a name of its own.")
        if not name.strip() or any(c in name for c in RESERVED):
            raise InputError(f"A source of a mixture is called {name!r}; give it a name without ':' and '~'.")


def _parts(weights: Sequence[float | int | Fraction] | None, names: tuple[str, ...]) -> tuple[int, ...]:
    """Turns of each source in a period, from weights."""
    if weights is None or len(weights) != len(names):
        found = "none" if weights is None else len(weights)
        raise InputError(f"A mixture of {len(names)} sources has {found} weights; give one for each.")
    exact = []
    for name, weight in zip(names, weights, strict=True):
        try:
            exact.append(Fraction(str(weight)))  # of what is written: 0.1 is a tenth, and not the nearest binary number
        except ValueError:
            raise InputError(f"Source {name!r} of a mixture has the weight {weight}; give a finite number.") from None
        if exact[-1] <= 0:
            raise InputError(
                f"Source {name!r} of a mixture has the weight {weight}; give a number above 0, or leave the source out."
            )
    whole = sum(exact)
    for name, weight in zip(names, exact, strict=True):
        if weight * PERIOD < whole:
            raise InputError(
                f"Source {name!r} of a mixture has the weight {float(weight):g}, less than a millionth of all; raise "
                f"it, or leave the source out."
            )
    parts = _lowest([weight / whole for weight in exact])
    return parts if sum(parts) <= PERIOD else tuple(round(weight / whole * PERIOD) for weight in exact)


def _lowest(shares: Sequence[int | Fraction]) -> tuple[int, ...]:
    """Whole numbers in the same proportion, as small as they come."""
    scale = math.lcm(*(Fraction(share).denominator for share in shares))
    parts = [int(share * scale) for share in shares]
    return tuple(part // math.gcd(*parts) for part in parts)
