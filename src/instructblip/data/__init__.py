"""Official files in, ``Batch`` out."""
