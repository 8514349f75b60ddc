"""Answers from a saved model."""
