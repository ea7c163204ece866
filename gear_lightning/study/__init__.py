"""Comparing runs: arms and seeds, statistics, tables, figures."""
