"""Data: datasets as documents, the index pass, and Grain sources of batches."""
