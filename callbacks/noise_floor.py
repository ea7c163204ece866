"""Measures the size of rounding, hands it to the credit rule, and warns where credit sits inside it."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from gear_lightning.batch import RolloutBatch
from gear_lightning.errors import UserError
from gear_lightning.probes.noise_floor import FILE, anchor_tokens, conditions, weight_spread
from gear_lightning.probes.rounding import Floor, chosen, floor_from, measure_floor

ANCHORS, TOKENS = 16, 256  # to judge by
MOVED = 0.005  # mean distance of weights from their rollout's median that is worth a word


class NoiseFloor(L.Callback):
    """Gives the credit rule the size of rounding, and warns once each where anchors or weights are no more than that.

    In low precision policy and teacher differ even where the teacher is told nothing. How much is measured in the run,
    before its first update: two forwards without gradient, with equal weights and nothing privileged, on some rollouts
    of the first iteration; or read from ``RUN/noise_floor.json`` (`gear-lightning noise-floor` writes it). Its 99th
    percentile is a constant of the run, the same on all ranks and kept in checkpoints: credit rules that take the size
    out of a signal compare that size with it (`gear_lightning.gear.above_noise`), so that they do not make credit of
    rounding. Rules that keep the size (GEAR's default, RLSD) do not look at it.

    Logs ``credit/noise_p99`` (nats, of the rule's divergence), ``credit/anchors_in_noise`` (share of the anchors with
    no more divergence than that) and ``credit/weights_in_noise``: of all distances of weights from the median weight of
    their rollout, the share on tokens where it is no more than the 99th percentile of what rounding alone makes.

    Args:
        file: a floor measured before, also in place of that of a checkpoint. Null: ``noise_floor.json`` in the run
            directory at a fresh start, where there is one.
        tokens: sampled tokens of the first iteration to measure, in whole rollouts. 0: never; rules then take rounding
            to be none.
        share: warn where at least this share of the anchors sits inside the floor.
        weight_share: warn where at least this share of what weights move does.

    Raises:
        UserError: an argument out of range; in ``setup``, a ``file`` that cannot be read or holds for another precision
            or credit rule.
    """

    def __init__(self, file: str | None = None, tokens: int = 1024, share: float = 0.1, weight_share: float = 0.5):
        if tokens < 0:
            raise UserError(f"noise_floor.tokens={tokens} must not be negative")
        for name, value in (("share", share), ("weight_share", weight_share)):
            if not 0 < value <= 1:
                raise UserError(f"noise_floor.{name}={value} must lie in (0, 1]")
        self.file = file
        self.tokens = tokens
        self.share = share
        self.weight_share = weight_share
        self._given: Floor | None = None  # out of a file
        self._kept: dict[str, Any] | None = None  # out of a checkpoint: a floor, and what it holds for
        self._conditions: dict[str, Any] = {}
        self._floor: Floor | None = None  # of this run
        self._anchors = [0.0, 0.0]  # since the last verdict: anchors, and those of them inside the floor
        self._moved = [0.0, 0.0, 0.0]  # since the last verdict: tokens, distances of weights, and of those inside it
        self._warned = {"anchors": False, "weights": False}
        self._due = False
        self._seen: list[Tensor] = []  # of this iteration, for each micro-batch: the five counts above

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        rule: Any = pl_module.credit
        if stage != "fit" or not rule.needs_teacher:
            return
        self._conditions = conditions(trainer, pl_module)
        path = Path(trainer.default_root_dir) / FILE if self.file is None else Path(self.file)
        if self.file is None and not path.exists():
            return
        try:
            floor, found = floor_from(path)
            text = self._misfit(found)
            if text:
                raise UserError(f"{path} was measured with {text}; measure again with gear-lightning noise-floor")
            self._given = floor
        except UserError as error:
            if self.file is not None:
                raise
            rank_zero_warn(f"{error}. It is not used.")

    def _misfit(self, found: dict[str, Any]) -> str:
        """What a floor was measured with that is not this run's."""
        now = self._conditions
        return ", ".join(f"{name} {found.get(name)} (here {now[name]})" for name in now if found.get(name) != now[name])

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not pl_module.credit.needs_teacher:
            return
        kept, self._kept = self._kept, None
        wanted = self.file is None and (self.tokens > 0 or self._given is not None)
        if wanted and kept is not None and not self._misfit(kept):
            self._take(Floor(**kept["floor"]), pl_module)
        elif self._given is not None:
            self._take(self._given, pl_module)

    def _take(self, floor: Floor, module: Any) -> None:
        self._floor = floor
        module.noise = floor.rounding(module.credit)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._seen = []
        self._due = pl_module.credit.needs_teacher and self._floor is None and self.tokens > 0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: RolloutBatch, batch_idx: int) -> None:
        if not self._due:
            return
        self._due = False
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        floor = measure_floor(
            pl_module,
            chosen(data.rows, data.group_size, self.tokens),
            micro_batch_size=data.micro_batch_size,
            temperature=batch.temperature,
            context=trainer.strategy.precision_plugin.train_step_context,
        )
        if floor is not None:  # else no rollout of this iteration has a sampled token; the next one may
            self._take(floor, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        if self._floor is None or batch.inner_epoch:
            return
        credit, weighed = outputs["credit"], batch.action_mask & batch.privileged[:, None]
        anchors = credit.divergence[anchor_tokens(pl_module.credit, credit)].abs()
        moved = weight_spread(credit, weighed)[weighed].double()
        counts = [
            torch.tensor(float(len(anchors))),
            (anchors <= self._floor.divergence).sum(),
            torch.tensor(float(len(moved))),
            moved.sum(),
            moved[moved <= self._floor.weights].sum(),
        ]
        self._seen.append(torch.stack([count.to(moved) for count in counts]))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._floor is None:
            return
        seen = torch.stack(self._seen).sum(0) if self._seen else torch.zeros(5, dtype=torch.float64)
        seen = trainer.strategy.reduce(seen.to(pl_module.device), reduce_op="sum")
        anchors, inside, tokens, moved, in_noise = seen.tolist()
        pl_module.log("credit/noise_p99", self._floor.divergence, batch_size=1, sync_dist=True)
        if anchors:
            pl_module.log("credit/anchors_in_noise", inside / anchors, batch_size=1, sync_dist=True)
        if moved:
            pl_module.log("credit/weights_in_noise", in_noise / moved, batch_size=1, sync_dist=True)
        self._anchors = [self._anchors[0] + anchors, self._anchors[1] + inside]
        self._moved = [self._moved[0] + tokens, self._moved[1] + moved, self._moved[2] + in_noise]
        rule, precision = type(pl_module.credit).__name__, str(trainer.precision)
        if self._anchors[0] >= ANCHORS:
            self._judge_anchors(rule, precision, self._floor.divergence)
            self._anchors = [0.0, 0.0]
        if self._moved[0] >= TOKENS:
            self._judge_weights(rule, precision, self._floor)
            self._moved = [0.0, 0.0, 0.0]

    def _judge_anchors(self, rule: str, precision: str, floor: float) -> None:
        anchors, inside = self._anchors
        if self._warned["anchors"] or inside < self.share * anchors:
            return
        self._warned["anchors"] = True
        rank_zero_warn(
            f"{inside:.0f} of {anchors:.0f} anchors of {rule} ({inside / anchors:.0%}) sit inside the noise floor: "
            f"with equal weights and nothing privileged the two forwards already differ by {floor:.2g} nats (p99) in "
            f"{precision}, so these anchors mark rounding, not departures. Use a wider trainer.precision, or a "
            f"model.credit.anchor_floor above {floor:.2g}; see `gear-lightning noise-floor` with this config."
        )

    def _judge_weights(self, rule: str, precision: str, floor: Floor) -> None:
        tokens, moved, inside = self._moved
        if self._warned["weights"] or moved < MOVED * tokens or inside < self.weight_share * moved:
            return
        self._warned["weights"] = True
        rank_zero_warn(
            f"{inside / moved:.0%} of what the weights of {rule} move sits inside the noise floor: with equal weights "
            f"and nothing privileged, rounding in {precision} ({floor.divergence:.2g} nats, p99) already puts weights "
            f"up to {floor.weights:.2g} (p99) from the median of their rollout, so most of this credit is rounding. "
            "Use a wider trainer.precision, or a teacher that says more (gear-lightning teacher-check); else plain "
            "GRPO (--config configs/credit/grpo.yaml) does the same for less; see `gear-lightning noise-floor` with "
            "this config."
        )

    def state_dict(self) -> dict[str, Any]:
        kept = None if self._floor is None else {**self._conditions, "floor": self._floor.plain()}
        return {"floor": kept, "anchors": self._anchors, "moved": self._moved, "warned": self._warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "moved" not in state_dict:  # of a version that gave rules no floor: measured anew
            return
        self._kept = state_dict["floor"]
        self._anchors, self._moved = list(state_dict["anchors"]), list(state_dict["moved"])
        self._warned = dict(state_dict["warned"])
