"""Write the credit map, an HTML page, next to the rollout records of a run."""

from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from gear_lightning.errors import UserError
from gear_lightning.lens.page import write_credit_page
from gear_lightning.runs.files import try_to_write
from gear_lightning.runs.records import record_files


class CreditMap(L.Callback):
    """Writes ``RUN/credit_map.html`` from the records that `RolloutRecorder` writes to the run directory.

    It does not change training, and only warns if the page cannot be written. The file opens in a browser and needs no
    other files.

    Args:
        every_n_iterations: iterations between two pages; a last page is written when training ends or fails.
        max_rollouts: maximum number of rollouts on the page, newest iterations first; fewer if they need more than
            40 MB.

    Raises:
        UserError: an argument below 1.
    """

    def __init__(self, every_n_iterations: int = 10, max_rollouts: int = 1000):
        for name, value in (("every_n_iterations", every_n_iterations), ("max_rollouts", max_rollouts)):
            if value < 1:
                raise UserError(f"CreditMap: {name}={value}: must be at least 1")
        self.every_n_iterations = every_n_iterations
        self.max_rollouts = max_rollouts
        self._due = False

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # RolloutRecorder may write this iteration's records after this hook runs, so the page waits.
        self._due = (trainer.current_epoch + 1) % self.every_n_iterations == 0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._due:
            self._write(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        self._due = False
        run = Path(trainer.default_root_dir)
        if not trainer.is_global_zero or not record_files(run):
            return
        try:
            try_to_write("pages of the credit map", lambda: write_credit_page(run, max_rollouts=self.max_rollouts))
        except Exception as error:  # training must continue, and an exception in flight must not be hidden
            rank_zero_warn(f"CreditMap: the page could not be written: {type(error).__name__}: {error}")
