"""Modules of mmjax inside other libraries' models: `interop.linen`, `interop.nnx`, `interop.equinox`.

Each has one class, `Module(of, cfg)`: `of` is the Python module (say `mmjax.connectors.perceiver`), `cfg` its Config.
It owns the parameters that `of.spec(cfg)` describes, as that library owns parameters, and calls `of.apply` with them.
The parameters are the same nested dict everywhere, so they travel both ways unchanged.
"""
