"""Sharded weights, collectives, and errors that all ranks raise together."""
