"""Any module of mmjax as an Equinox module.

    class Mine(eqx.Module):
        resample: Module

        def __init__(self, key):
            self.resample = Module(perceiver, cfg, key=key)

`params` carries parameters in and out.
"""

from types import ModuleType
from typing import Any

import equinox as eqx
import jax

from mmjax.core import spec as specs
from mmjax.core.errors import InputError


class Module(eqx.Module):
    """`params` are its only leaves, the nested dict that the spec describes."""

    params: dict
    of: ModuleType = eqx.field(static=True)
    cfg: Any = eqx.field(static=True)
    method: str = eqx.field(static=True)

    def __init__(
        self,
        of: ModuleType,
        cfg: Any,
        *,
        key: jax.Array | None = None,
        params: dict | None = None,
        method: str = "apply",
    ):
        """of, cfg: the Python module and its Config. Give `key` for a fresh start, or `params` that are there."""
        if (key is None) == (params is None):
            raise InputError("An Equinox module starts from a key or has params; give one of them.")
        self.params = specs.init(of.spec(cfg), key) if params is None else params
        self.of, self.cfg, self.method = of, cfg, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`of.apply(params, *args, cfg=cfg, **kwargs)`."""
        return getattr(self.of, self.method)(self.params, *args, cfg=self.cfg, **kwargs)
