"""Rollouts from an inference server: starting it, sending it weights, and asking it for turns."""
