"""What a run writes and reads again: checkpoints, records, metrics, signals."""
