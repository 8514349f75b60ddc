"""The training loop, for any model with ``.loss(batch)``."""
