"""Checks that runs with different strategies are equal except for rounding."""
