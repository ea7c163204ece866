"""A progress bar that shows the phase: warm start, rollout, update or evaluation."""

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from gear_lightning.callbacks.generation import GenerationCallback


class PhaseProgress(ProgressBar):
    """Shows completed iterations, the phase, tokens/s of generation, the newest reward and success, and the time left.

    Args:
        every_seconds: minimum seconds between two lines if the output is not a terminal.
    """

    def __init__(self, every_seconds: float = 10.0):
        super().__init__()
        self.every_seconds = every_seconds
        self._enabled = True
        self._bar: Progress | None = None
        self._last_line = 0.0
        self._phase_start = self._update_start = 0.0
        self._update_tokens = 0
        self._shown: dict[str, str] = {}
        self._started_at: tuple[float, float] = (0.0, 0.0)

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._bar is not None and self._enabled:
            self._bar.console.print(*args, markup=False, highlight=False, soft_wrap=True)

    # -- drawing --------------------------------------------------------------------------------------------------

    def _open(self, total: int | None) -> None:
        if not self._enabled or self._bar is not None:
            return
        console = Console(file=sys.stderr)
        self._bar = Progress(
            TextColumn("{task.fields[phase]:<10}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"),
            TextColumn("{task.fields[note]}"),
            console=console,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=total or 1, phase="start", note="", left="?")

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, phase: str, completed: float, total: float, note: str, *, force: bool = False) -> None:
        if self._bar is None or not self._enabled:
            return
        now = time.monotonic()
        if not self._started_at[0]:
            self._started_at = (now, completed)
        done, seconds = completed - self._started_at[1], now - self._started_at[0]
        left = _clock(seconds / done * (total - completed)) if done > 0 and seconds > 1 else "?"
        self._bar.update(self._task, completed=completed, total=total, phase=phase, note=note, left=left)
        quiet = self._bar.disable and (force or now - self._last_line >= self.every_seconds)
        if quiet:  # logs of batch jobs get one line per `every_seconds`
            self._last_line = now
            print(f"{phase:<10} {completed:.0f}/{total:.0f}  left {left}  {note}", file=sys.stderr, flush=True)

    def _total(self, trainer: L.Trainer) -> float:
        return trainer.max_epochs if (trainer.max_epochs or -1) > 0 else max(trainer.max_steps, 1)  # pyright: ignore

    def _numbers(self, **new: float) -> str:
        """Return the newest values of this rank as text.

        It does not read the Trainer's metrics, because that could start a collective on one rank.
        """
        self._shown.update({name: f"{name} {value:.3f}" for name, value in new.items()})
        return "  ".join(self._shown.values())

    # -- hooks ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not trainer.is_global_zero:
            self.disable()
        self._warm = not hasattr(pl_module, "credit")
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, GenerationCallback) and self._rolling not in callback.listeners:
                callback.listeners.append(self._rolling)

    def _rolling(self, stage: str, finished: int, rollouts: int, tokens: int) -> None:
        if finished == 0 or self._phase_start == 0.0:
            self._phase_start = time.monotonic()
        seconds = time.monotonic() - self._phase_start
        rate = f"{tokens / seconds:,.0f} tok/s  " if seconds > 0.2 else ""
        trainer = self.trainer
        phase = "rollout" if stage == "fit" else "evaluation"
        note = f"{finished}/{rollouts} rollouts  {rate}{self._numbers()}"
        within = 0.5 * finished / max(rollouts, 1) if stage == "fit" else 0.0
        if self._bar is not None:
            self._show(phase, trainer.current_epoch + within, self._total(trainer), note)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._open(int(self._total(trainer)))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._phase_start = time.monotonic()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._warm:
            return
        if batch_idx == 0:
            self._update_start, self._update_tokens = time.monotonic(), 0
            rewards = trainer.datamodule.stats.rewards  # pyright: ignore[reportAttributeAccessIssue]
            self._numbers(reward=sum(rewards) / max(len(rewards), 1))
            self._show_update(trainer, 0)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._warm:
            rate = trainer.global_step * batch[0].numel() / max(time.monotonic() - self._phase_start, 1e-6)
            note = f"{rate:,.0f} tok/s  {self._numbers(loss=float(outputs['loss']) / trainer.world_size)}"
            self._show("warm start", trainer.global_step, self._total(trainer), note)
        else:
            self._update_tokens += int(batch.valid.sum())
            self._show_update(trainer, batch_idx + 1)

    def _show_update(self, trainer: L.Trainer, batches: int) -> None:
        seconds = time.monotonic() - self._update_start
        rate = f"{self._update_tokens / seconds:,.0f} tok/s  " if batches else ""
        within = 0.5 + 0.5 * batches / max(int(trainer.num_training_batches), 1)
        self._show("update", trainer.current_epoch + within, self._total(trainer), rate + self._numbers())

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._phase_start = time.monotonic()
        self._open(1)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total = self._total(trainer)
        if "val/success" in trainer.callback_metrics:  # already computed on every rank
            self._numbers(success=float(trainer.callback_metrics["val/success"]))
        self._show("evaluation", trainer.current_epoch, total, self._numbers(), force=True)
        if trainer.state.fn != TrainerFn.FITTING:
            self._close()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._show("done", self._total(trainer), self._total(trainer), self._numbers(), force=True)
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
