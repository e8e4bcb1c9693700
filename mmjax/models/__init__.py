"""Models: compositions of encoders, connectors and blocks, and nothing else."""
