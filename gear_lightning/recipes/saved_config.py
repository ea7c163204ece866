"""Write ``config.yaml``."""

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback


class SavedConfig(SaveConfigCallback):
    """Writes ``config.yaml``, which records the config with which the run's weights were trained.

    When a run resumes, it writes the file only when training starts, because a resume may be rejected or may have
    nothing to train.
    """

    resumes = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not (stage == "fit" and self.resumes):
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")
