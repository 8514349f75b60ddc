"""Text to image: the tokens of the Q-Former condition an image decoder."""
