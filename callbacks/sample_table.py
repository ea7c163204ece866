"""Show a few rollouts of an iteration as a table."""

from io import StringIO
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gear_lightning.environments.base import Message
from gear_lightning.errors import UserError
from gear_lightning.lens.trace import visible
from gear_lightning.rollout import Rollout
from gear_lightning.runs.loggers import Board

COLUMNS = ["task", "reward", "status", "tokens", "question", "response"]


class SampleTable(L.Callback):
    """Prints the best, the worst and some other rollouts of an iteration on rank 0, and passes them to the loggers that
    accept text (TensorBoard, Weights & Biases). It does not change training.

    Args:
        every_n_iterations: iterations between two tables. 0: never.
        rows: number of rollouts in a table.
        print_table: whether to print the table as well.
    """

    def __init__(self, every_n_iterations: int = 20, rows: int = 4, print_table: bool = True):
        if every_n_iterations < 0 or rows < 1:
            raise UserError(
                f"samples.every_n_iterations={every_n_iterations} must not be negative, and samples.rows={rows} must "
                "be at least 1"
            )
        self.every_n_iterations = every_n_iterations
        self.rows = rows
        self.print_table = print_table

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        every = self.every_n_iterations
        if not trainer.is_global_zero or not every or (trainer.current_epoch + 1) % every:
            return
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        rollouts = sorted((r for g in data.groups for r in g.rollouts), key=lambda r: -r.reward)
        rows = [_row(r) for r in _spread(rollouts, self.rows)]
        title = f"rollouts of iteration {trainer.current_epoch}"
        if self.print_table:
            bar = trainer.progress_bar_callback
            (print if bar is None else bar.print)(_render(title, rows))
        for logger in trainer.loggers:
            if isinstance(logger, Board):
                lines = [" | ".join(COLUMNS), " | ".join(["---"] * len(COLUMNS))]
                lines += [" | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows]
                logger.log_text("samples", "\n".join(lines), trainer.global_step)
            elif isinstance(logger, WandbLogger):
                logger.log_table("samples", columns=COLUMNS, data=rows)


def _spread(rollouts: list[Rollout], wanted: int) -> list[Rollout]:
    """Return the first rollout, the last one and evenly spaced ones in between."""
    if len(rollouts) <= wanted:
        return rollouts
    step = (len(rollouts) - 1) / max(wanted - 1, 1)
    return [rollouts[round(i * step)] for i in range(wanted)]


def _row(rollout: Rollout) -> list[str]:
    response = "  ".join(filter(None, map(_message_text, rollout.messages[rollout.opening_messages :])))
    asked = next((m["content"] for m in reversed(rollout.task.messages) if m["role"] == "user"), "")
    cells = [visible(rollout.task.id), f"{rollout.reward:.3g}", rollout.status, str(sum(rollout.action_mask))]
    return [*cells, _short(asked, 160), _short(rollout.error or response, 400)]


def _message_text(message: Message) -> str:
    calls = [
        f"{c['function']['name']}({', '.join(map(str, c['function']['arguments'].values()))})"
        for c in message.get("tool_calls") or []
    ]
    text = " ".join([message.get("content") or "", *calls]).strip()
    return f"→ {text}" if message["role"] != "assistant" else text


def _short(text: str, length: int) -> str:
    text = visible(text).replace("⏎\n", "⏎ ").replace("·", " ")
    return text if len(text) <= length else text[: length - 1] + "…"


def _render(title: str, rows: list[list[str]]) -> str:
    table = Table(title=title, title_justify="left", show_lines=True)
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in ("reward", "tokens") else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    out = StringIO()
    Console(file=out, width=max(100, Console().width)).print(table)
    return out.getvalue()
