"""Decide at a resume whether the run has ended, and which options replace those of the checkpoint."""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from gear_lightning.callbacks.health import Health
from gear_lightning.callbacks.preemption import Preemption
from gear_lightning.errors import UserError
from gear_lightning.runs.checkpoints import known_checkpoints
from gear_lightning.runs.monitor import check_early_stopping


class Resumption(L.Callback):
    """Skips training if the run to resume has ended, and reports the reason.

    A run ends at ``max_epochs``, ``max_steps`` or ``max_time`` (summed over all starts), or when a callback stops it:
    early stopping, `Health`, or a user's callback. If a limit is raised, the run continues. If a callback stopped it,
    it continues only if the checkpoint is given by name. A run that was stopped by a signal has not ended.
    """

    def __init__(self) -> None:
        self._why: str | None = None  # the reason for skipping training
        self._trained = False
        self._stops = False  # stop after an evaluation that was interrupted before

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._why, self._trained, self._stops = None, False, False
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if stage == "fit" and isinstance(callback, EarlyStopping):
                mode: Any = callback.mode
                at_every_end, every = callback._check_on_train_epoch_end, trainer.check_val_every_n_epoch
                check_early_stopping(callback.monitor, mode, at_every_end, every)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["ended"] = stopped_by(trainer)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        states = checkpoint["callbacks"]
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, EarlyStopping) and callback.state_key in states:
                # Lightning would use the checkpoint's patience instead of the current option
                afresh = {"patience": callback.patience, "stopping_reason": EarlyStoppingReason.NOT_STOPPED.value}
                states[callback.state_key] = {**states[callback.state_key], **afresh}
        self._why = self._reached_limit(trainer, checkpoint)
        if self._why is None and (ended := checkpoint.get("ended")) is not None and not _by_name(trainer):
            self._why = (
                f"the run was ended after {_iterations(checkpoint)} iterations by {ended['by']}; to continue it "
                f"anyway, name the checkpoint: --ckpt_path {_named(trainer)}"
            )
            if ended["error"]:
                raise UserError(self._why)
        # an interrupted evaluation runs first: see `FirstEvaluation`
        self._stops = self._why is not None and trainer.datamodule.evaluation_due  # pyright: ignore
        trainer.should_stop |= self._why is not None and not self._stops

    def _reached_limit(self, trainer: L.Trainer, checkpoint: dict[str, Any]) -> str | None:
        """Return a sentence that names the limit that the checkpoint has reached; None if it has reached none."""
        done, steps = _iterations(checkpoint), checkpoint["global_step"]
        loop = trainer.fit_loop
        if loop.max_epochs is not None and 0 <= loop.max_epochs <= done:
            given, loop.max_epochs = loop.max_epochs, done  # Lightning raises an error if it is less
            return f"the checkpoint has {done} iterations, and trainer.max_epochs={given}; raise it to continue"
        if 0 <= trainer.max_steps <= steps:
            return f"the checkpoint has {steps} steps, and trainer.max_steps={trainer.max_steps}; raise it to continue"
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, Timer) and callback._duration is not None:
                used = checkpoint["callbacks"].get(callback.state_key, {}).get("time_elapsed", {}).get("train", 0.0)
                if used >= callback._duration:
                    return (
                        f"the run has trained for {timedelta(seconds=int(used))} of "
                        f"trainer.max_time={timedelta(seconds=callback._duration)}, which is the sum over all starts "
                        "of a run; raise it to continue"
                    )
        return None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trained = not self._stops
        trainer.should_stop |= self._stops

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._why is not None and not self._trained and trainer.is_global_zero:
            print(f"nothing to train: {self._why}", file=sys.stderr)


def stopped_by(trainer: L.Trainer) -> dict[str, Any] | None:
    """Return which callback ends the run permanently after this iteration, and whether with an error.

    Return None if no callback does: at a limit, after a signal, or if the run continues.
    """
    callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    if not trainer.should_stop or not trainer.fit_loop._can_stop_early:
        return None
    for callback in callbacks:
        if isinstance(callback, Health) and callback.why is not None:
            return {"by": f"health: {callback.why}", "error": True}
        if isinstance(callback, EarlyStopping) and callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED:
            reason = (callback.stopping_reason_message or "").removesuffix(" Signaling Trainer to stop.").rstrip(".")
            return {"by": f"EarlyStopping ({reason})", "error": False}
    asked = any(isinstance(callback, Preemption) and callback.asked for callback in callbacks)
    timed = any(
        isinstance(callback, Timer) and (left := callback.time_remaining()) is not None and left <= 0
        for callback in callbacks
    )
    failed = getattr(trainer.lightning_module, "failure", None) is not None
    return None if asked or timed or failed else {"by": "a callback (trainer.should_stop)", "error": False}


def _iterations(checkpoint: dict[str, Any]) -> int:
    return checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]


def _by_name(trainer: L.Trainer) -> bool:
    """Return whether the user named the checkpoint file, instead of asking for the newest one."""
    path = Path(str(trainer.ckpt_path))
    return not path.is_dir() and path.stem != "last"


def _named(trainer: L.Trainer) -> Path:
    """Return the path of the checkpoint that the run resumes from."""
    path = Path(str(trainer.ckpt_path))
    known = known_checkpoints(path) if path.is_dir() else []
    return known[0][0] if known else path.resolve()
