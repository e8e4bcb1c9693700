"""The groups of devices that a collective operation runs among, in all ways in which XLA writes them down."""

import math
import re

import numpy as np

IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # numbers counted, laid out in these sizes, and turned
MESH = re.compile(r"replica_groups=@?mesh[\w.]*\[([^\]]*)\](?:, *device_ids=\(([^{]*)\))? *\{([^}]*)\}")


def first(text: str, devices: int) -> tuple[int, ...]:
    """The members of the first group, counted through the program's devices.

    Args:
      text: an operation's attributes, with one of

          replica_groups={{0,1},{2,3}}                                   lists
          replica_groups=[2,4]<=[2,2,2]T(1,0,2)                          2 groups of 4: numbers counted, turned, cut
          replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}                axes of a mesh, or a part of one
          replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}     of a mesh whose devices are turned
          source_target_pairs={{0,1},{1,0}}

      devices: of the program: all of them, where nothing or `{}` is written.
    """
    if found := re.search(rf"replica_groups=\[(\d+),(\d+)\]<={IOTA}", text):
        return tuple(_iota(found[3], found[4]).reshape(int(found[1]), int(found[2]))[0].tolist())
    if found := MESH.search(text):
        return _of_mesh(found[1], found[2], found[3])
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", text):
        return tuple(_numbers(found[1]))
    return tuple(range(devices))


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _iota(sizes: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return ids.transpose(_numbers(order)) if order else ids


def _of_mesh(axes: str, order: str | None, chosen: str) -> tuple[int, ...]:
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", axes)}
    turned = re.fullmatch(IOTA, order) if order else None
    if turned:
        ids = _iota(turned[1], turned[2])
    else:
        ids = np.array(_numbers(order) if order else range(math.prod(sizes.values())))
    ids = ids.reshape(tuple(sizes.values()))
    at: list[slice | int] = [0] * len(sizes)
    picked = {}
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen):
        # A part of an axis: `before` × size × the rest.
        picked[name] = (int(before or 1), int(size or sizes[name]))
    for i, (name, n) in enumerate(sizes.items()):
        if name in picked:
            before, size = picked[name]
            rest = n // (before * size)
            at[i] = slice(0, size * rest, rest)
    return tuple(int(x) for x in np.ravel(ids[tuple(at)]))
