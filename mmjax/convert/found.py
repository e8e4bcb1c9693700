"""What a family's reader makes of a config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from mmjax.convert.rules import Rule


@dataclass(frozen=True)
class Found:
    """of: the Python module with `spec` and `apply`. cfg: its Config. rules: the table.

    dropped: regular expressions of tensors in the file that are no parameters, and why they are none.
    """

    of: ModuleType
    cfg: Any
    rules: tuple[Rule, ...]
    dropped: Mapping[str, str] = field(default_factory=dict)
