"""A callback that saves a checkpoint in the middle of an iteration."""

from pathlib import Path

import lightning as L


class SaveInTheMiddle(L.Callback):
    def __init__(self, path: Path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 2:
            trainer.save_checkpoint(self.path)
