"""What is measured before a first step: rounding, the teacher's signal, the sampler against the trainer."""
