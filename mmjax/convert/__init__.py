"""Weights of other libraries: Hugging Face directories in and out, by one table per family."""
