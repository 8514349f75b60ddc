"""Text to image: the Q-Former's tokens drive a picture decoder."""
