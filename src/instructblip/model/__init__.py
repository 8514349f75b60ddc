"""``Batch`` in, loss or token ids out."""
