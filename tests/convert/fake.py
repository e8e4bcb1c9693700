"""A small family of no library: two stacked layers, a joined tensor, a dropped one, and directories of it."""

import json
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mmjax.convert import huggingface, rules
from mmjax.convert.found import Found
from mmjax.convert.rules import Rule
from mmjax.core.spec import ParamSpec, stack
from mmjax.nn import linear

CONFIG = {"model_type": "fake", "layers": 2, "width": 4, "dtype": "float32", "auto_map": {"AutoModel": "evil.Model"}}


def spec(cfg: tuple[int, int]) -> dict:
    layers, width = cfg
    layer = {name: linear.spec(linear.Config(width, width)) for name in ("q", "k", "out")}
    return {"blocks": stack(layer, layers), "table": ParamSpec((3, width), (None, "embed"))}


def read(raw: dict, keys: frozenset[str]) -> Found:
    table = [
        *(Rule(f"blocks/{n}/kernel", "layers.{}.qk.weight", rules.linear(), join=0) for n in "qk"),
        *(Rule(f"blocks/{n}/bias", "layers.{}.qk.bias", join=0) for n in "qk"),
        Rule("blocks/out/kernel", "layers.{}.out.weight", rules.linear()),
        Rule("blocks/out/bias", "layers.{}.out.bias"),
        Rule("table", "table.weight"),
    ]
    return Found(MODULE, (raw["layers"], raw["width"]), tuple(table), {"position_ids": "positions 0, 1, 2 …"})


MODULE = types.ModuleType("mmjax.convert.families.fake")
MODULE.spec, MODULE.read = spec, read


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(huggingface.FAMILIES, "fake", "fake")
    monkeypatch.setitem(sys.modules, "mmjax.convert.families.fake", MODULE)


def tensors(dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = rules.plan(spec((2, 4)), read(CONFIG, frozenset()).rules).tensors
    out = {key: rng.normal(size=shape).astype(dtype) for key, shape in shapes.items()}
    return out | {"position_ids": np.arange(3)[None]}


def write(
    path: Path, given: dict[str, np.ndarray] | None = None, *, shards: int = 1, config: dict | None = None
) -> Path:
    """As save_pretrained does it."""
    path.mkdir(exist_ok=True)
    given = tensors() if given is None else given
    (path / "config.json").write_text(json.dumps(CONFIG if config is None else config, indent=2, sort_keys=True) + "\n")
    if shards == 1:
        save_file(given, path / "model.safetensors", metadata={"format": "pt"})
        return path
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    placed = {key: names[i % shards] for i, key in enumerate(given)}
    for name in names:
        save_file({k: given[k] for k, n in placed.items() if n == name}, path / name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(x.nbytes for x in given.values())}, "weight_map": placed}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return path


def raw(header: bytes | dict | str, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of any header."""
    if isinstance(header, dict):
        header = json.dumps(header)
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header) if length is None else length) + header + data
