"""Layers as pure functions: each file has a `Config`, a `spec(cfg)` of its parameters and an `apply(params, x, cfg)`."""
