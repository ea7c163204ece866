"""The checkpoint plug-in under the import path that recipes name; see `gear_lightning.runs.checkpoints`."""

from .runs.checkpoints import CompleteCheckpoints

__all__ = ["CompleteCheckpoints"]
