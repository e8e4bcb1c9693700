"""The groups of devices that a collective operation runs among, in all ways in which XLA writes them down."""

import math
import re

import numpy as np


def first(text: str, devices: int) -> tuple[int, ...]:
    """The members of the first group, counted through the program's devices.

    Args:
      text: an operation's attributes, with one of

          replica_groups={{0,1},{2,3}}                                   lists
          replica_groups=[2,4]<=[2,2,2]T(1,0,2)                          2 groups of 4: numbers counted, turned, cut
          replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}                axes of a mesh, or a part of one
          source_target_pairs={{0,1},{1,0}}

      devices: of the program: all of them, where nothing or `{}` is written.
    """
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        sizes = [int(n) for n in found[3].split(",")]
        order = [int(n) for n in found[4].split(",")] if found[4] else range(len(sizes))
        ids = np.arange(math.prod(sizes)).reshape(sizes).transpose(list(order)).reshape(int(found[1]), int(found[2]))
        return tuple(ids[0].tolist())
    if found := re.search(r"replica_groups=@?mesh[\w.]*\[([^\]]*)\](?:, *device_ids=\S+)? *\{([^}]*)\}", text):
        return _of_mesh(found[1], found[2])
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", text):
        return tuple(int(n) for n in found[1].split(","))
    return tuple(range(devices))


def _of_mesh(axes: str, chosen: str) -> tuple[int, ...]:
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
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
