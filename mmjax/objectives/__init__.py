"""Objectives: each returns (sum, weight), so that nothing is averaged over padding and micro-batches add up."""
