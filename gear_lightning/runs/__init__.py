"""Files of a run (checkpoints, records, metrics) and signals to it."""
