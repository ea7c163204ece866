"""When and how checkpoints are written."""

import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


class IterationCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint that also saves after the last iteration, whatever ``every_n_epochs``, and replaces
    the ``last.ckpt`` link in one go, so that a kill leaves the old one or the new one."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        over = trainer.current_epoch + 1 == trainer.max_epochs or trainer.should_stop
        if over and self._should_save_on_train_epoch_end(trainer) and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    @staticmethod
    def _link_checkpoint(trainer: Any, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero:
            fresh = f"{linkpath}.new"
            Path(fresh).unlink(missing_ok=True)
            os.symlink(os.path.relpath(filepath, os.path.dirname(linkpath)), fresh)
            os.replace(fresh, linkpath)
        trainer.strategy.barrier()


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a folder, None where there is none. Files are written whole or not at all; a link
    whose file a kill has left behind removed is passed over."""
    whole = [path for path in Path(folder).glob("*.ckpt") if path.exists()]
    return max(whole, key=lambda path: (path.stat().st_mtime_ns, path.name), default=None)
