"""What the training step is made of: token statistics, adapters, optimizer steps, state."""
