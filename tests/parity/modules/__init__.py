"""One file per family; each registers its comparisons when it is imported."""

import importlib
import pkgutil


def load() -> None:
    """Imports them all."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
