"""When ``config.yaml`` is written."""

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback


class SavedConfig(SaveConfigCallback):
    """Writes ``config.yaml``. When a run resumes, only once it is clear that it trains with this config: the file tells
    what the run's weights were trained with."""

    resumes = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not (stage == "fit" and self.resumes):
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")
