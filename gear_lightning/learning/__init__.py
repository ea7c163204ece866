"""Parts of the training step: token statistics, adapters, optimizer steps, module state."""
