"""What one operation of a compiled program costs: products, bytes of memory, turns of a loop."""

import json
import math
import re

import numpy as np

from mmjax.core.hlo_text import Computation, Module, Op, Shape

THROUGH = ("bitcast", "reshape", "copy", "convert", "transpose", "fusion", "tuple", "get-tuple-element")


def cycles(op: Op) -> float:
    """The TPU compiler's own estimate; 0 where it made none."""
    found = re.search(r'"estimated_cycles":"(\d+)"', op.rest)
    return float(found[1]) if found else 0.0


def flops(inside: Computation, op: Op) -> float:
    """Multiplications and additions of a product: 2 for every pair of numbers that is multiplied. Else 0."""
    if op.kind == "dot":
        left = inside.shape(op.operands[0]).dims
        inner = _numbers(op, "lhs_contracting_dims")
        return 2.0 * math.prod(op.shape.dims) * math.prod(left[i] for i in inner)
    if op.kind == "convolution":
        return _convolution(inside, op)
    return 0.0


def _numbers(op: Op, name: str) -> list[int]:
    found = re.search(rf"{name}=\{{([\d,]*)\}}", op.rest)
    return [int(n) for n in found[1].split(",") if n] if found else []


def _convolution(inside: Computation, op: Op) -> float:
    """Of places outside of the picture, and between its values, there is no product: TPUs write batches so."""
    left, kernel = (inside.shape(name).dims for name in op.operands[:2])
    names = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest)
    window = dict(re.findall(r"(\w+)=([\w\-]+(?:[x][\w\-]+)*)", (re.search(r"window=\{([^}]*)\}", op.rest) or [""])[0]))
    made = 2.0 * left[names[1].index("b")] * op.shape.dims[names[3].index("f")] * kernel[names[2].index("i")]
    for axis in sorted(c for c in names[1] if c.isdigit()):
        at = int(axis)

        def of(name: str, default: str, at: int = at) -> str:
            return window[name].split("x")[at] if name in window else default

        low = int(of("pad", "0_0").split("_")[0])
        made *= _pairs(
            left[names[1].index(axis)],
            op.shape.dims[names[3].index(axis)],
            kernel[names[2].index(axis)],
            int(of("stride", "1")),
            low,
            int(of("lhs_dilate", "1")),
            int(of("rhs_dilate", "1")),
        )
    groups = re.search(r"batch_group_count=(\d+)", op.rest)
    return made / (int(groups[1]) if groups else 1)


def _pairs(size: int, out: int, kernel: int, stride: int, low: int, between: int, apart: int) -> int:
    """How many places of the output × places of the kernel fall on a value."""
    at = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * apart - low
    return int(((at >= 0) & (at < (size - 1) * between + 1) & (at % between == 0)).sum())


def library(inside: Computation, op: Op, target: str) -> float | None:
    """FLOPs of a call of cuBLAS; None for any other."""
    if "gemm" not in target and "matmul" not in target:
        return None
    found = re.search(r'"dot_dimension_numbers":(\{[^}]*\})', op.rest)
    if not found:
        return None
    left = inside.shape(op.operands[0]).dims
    inner = [int(n) for n in json.loads(found[1])["lhs_contracting_dimensions"]]
    made = op.shape.parts[0] if op.shape.parts else op.shape
    return 2.0 * math.prod(made.dims) * math.prod(left[i] for i in inner)


def moved(module: Module, inside: Computation, op: Op) -> float:
    """Bytes that an operation reads from and writes to main memory: of what it slices, the slice alone."""
    shapes = [inside.shape(name) for name in op.operands]
    if op.kind == "fusion":
        comp = module.computations[op.called[0]]
        parameters = {int(o.inner): o for o in comp.ops.values() if o.kind == "parameter"}
        through = _through_fusion(op) if comp.name.startswith("async_collective_fusion") else {}
        reads = sum(
            _read(module, comp, parameters[i])
            for i, s in enumerate(shapes)
            if s.memory != 0 and i not in through.values()
        )
        return reads + _written(module, comp, comp.root, op.shape, tuple(through))
    if op.kind in ("copy-start", "slice-start", "dynamic-slice-start"):
        made = op.shape.parts[0 if op.kind == "copy-start" else 1]
        return made.memory + (made.bytes if shapes[0].memory else 0.0)
    if op.kind == "dynamic-update-slice-start":
        return shapes[1].memory + (shapes[1].bytes if shapes[0].memory else 0.0)
    if op.kind in ("dynamic-slice", "slice", "gather"):
        return 2 * op.shape.memory
    if op.kind in ("dynamic-update-slice", "scatter"):
        return 2 * shapes[1 if op.kind == "dynamic-update-slice" else -1].memory
    if op.kind in ("iota", "broadcast"):
        return op.shape.memory
    return op.shape.memory + sum(s.memory for s in shapes)


