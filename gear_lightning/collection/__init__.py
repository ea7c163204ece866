"""Parts of `gear_lightning.data`: which rollouts an iteration collects, and their rows."""
