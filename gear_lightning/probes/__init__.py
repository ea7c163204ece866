"""Measurements before the first training step: rounding, the teacher's signal, and sampler versus trainer."""
