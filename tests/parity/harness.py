"""How every comparison with a reference implementation is made: random twins, float64 as the truth, one allowance.

A system is a function that gets a `Compare` and hands it pairs of tensors. `test_modules.py` runs each as a test,
`python -m tests.parity.report` prints them all as a table.
"""

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from mmjax.core import tree

VALUE, GRADIENT = 1e-5, 1e-4
SYSTEMS: dict[str, Callable[["Compare"], None]] = {}


def system(name: str) -> Callable:
    """Registers a comparison under the system's name."""

    def register(f: Callable[["Compare"], None]) -> Callable[["Compare"], None]:
        assert name not in SYSTEMS, name
        SYSTEMS[name] = f
        return f

    return register


@dataclass
class Compare:
    """Collects how far ours is from the reference, as a share of what is allowed."""

    system: str
    rows: list[tuple[str, float, float]] = field(default_factory=list)  # tensor, error, allowance

    def value(self, name: str, ours: Any, single: Any, double: Any) -> None:
        """Ours against the reference run in float64; allowed is 1e-5, or 4 times what its float32 loses.

        Errors are the largest difference over the root mean square of the tensor.
        """
        ours, single, double = (np.asarray(x, np.float64) for x in (ours, single, double))
        assert ours.shape == double.shape, f"{name}: ours is {ours.shape}, the reference {double.shape}"
        scale = np.sqrt(np.square(double).mean())
        assert scale > 0, f"{name} is all zeros in the reference: this compares nothing"
        error = np.abs(ours - double).max() / scale
        self.rows.append((name, float(error), max(VALUE, 4 * float(np.abs(single - double).max() / scale))))

    def gradients(self, ours: dict, double: dict) -> None:
        """Gradients by every parameter, as trees of ours; `double` are the reference's, computed in float64.

        A gradient that is zero in exact arithmetic (a bias of keys: softmax does not see it) is a sum of terms that
        cancel, and its rounding has their size, not its own: it is measured against the median leaf. (In the
        reference it is no exact zero either: transformers takes its softmax in float32 whatever the model's precision.)
        """
        ours, double = ({k: np.asarray(x, np.float64) for k, x in tree.flatten(t).items()} for t in (ours, double))
        assert ours.keys() == double.keys(), sorted(ours.keys() ^ double.keys())
        scales = {k: np.sqrt(np.square(x).mean()) for k, x in double.items()}
        median = np.median([s for s in scales.values() if s > 0])
        for k, x in double.items():
            assert ours[k].shape == x.shape, f"{k}: ours is {ours[k].shape}, the reference {x.shape}"
            scale = scales[k] if scales[k] > 1e-5 * median else median
            self.rows.append((f"d {k}", float(np.abs(ours[k] - x).max() / scale), GRADIENT))

    @property
    def worst(self) -> tuple[str, float]:
        """The tensor with the largest error over its allowance, and that ratio."""
        return max(((name, error / allowed) for name, error, allowed in self.rows), key=lambda row: row[1])

    def check(self) -> None:
        """Fails where any error is over its allowance."""
        assert self.rows
        over = [f"{n}: {e:.2e} of {a:.2e}" for n, e, a in self.rows if not e <= a]
        assert not over, f"{self.system}: " + "; ".join(over)


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter with seeded noise: published starts hide forgotten terms behind zeros and ones."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim < 2:
                p.add_(0.3 * torch.randn(p.shape, generator=noise))
            elif any(word in name for word in ("position", "token", "latent", "quer", "probe", "cls")):
                p.copy_(0.5 * torch.randn(p.shape, generator=noise))
            else:
                p.copy_(torch.randn(p.shape, generator=noise) * p[0].numel() ** -0.5)
    return model


def twin(cls: type, config: Any, seed: int = 0) -> torch.nn.Module:
    """A small random model of the reference: float32, eager attention, no dropout."""
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    return randomise(cls(config).float().eval(), seed)


def double(model: torch.nn.Module) -> torch.nn.Module:
    """The same model in float64."""
    return copy.deepcopy(model).double()


def run(model: torch.nn.Module, watch: dict[str, str], call: Callable[[torch.nn.Module], Any]) -> dict[str, np.ndarray]:
    """What the modules at these paths put out while `call(model)` runs: name → array; "out" is what call returned."""
    caught, hooks = {}, []

    def first(x: Any) -> torch.Tensor:
        while not isinstance(x, torch.Tensor):
            x = x[0]
        return x

    def hook(name: str) -> Callable:
        return lambda _m, _i, out: caught.__setitem__(name, first(out).detach().numpy().copy())

    modules = dict(model.named_modules())
    for name, path in watch.items():
        hooks.append(modules[path].register_forward_hook(hook(name)))
    try:
        with torch.no_grad():
            out = call(model)
    finally:
        for h in hooks:
            h.remove()
    if out is not None:
        caught["out"] = first(out).detach().numpy().copy()
    return caught


def weights_for(shape: Sequence[int], seed: int = 7) -> np.ndarray:
    """Fixed random weights: the scalar loss of gradients is the sum of output × weights."""
    return np.random.default_rng(seed).normal(size=shape)


def gradient_model(model: torch.nn.Module, loss: Callable[[torch.nn.Module], torch.Tensor]) -> torch.nn.Module:
    """A float32 copy of a model whose parameters are the gradients (computed in float64) of a scalar loss.

    Saved and loaded like any model, it gives the reference's gradients in our layout. Unused parameters have zeros.
    """
    wide = double(model)
    wide.zero_grad()
    loss(wide).backward()
    with torch.no_grad():
        for p in wide.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
            p.grad = None
    return wide.float()


def state(model: torch.nn.Module, prefix: str = "") -> dict[str, np.ndarray]:
    """Its parameters by name (for parts that have no directory of their own), those under a prefix, without it."""
    found = {k: v.detach().numpy() for k, v in model.state_dict().items() if k.startswith(prefix)}
    return {k.removeprefix(prefix): v for k, v in found.items()}


def saved(model: torch.nn.Module, **options: Any) -> Path:
    """A directory as `save_pretrained` writes it, gone when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="mmjax-parity-")
    _folders.append(folder)
    model.save_pretrained(folder.name, **options)
    return Path(folder.name)


_folders: list = []


def numpy(params: Any) -> Any:
    """A tree of arrays on the host."""
    return jax.tree.map(np.asarray, params)
