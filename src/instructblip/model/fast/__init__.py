"""Faster twins of plain definitions elsewhere in ``model/``, each compared with them in a test."""