def _through_fusion(op: Op) -> dict[int, int]:
    """Results of a fusion that are operands of it: what a collective beside it works on."""
    _, _, pairs = op.rest.partition("output_to_operand_aliasing=")
    return {int(made): int(given) for made, given in re.findall(r"\{(\d+)\}: \((\d+), \{\}\)", pairs)}


def _read(module: Module, comp: Computation, source: Op) -> float:
    """Bytes that a fusion reads of one of its parameters."""
    whole, out = source.shape.bytes, 0.0
    for user in comp.users.get(source.name, []):
        at = user.operands.index(source.name)
        if user.kind in ("dynamic-slice", "slice", "gather") and at == 0:
            out += user.shape.bytes
        elif user.kind == "dynamic-update-slice" and at == 0:
            continue  # in place: what stays is not read
        elif user.kind == "bitcast":
            out += _read(module, comp, user)
        elif user.kind == "fusion":
            within = module.computations[user.called[0]]
            inner = [o for o in within.ops.values() if o.kind == "parameter" and int(o.inner) == at]
            out += _read(module, within, inner[0]) if inner else whole
        elif user.kind == "tuple" and user.root:
            continue  # handed on
        else:
            return whole
    return min(out, whole)


def _written(module: Module, comp: Computation, op: Op, shape: Shape, but: tuple[int, ...] = ()) -> float:
    """Bytes that a fusion writes of its result, `but` some of its parts."""
    if op.kind == "tuple" and shape.parts:
        each = enumerate(zip(op.operands, shape.parts, strict=True))
        return sum(_written(module, comp, comp.ops[name], part) for i, (name, part) in each if i not in but)
    if shape.memory == 0 or op.kind == "parameter":
        return 0.0
    if op.kind == "dynamic-update-slice":
        return comp.shape(op.operands[1]).bytes
    if op.kind == "fusion":
        within = module.computations[op.called[0]]
        return _written(module, within, within.root, shape)
    if op.kind == "bitcast" and op.operands and op.operands[0] in comp.ops:
        return _written(module, comp, comp.ops[op.operands[0]], shape)
    return shape.memory


def turns(module: Module, inside: Computation, op: Op) -> float | None:
    """How often a loop runs: as the compiler says, or from a constant that its condition compares a counter with."""
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', op.rest):
        return float(found[1])
    condition = module.computations[op.attribute("condition")]
    test = condition.root
    if test.kind == "fusion":
        test = module.computations[test.called[0]].root
    if test.kind != "compare" or test.attribute("direction") not in ("LT", "GT"):
        return None
    # Of a fused comparison the operands are parameters, in the order of the fusion's.
    names = condition.root.operands if condition.root.kind == "fusion" else test.operands
    sides = [_through(condition, name) for name in names]
    bound = next((s for s in sides if s.kind == "constant"), None)
    counter = next((s for s in sides if s.kind == "get-tuple-element"), None)
    if bound is None or counter is None:
        return None
    place = int(counter.attribute("index"))
    start = _start(inside, op, place)
    step = _step(module, op, place)
    if start is None or not step or not re.fullmatch(r"-?\d+", bound.inner):
        return None
    return float(max(0, -(-(int(bound.inner) - start) // step)))


def _through(comp: Computation, name: str) -> Op:
    op = comp.ops[name]
    while op.kind in ("copy", "bitcast", "convert", "copy-done", "copy-start", "reshape") and op.operands:
        op = comp.ops[op.operands[0]]
    return op


def _start(inside: Computation, op: Op, place: int) -> int | None:
    """What a loop's counter starts at."""
    made = _through(inside, op.operands[0])
    if made.kind != "tuple":
        return None
    first = _through(inside, made.operands[place])
    return int(first.inner) if first.kind == "constant" and re.fullmatch(r"-?\d+", first.inner) else None


def _step(module: Module, op: Op, place: int) -> int | None:
    """What a turn adds to a loop's counter."""
    body = module.computations[op.attribute("body")]
    if body.root.kind != "tuple":
        return None
    new = _through(body, body.root.operands[place])
    comp = body
    if new.kind == "fusion":
        comp = module.computations[new.called[0]]
        new = comp.root
    if new.kind not in ("add", "subtract"):
        return None
    sides, sign = [_through(comp, name) for name in new.operands], 1 if new.kind == "add" else -1
    for side in sides:
        if side.kind == "constant":
            return sign * int(side.inner)
        if side.kind == "parameter" and comp is not body:
            outer = _through(body, _through(body, body.root.operands[place]).operands[int(side.inner)])
            if outer.kind == "constant":
                return sign * int(outer.inner)
    return None
