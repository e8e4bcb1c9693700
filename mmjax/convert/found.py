"""What a family's reader makes of a config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from mmjax.convert.rules import Rule


@dataclass(frozen=True)
class Found:
    """of: the Python module with `spec` and `apply`. cfg: its Config. rules: the table.

    dropped: regular expressions of tensors in the file that are no parameters, and why they are none.
    rest: the same of parameters that this model never computes with, as an encoder's last block behind the one whose
      features are used. They are kept whatever their size, and written again.
    copies: tensors that must equal another one, and which: a head beside the token table that it is tied to. They are
      written again as what the other has become.
    otherwise: what is found where a copy does not equal its original.
    """

    of: ModuleType
    cfg: Any
    rules: tuple[Rule, ...]
    dropped: Mapping[str, str] = field(default_factory=dict)
    rest: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    otherwise: "Found | None" = None

    def within(self, of: ModuleType, cfg: Any, part: str) -> "Found":
        """The same files as those of a model around this one, which calls it `part` and has nothing else."""
        rules = tuple(replace(rule, ours=f"{part}/{rule.ours}") for rule in self.rules)
        return replace(self, of=of, cfg=cfg, rules=rules, otherwise=None)
