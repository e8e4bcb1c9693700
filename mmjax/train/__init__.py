"""Training: state, step, loop, reports. `python -m mmjax.train CONFIG` runs a config file."""
