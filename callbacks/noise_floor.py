"""Warns where anchors of credit sit inside the noise of low precision."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from gear_lightning.batch import RolloutBatch
from gear_lightning.errors import UserError
from gear_lightning.noise_floor import FILE, anchor_tokens, conditions, measure, quantiles, read_floor

ENOUGH = 16  # anchors to judge by


class NoiseFloor(L.Callback):
    """Warns once where anchors have no more divergence than rounding gives (99th percentile of the noise floor).

    The floor is read from ``RUN/noise_floor.json`` (`gear-lightning noise-floor` writes it), else measured in the run
    with equal weights and nothing privileged: two forwards without gradient on the first micro-batch of an iteration,
    for the first iterations. Logs ``credit/noise_p99`` (nats) and ``credit/anchors_in_noise`` (share). Only watches.

    Args:
        file: a floor measured before. Null: ``noise_floor.json`` in the run directory, where there is one.
        tokens: measure until the floor rests on so many tokens. 0: never.
        share: warn where at least this share of the anchors sits inside the floor.

    Raises:
        UserError: an argument out of range; in ``setup``, a ``file`` that cannot be read or holds for another precision
            or credit rule.
    """

    def __init__(self, file: str | None = None, tokens: int = 256, share: float = 0.1):
        if tokens < 0 or not 0 < share <= 1:
            raise UserError(f"noise_floor.tokens={tokens} must not be negative, share={share} must lie in (0, 1]")
        self.file = file
        self.tokens = tokens
        self.share = share
        self._given: float | None = None  # 99th percentile out of a file, nats
        self._floor = 0.0  # mean of the iterations' 99th percentiles, by tokens
        self._seen = 0.0  # tokens it rests on
        self._counts = [0.0, 0.0]  # anchors since the last verdict, and those of them inside the floor
        self._warned = False
        self._due = False
        self._noise: list[Tensor] = []  # of this iteration
        self._anchors: list[Tensor] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        rule: Any = pl_module.credit
        path = Path(trainer.default_root_dir) / FILE if self.file is None else Path(self.file)
        if stage != "fit" or not rule.needs_teacher or (self.file is None and not path.exists()):
            return
        found, now = read_floor(path), conditions(trainer, pl_module)
        other = [f"{name} {found.get(name)} (here {now[name]})" for name in now if found.get(name) != now[name]]
        if not other:
            self._given = float(found["divergence"]["p99"])
            return
        text = f"{path} was measured with {', '.join(other)}; measure again with gear-lightning noise-floor"
        if self.file is not None:
            raise UserError(text)
        rank_zero_warn(f"{text}. It is not used.")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rule: Any = pl_module.credit
        self._noise, self._anchors = [], []
        self._due = rule.needs_teacher and self._given is None and self._seen < self.tokens

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: RolloutBatch, batch_idx: int
    ) -> None:
        if not self._due:
            return
        self._due = False
        module: Any = pl_module
        # on every rank, rollouts or none: under a sharded strategy a forward is a collective
        with trainer.strategy.precision_plugin.train_step_context():
            noise = measure(module.policy, batch, module.credit)
        self._noise.append(noise.divergence)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        rule: Any = pl_module.credit
        if rule.needs_teacher and not batch.inner_epoch:
            credit = outputs["credit"]
            self._anchors.append(credit.divergence[anchor_tokens(rule, credit)].abs())

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rule: Any = pl_module.credit
        if not rule.needs_teacher:
            return
        reduce, device = trainer.strategy.reduce, pl_module.device
        if self._given is None and self._seen < self.tokens:
            noise = torch.cat(self._noise) if self._noise else torch.zeros(0)
            p99 = quantiles(noise)["p99"] if len(noise) else 0.0
            total = float(reduce(torch.tensor(float(len(noise)), device=device), reduce_op="sum"))
            worst = float(reduce(torch.tensor(p99, device=device), reduce_op="max"))
            if total:
                self._floor = (self._floor * self._seen + worst * total) / (self._seen + total)
                self._seen += total
        if self._given is None and not self._seen:
            return
        floor = self._floor if self._given is None else self._given
        anchors = torch.cat(self._anchors) if self._anchors else torch.zeros(0, device=device)
        counts = torch.tensor([float(len(anchors)), float((anchors <= floor).sum())], device=device)
        count, inside = reduce(counts, reduce_op="sum").tolist()
        pl_module.log("credit/noise_p99", floor, batch_size=1, sync_dist=True)
        if count:
            pl_module.log("credit/anchors_in_noise", inside / count, batch_size=1, sync_dist=True)
        self._counts = [self._counts[0] + count, self._counts[1] + inside]
        if self._counts[0] >= ENOUGH:
            self._judge(type(rule).__name__, str(trainer.precision), floor)
            self._counts = [0.0, 0.0]

    def _judge(self, rule: str, precision: str, floor: float) -> None:
        anchors, inside = self._counts
        if self._warned or inside < self.share * anchors:
            return
        self._warned = True
        rank_zero_warn(
            f"{inside:.0f} of {anchors:.0f} anchors of {rule} ({inside / anchors:.0%}) sit inside the noise floor: "
            f"with equal weights and nothing privileged the two forwards already differ by {floor:.2g} nats (p99) in "
            f"{precision}, so these anchors mark rounding, not departures. Use a wider trainer.precision, or a "
            f"model.credit.anchor_floor above {floor:.2g}; see `gear-lightning noise-floor` with this config."
        )

    def state_dict(self) -> dict[str, Any]:
        return {"floor": self._floor, "seen": self._seen, "counts": self._counts, "warned": self._warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._floor, self._seen = state_dict["floor"], state_dict["seen"]
        self._counts, self._warned = list(state_dict["counts"]), state_dict["warned"]
