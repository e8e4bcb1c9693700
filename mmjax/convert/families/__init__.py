"""One file per family: what its config.json says, and where its tensors go."""
