"""Any module of mmjax as a Flax Linen module.

    class Mine(nn.Module):
        @nn.compact
        def __call__(self, features, **see):
            return linen.Module(perceiver, cfg)(features, **see)

`variables` and `params` carry parameters in and out.
"""

from types import ModuleType
from typing import Any

import flax.linen as nn

from mmjax.core import spec as specs

NAME = "mmjax"  # under which the parameters stand among the module's variables


class Module(nn.Module):
    """of: the Python module with `spec` and `apply`. cfg: its Config. method: the function that is called."""

    of: ModuleType
    cfg: Any
    method: str = "apply"

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`of.apply(params, *args, cfg=cfg, **kwargs)`; the parameters start as `spec.init` starts them."""
        params = self.param(NAME, lambda key: specs.init(self.of.spec(self.cfg), key))
        return getattr(self.of, self.method)(params, *args, cfg=self.cfg, **kwargs)


def variables(params: dict) -> dict:
    """The variables of a Module that has these parameters: what its `init` returns, and its `apply` takes."""
    return {"params": {NAME: params}}


def params(variables: dict) -> dict:
    """The parameters among a Module's variables."""
    return variables["params"][NAME]
