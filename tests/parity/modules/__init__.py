"""One file per family; each registers its comparisons when it is imported."""

import importlib
import pkgutil


def load() -> dict[str, str]:
    """Imports them all; returns those that cannot be for want of a package, and which."""
    missing = {}
    for module in pkgutil.iter_modules(__path__):
        try:
            importlib.import_module(f"{__name__}.{module.name}")
        except ModuleNotFoundError as error:
            if (error.name or "").startswith(("mmjax", "parity")):
                raise
            missing[module.name] = f"needs {error.name}"
    return missing
