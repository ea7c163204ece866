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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up which checkpoints there are. Lightning deletes those that newer ones replace, by the paths in the
        checkpoint: a checkpoint that someone else wrote must not name other files."""
        super().load_state_dict(state_dict)
        self.best_model_path, self.kth_best_model_path, self.last_model_path = (
            path if self._ours(path) else ""
            for path in (self.best_model_path, self.kth_best_model_path, self.last_model_path)
        )
        self.best_k_models = {path: score for path, score in self.best_k_models.items() if self._ours(path)}

    def _ours(self, path: str) -> bool:
        place = Path(path)
        return (
            self.dirpath is not None
            and place.suffix == ".ckpt"
            and place.parent.resolve() == Path(self.dirpath).resolve()
        )

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
