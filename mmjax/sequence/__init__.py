"""One sequence, one descriptor per token: documents, layouts, rows, batches. NumPy on the host; static shapes."""
