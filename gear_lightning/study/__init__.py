"""Comparison of runs: arms and seeds, statistics, tables, figures."""
