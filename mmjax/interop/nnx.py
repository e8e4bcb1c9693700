"""Any module of mmjax as a Flax NNX module.

    class Mine(nnx.Module):
        def __init__(self, rngs):
            self.resample = Module(perceiver, cfg, rngs=rngs)

`params` carries parameters in and out.
"""

from types import ModuleType
from typing import Any

import jax
from flax import nnx

from mmjax.core import spec as specs
from mmjax.core.errors import InputError


class Module(nnx.Module):
    """Every parameter is an `nnx.Param`, in the nested dict that the spec describes."""

    def __init__(
        self,
        of: ModuleType,
        cfg: Any,
        *,
        rngs: nnx.Rngs | None = None,
        params: dict | None = None,
        method: str = "apply",
    ):
        """of, cfg: the Python module and its Config. Give `rngs` for a fresh start, or `params` that are there."""
        if (rngs is None) == (params is None):
            raise InputError("An NNX module starts from rngs or has params; give one of them.")
        values = specs.init(of.spec(cfg), rngs.params()) if params is None else params
        self.of, self.cfg, self.method = of, cfg, method
        tree = jax.tree.map(nnx.Param, values)
        self.tree = nnx.data(tree) if hasattr(nnx, "data") else tree

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`of.apply(params, *args, cfg=cfg, **kwargs)`."""
        return getattr(self.of, self.method)(self.params, *args, cfg=self.cfg, **kwargs)

    @property
    def params(self) -> dict:
        """The parameters as the nested dict of arrays that every function of mmjax takes."""
        return jax.tree.map(lambda p: p[...], self.tree, is_leaf=lambda x: isinstance(x, nnx.Param))
