"""The text of a compiled program, taken apart: computations, their operations, shapes."""

import functools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

BITS = {"pred": 8, "token": 0, "opaque": 0, "s4": 4, "u4": 4, "s2": 2, "u2": 2}
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (\(.*\) -> .* )?\{$")
OPERATION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
ARRAY = re.compile(r"([a-z]+[a-z0-9]*)\[([0-9,<=]*)\](\{[^}]*\})?")


@dataclass(frozen=True)
class Shape:
    """Of an array, or of a tuple's parts. chip: it lies in the chip's own memory (VMEM), not in HBM."""

    dtype: str = ""
    dims: tuple[int, ...] = ()
    chip: bool = False
    parts: tuple["Shape", ...] = ()

    @property
    def bytes(self) -> float:
        """All bytes, without what layouts add."""
        if self.parts:
            return sum(p.bytes for p in self.parts)
        return math.prod(self.dims) * bits(self.dtype) / 8

    @property
    def memory(self) -> float:
        """The bytes that lie in the device's main memory."""
        if self.parts:
            return sum(p.memory for p in self.parts)
        return 0.0 if self.chip else self.bytes

    @property
    def last(self) -> "Shape":
        """What an asynchronous operation makes, of (operands, results, …)."""
        return self.parts[1] if len(self.parts) > 1 else self


@functools.cache
def bits(dtype: str) -> int:
    """Bits of a number of this type."""
    if dtype in BITS:
        return BITS[dtype]
    found = re.match(r"[a-z]+(\d+)", dtype)
    return int(found[1]) if found else 0


@dataclass(frozen=True)
class Op:
    """One line: `%name = shape kind(operands), rest`. inner: what stands in the parentheses."""

    name: str
    shape: Shape
    kind: str
    inner: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    def attribute(self, name: str) -> str:
        """The text after `name=`, up to the next comma; "" where there is none."""
        found = re.search(rf"(?:^|[ ,]){name}=%?([^ ,]+)", self.rest)
        return found[1] if found else ""

    @property
    def scope(self) -> str:
        """Where it comes from: the path of functions and named scopes."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def called(self) -> list[str]:
        """Computations that it runs: those of a fusion, a call, the branches of a condition."""
        found = re.search(
            r"(?:calls|to_apply|called_computations|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)", self.rest
        )
        names = found[1] if found else ""
        both = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", self.rest)
        return both or re.findall(r"[\w.\-]+", names)


@dataclass
class Computation:
    """Operations by name, in order."""

    name: str
    ops: dict[str, Op] = field(default_factory=dict)

    def shape(self, name: str) -> Shape:
        return self.ops[name].shape if name in self.ops else Shape()

    @property
    def root(self) -> Op:
        return next((op for op in self.ops.values() if op.root), list(self.ops.values())[-1])

    @functools.cached_property
    def users(self) -> dict[str, list[Op]]:
        out: dict[str, list[Op]] = {}
        for op in self.ops.values():
            for name in dict.fromkeys(op.operands):
                out.setdefault(name, []).append(op)
        return out


@dataclass
class Module:
    """A program."""

    computations: dict[str, Computation]
    entry: str
    devices: int

    def within(self, names: Sequence[str]) -> Iterator[Computation]:
        """These computations and the fusions inside of them."""
        for name in names:
            comp = self.computations[name]
            yield comp
            for op in comp.ops.values():
                if op.kind in ("fusion", "call", "async-start"):
                    yield from self.within(op.called)


def parse(text: str) -> Module:
    """Takes the text of `compiled.as_text()` apart."""
    first = text[: text.find("\n")]
    count = re.search(r"num_partitions=(\d+)", first), re.search(r"replica_count=(\d+)", first)
    computations, current, entry = {}, None, ""
    for line in text.splitlines():
        if line.startswith("}"):
            current = None
        elif current is not None:
            if found := OPERATION.match(line):
                op = _operation(found[2], line[found.end() :], bool(found[1]))
                current.ops[op.name] = op
        elif line.endswith("{") and (found := HEADER.match(line)) and found[3]:
            current = computations[found[2]] = Computation(found[2])
            entry = found[2] if found[1] else entry
    return Module(computations, entry, math.prod(int(c[1]) for c in count if c))


def _operation(name: str, text: str, root: bool) -> Op:
    end = _balanced(text, 0) if text.startswith("(") else text.index(" ")
    shape, text = read_shape(text[:end]), text[end:].lstrip()
    opens = text.index("(")
    closes = _balanced(text, opens)
    inner = text[opens + 1 : closes - 1]
    return Op(name, shape, text[:opens], inner, tuple(re.findall(r"%([\w.\-]+)", inner)), text[closes:], root)


def _balanced(text: str, start: int) -> int:
    """One past the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)


def read_shape(text: str) -> Shape:
    """A shape as it is written: `bf16[8,128]{1,0:T(8,128)S(1)}`, or a tuple of such."""
    if not text.startswith("("):
        found = ARRAY.match(text)
        if not found:
            return Shape(text)
        dims = tuple(int(d.lstrip("<=")) for d in found[2].split(",") if d)
        return Shape(found[1], dims, "S(1)" in (found[3] or ""))
    parts, depth, begin = [], 0, 1
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if (c == "," and depth == 1) or (depth == 0 and i):
            part = re.sub(r"/\*.*?\*/", "", text[begin:i]).strip()
            parts += [read_shape(part)] if part else []
            begin = i + 1
    return Shape(parts=tuple(parts))
