"""Evaluate the policy on the server while training goes on."""

from typing import Any

import lightning as L

from gear_lightning.callbacks.generation import GenerationCallback
from gear_lightning.data import RolloutDataModule
from gear_lightning.distributed.collective import gather
from gear_lightning.errors import UserError
from gear_lightning.generation.flight import Flight


class EvaluationBeside(L.Callback):
    """Samples the validation tasks with a detached engine (`VLLMEngine`) while the policy is updated.

    An evaluation begins at the end of an iteration. Its metrics are logged at the end of the first iteration that finds
    it finished, with the optimizer steps of the weights that it measured: ``beside/success``, ``beside/reward``,
    ``beside/turns``, ``beside/response_tokens``, ``beside/step``. Newer weights wait until it has finished, so an
    evaluation that takes longer than an iteration delays training. Use it in place of Lightning's validation
    (``trainer.limit_val_batches: 0``), which stops the updates, and on which checkpoints and schedulers can depend.

    Args:
        every_n_iterations: iterations between two evaluations.
    """

    def __init__(self, every_n_iterations: int = 1):
        if every_n_iterations < 1:
            raise UserError(f"EvaluationBeside: every_n_iterations={every_n_iterations} must be at least 1")
        self.every_n_iterations = every_n_iterations
        self._flight: Flight | None = None
        self._step = 0  # optimizer steps of the weights that are being evaluated
        self._due = False  # whether a stop has interrupted an evaluation
        self._generation: GenerationCallback | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if stage != "fit" or not isinstance(data, RolloutDataModule):
            return
        if data.val_tasks is None:
            raise UserError("EvaluationBeside needs data.val_tasks")
        callbacks: Any = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        self._generation = next(c for c in callbacks if isinstance(c, GenerationCallback))
        engine = self._generation.engine
        if not engine.detached:
            raise UserError(
                f"EvaluationBeside: {type(engine).__name__} samples in the training process; use generation.engine "
                "gear_lightning.generation.VLLMEngine, or Lightning's validation"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._due:
            self._begin(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._flight is not None and all(gather(self._flight.over)):
            self._finish(trainer)
        if (trainer.current_epoch + 1) % self.every_n_iterations == 0:
            if self._flight is not None:
                self._finish(trainer)
            self._begin(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._flight is not None:
            self._finish(trainer)

    def _begin(self, trainer: L.Trainer) -> None:
        assert self._generation is not None
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        self._flight = self._generation.fly(data.evaluation_jobs(), "validate", keeps_weights=True)
        self._step, self._due = trainer.global_step, False

    def _finish(self, trainer: L.Trainer) -> None:
        assert self._generation is not None
        assert self._flight is not None
        flight, self._flight = self._flight, None
        rollouts = self._generation.land(flight)
        self._due = any(gather(flight.stop()))
        if self._due:
            return  # incomplete
        rows = [(r.success and r.learnable, r.reward, r.turns, sum(r.action_mask)) for r in rollouts]
        all_rows = [row for rank in gather(rows) for row in rank]
        names = ("success", "reward", "turns", "response_tokens")
        means = {
            f"beside/{name}": sum(values) / len(all_rows)
            for name, values in zip(names, zip(*all_rows, strict=True), strict=True)
        }
        for logger in trainer.loggers:
            logger.log_metrics({**means, "beside/step": float(self._step)}, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {"due": self._due or self._flight is not None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._due = state_dict["due"]
