"""When checkpoints are written, and which are kept."""

import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from gear_lightning.checkpoints import failing_together
from gear_lightning.loggers import MetricsFile


class IterationCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint that also saves after the last iteration, whatever ``every_n_epochs``, and replaces
    the ``last.ckpt`` link in one go, so that a kill leaves the old one or the new one.

    Of the checkpoints that ``save_top_k`` would remove, the newest stays: what is left if the last one is damaged.
    A checkpoint also holds the iteration's row of metrics, which Lightning logs after it: a run killed in between lacks
    nothing when it goes on.
    """

    _spare: str | None = None
    _row: dict[str, float] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._row is None:
            return
        metrics = {name: value for name, value in self._row.items() if name != "step"}
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.log_metrics(metrics, int(self._row["step"]))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # on all ranks, for it communicates
        row = trainer._logger_connector.metrics["log"]  # trainer.logged_metrics also has those of earlier iterations
        self._row = {name: float(value) for name, value in row.items()}
        super().on_train_epoch_end(trainer, pl_module)
        over = trainer.current_epoch + 1 == trainer.max_epochs or trainer.should_stop
        if over and self._should_save_on_train_epoch_end(trainer) and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        with failing_together(trainer.strategy):
            super()._save_checkpoint(trainer, filepath)

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        spare, self._spare = self._spare, filepath
        if spare is not None and spare != filepath:
            super()._remove_checkpoint(trainer, spare)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "spare": self._spare, "row": self._row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up which checkpoints there are. Those that newer ones replace are deleted, by the paths in the
        checkpoint: a checkpoint that someone else wrote must not name other files."""
        mine = dict(state_dict)
        spare, self._row = mine.pop("spare", None), mine.pop("row", None)
        super().load_state_dict(mine)
        self._spare = spare if spare and self._ours(spare) else None
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
