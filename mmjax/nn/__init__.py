"""Layers as pure functions: each file has a `Config`, a `spec(cfg)` and an `apply(params, x, cfg)`."""
