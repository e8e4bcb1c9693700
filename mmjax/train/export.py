"""What a fine-tuning has made, as a Hugging Face directory or as an adapter that peft reads.

python -m mmjax.train export RUN DST --to merged         the whole model
python -m mmjax.train export RUN DST --to adapter        what was trained of it alone
"""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmjax.convert import adapter, huggingface, lazily
from mmjax.convert.model import Model
from mmjax.core import manifest as manifests
from mmjax.core import parts, tree
from mmjax.core.cast import cast
from mmjax.core.checksum import checksums_numpy
from mmjax.core.errors import InputError
from mmjax.models import vlm
from mmjax.nn import lora
from mmjax.train import parameters, start
from mmjax.train.config import Config

To = Literal["merged", "adapter"]
CHECKPOINTS, AVERAGE = "checkpoints", "/average/"


@dataclass(frozen=True)
class Merged:
    """An adapted kernel as one, made layer by layer when it is asked for: core.parts.Lazy."""

    base: Any
    a: np.ndarray
    b: np.ndarray
    scale: np.ndarray
    dtype: np.dtype
    what: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def stacked(self) -> bool:
        return self.scale.ndim > 0

    def __getitem__(self, i: int) -> np.ndarray:
        wide = np.asarray(self.base[i], np.float32)
        return cast(lora.added(wide, self.a[i], self.b[i], self.scale[i]), self.dtype, self.what)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self.stacked:
            return np.stack([self[i] for i in range(len(self.scale))])
        wide = np.asarray(self.base, np.float32)
        return cast(lora.added(wide, self.a, self.b, self.scale), self.dtype, self.what)


def export(run: Path, target: Path, to: To = "merged", step: int | None = None, base: Path | None = None) -> None:
    """Writes a step of a run as a new directory.

    merged: a Hugging Face directory like the one that the run started from; adapters are added to their kernels in
      float32, and every number is rounded once, to the format it has there. adapter: see convert.adapter.save.
    Where the run keeps a running mean of its parameters, that is what is written.

    Args:
      run: where the run is kept (--out).
      target: a directory that is not there yet.
      to: what is written.
      step: the newest, if left out.
      base: where the model is that the run started from, if it was moved.

    Raises:
      InputError: there is no such run or step, it is damaged, or did not start from a model, or that is not there any
        more, or is another one now; or what `to` names refuses it.
    """
    directory = Path(run) / CHECKPOINTS
    manifest = manifests.read_manifest(directory, manifests.newest_step(directory) if step is None else step)
    for problem in manifests.damaged_files(directory / str(manifest["step"]), manifest["files"]):
        raise manifests.Damaged(problem)
    said = manifest["metadata"].get("config", {})
    if not said.get("base"):
        raise InputError(f"{run} did not start from a model whose form it could have; give a fine-tuning's --out.")
    path = Path(base or said["base"])
    model, there = start.opened(path), _leaves(parts.stored(directory, manifest))
    old = tree.flatten(model.params)
    # What no stage trains is the base's, and in no checkpoint.
    whole = {name: there.get(f"{name}/base", there.get(name, leaf)) for name, leaf in old.items()}
    nodes = {name for name in old if f"{name}/a" in there}
    borrowed = {f"{name}/base" if name in nodes else name: leaf for name, leaf in old.items() if whole[name] is leaf}
    if any(tuple(leaf.shape) != tuple(old[name].shape) for name, leaf in whole.items()) or (
        _named(borrowed, said["update.compute"]) != manifest["metadata"].get("borrowed")
    ):
        raise InputError(f"The model in {path} is not the one that {run} started from; put it back, or give its place.")
    if to == "merged":
        params = {name: _merged(name, there, whole[name], old[name].dtype) for name in old}
        huggingface.save(target, Model(model.of, model.cfg, tree.unflatten(params), model.origin))
        return
    moved = [name for name, leaf in old.items() if whole[name] is not leaf]
    changed = [name for name in moved if not np.array_equal(np.asarray(whole[name]), np.asarray(old[name]))]
    there |= {f"{name}/base" if name in nodes else name: leaf for name, leaf in whole.items()}
    params = tree.unflatten(there)
    config = None
    if "lora.rank" in said:
        how = {"rslora": said["lora.rslora"], "dropout": said.get("lora.dropout", 0.0)}
        config = lora.Config(said["lora.rank"], said["lora.alpha"], **how)
    adapted = Model(model.of, model.cfg, params, model.origin)
    adapter.save(target, adapted, base=str(path.absolute()), changed=changed, config=config)


def refuse(cfg: Config) -> None:
    """Raises InputError where what a run is to train is nothing that an adapter of its base could hold."""
    model = start.opened(cfg.base)
    cfg = dataclasses.replace(cfg, model=model.cfg)
    adapted = [] if cfg.lora is None else lora.targets(vlm.spec(cfg.model), cfg.lora)
    moved = {name for name in parameters.trained(parameters.spec(cfg), cfg) if not re.fullmatch(parameters.OWN, name)}
    adapter.refuse(model, adapted, {name.removesuffix("/base") for name in moved})


def _named(borrowed: dict[str, Any], compute: str) -> str:
    """As train.start.borrowed names what a run has of its base, leaf by leaf."""
    sums = {}
    for name, leaf in borrowed.items():
        dtype = "float32" if parameters.wide(name) else compute
        sums |= checksums_numpy({name: cast(np.asarray(leaf), dtype, f"The parameter {name}")})
    return start.name_of(sums)


def _leaves(stored: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a step; their running mean where there is one."""
    out = {name.removeprefix("params/"): leaf for name, leaf in stored.items() if name.startswith("params/")}
    for name, leaf in stored.items():
        if name.startswith("optimizer/") and AVERAGE in name:
            out[name.partition(AVERAGE)[2]] = leaf
    return out


def _merged(name: str, there: dict[str, Any], leaf: Any, dtype: np.dtype) -> Any:
    what = f"The parameter {name}"
    if f"{name}/a" not in there:
        return lazily.Cast(leaf, np.dtype(dtype), what)
    a, b, scale = (np.asarray(there[f"{name}/{part}"]) for part in ("a", "b", "scale"))
    return Merged(leaf, a, b, scale, np.dtype(dtype), what)


def main(arguments: Sequence[str]) -> int:
    """The command; gives its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mmjax.train export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="where a fine-tuning is kept (its --out)")
    parser.add_argument("target", metavar="DST", help="a directory that is not there yet")
    parser.add_argument("--to", choices=("merged", "adapter"), default="merged", help="what it becomes (merged)")
    parser.add_argument("--step", type=int, metavar="N", help="of its checkpoints; otherwise the newest")
    parser.add_argument("--base", type=Path, metavar="DIR", help="where the model is that it started from, if moved")
    given = parser.parse_args(arguments)
    export(Path(given.run), Path(given.target), given.to, given.step, given.base)
    print(given.target)
    return 0
