"""Benchmarks, metrics, tables and the report."""
