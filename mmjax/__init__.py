"""mmjax: text, images, audio and video as one token sequence, in pure JAX functions.

Importing this package imports nothing else and starts no JAX backend: `mmjax.nn.attention` and the rest are imported
when they are first named.
"""

import importlib

__version__ = "0.1.0"

_FOLDERS = (
    "checkpoint",
    "connectors",
    "core",
    "data",
    "encoders",
    "generate",
    "models",
    "nn",
    "objectives",
    "sequence",
    "tokenizers",
    "train",
)


def __getattr__(name: str):
    if name in _FOLDERS:
        return importlib.import_module(f"mmjax.{name}")
    raise AttributeError(f"module 'mmjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_FOLDERS])
