"""Measure the rounding error, pass it to the credit rule, and warn if credit is no larger than it."""

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

ANCHORS, TOKENS = 16, 256  # minimum counts for a decision about a warning
MOVED = 0.005  # minimum mean distance of weights from their rollout's median for a warning


class NoiseFloor(L.Callback):
    """Passes the rounding error to the credit rule, and warns if anchors or weights do not exceed it (once for each).

    In low precision the log-probs of policy and teacher differ even if the teacher gets no privileged text. The noise
    floor is the size of this difference. It is measured before the first update: two forwards without gradients, with
    equal weights and no privileged text, on some rollouts of the first iteration. Or it is read from
    ``RUN/noise_floor.json``, which `gear-lightning noise-floor` writes. Its 99th percentile is a constant of the run,
    equal on all ranks and stored in checkpoints. Credit rules that normalize away the size of a signal compare that
    size with the constant (`gear_lightning.gear.above_noise`), so that they do not turn rounding into credit. Rules
    that keep the size (GEAR's default, RLSD) do not use it.

    Logs ``credit/noise_p99`` (nats, of the rule's divergence), ``credit/anchors_in_noise`` (share of the anchors whose
    divergence is not above it) and ``credit/weights_in_noise``: of the summed distances of weights from the median
    weight of their rollout, the share on tokens whose distance is not above the 99th percentile of rounding alone.

    Args:
        file: file with a noise floor measured earlier; it also replaces the floor of a checkpoint. Null:
            ``noise_floor.json`` in the run directory at a fresh start, if it exists.
        tokens: sampled tokens of the first iteration to measure, in whole rollouts. 0: do not measure; rules then
            assume no rounding error.
        share: warn if at least this share of the anchors is inside the noise floor.
        weight_share: warn if at least this share of the weights' movement is inside the noise floor.

    Raises:
        UserError: an argument is out of range; in ``setup``: ``file`` cannot be read or was measured with another
            precision or credit rule.
    """

    def __init__(self, file: str | None = None, tokens: int = 1024, share: float = 0.1, weight_share: float = 0.5):
        if tokens < 0:
            raise UserError(f"noise_floor.tokens={tokens}: must not be negative")
        for name, value in (("share", share), ("weight_share", weight_share)):
            if not 0 < value <= 1:
                raise UserError(f"noise_floor.{name}={value}: must be in (0, 1]")
        self.file = file
        self.tokens = tokens
        self.share = share
        self.weight_share = weight_share
        self._given: Floor | None = None  # from a file
        self._kept: dict[str, Any] | None = None  # from a checkpoint: a floor and the conditions of its measurement
        self._conditions: dict[str, Any] = {}
        self._floor: Floor | None = None  # the floor of this run
        self._anchors = [0.0, 0.0]  # since the last check: anchors, and anchors inside the floor
        # since the last check: tokens, summed distances of weights, and summed distances inside the floor
        self._moved = [0.0, 0.0, 0.0]
        self._warned = {"anchors": False, "weights": False}
        self._due = False
        self._seen: list[Tensor] = []  # the five counts above, for each micro-batch of this iteration

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
            text = self._differences(found)
            if text:
                raise UserError(f"{path} was measured with {text}; measure again with gear-lightning noise-floor")
            self._given = floor
        except UserError as error:
            if self.file is not None:
                raise
            rank_zero_warn(f"{error}. It is not used.")

    def _differences(self, found: dict[str, Any]) -> str:
        """Return the conditions of a measurement that differ from those of this run, as text."""
        now = self._conditions
        return ", ".join(f"{name} {found.get(name)} (here {now[name]})" for name in now if found.get(name) != now[name])

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not pl_module.credit.needs_teacher:
            return
        kept, self._kept = self._kept, None
        wanted = self.file is None and (self.tokens > 0 or self._given is not None)
        if wanted and kept is not None and not self._differences(kept):
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
        if floor is not None:  # None: no rollout of this iteration has a sampled token; try again in the next one
            self._take(floor, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: RolloutBatch, batch_idx: int
    ) -> None:
        if self._floor is None or batch.inner_epoch:
            return
        credit, weighed = outputs["credit"], pl_module.credit.scope(batch) & batch.privileged[:, None]
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
            self._check_anchors(rule, precision, self._floor.divergence)
            self._anchors = [0.0, 0.0]
        if self._moved[0] >= TOKENS:
            self._check_weights(rule, precision, self._floor)
            self._moved = [0.0, 0.0, 0.0]

    def _check_anchors(self, rule: str, precision: str, floor: float) -> None:
        anchors, inside = self._anchors
        if self._warned["anchors"] or inside < self.share * anchors:
            return
        self._warned["anchors"] = True
        rank_zero_warn(
            f"{inside:.0f} of {anchors:.0f} anchors of {rule} ({inside / anchors:.0%}) are inside the noise floor: "
            f"with equal weights and no privileged text the two forwards already differ by {floor:.2g} nats (p99) in "
            f"{precision}, so these anchors mark rounding, not departures. Use a higher trainer.precision, or a "
            f"model.credit.anchor_floor above {floor:.2g}; see `gear-lightning noise-floor` with this config."
        )

    def _check_weights(self, rule: str, precision: str, floor: Floor) -> None:
        tokens, moved, inside = self._moved
        if self._warned["weights"] or moved < MOVED * tokens or inside < self.weight_share * moved:
            return
        self._warned["weights"] = True
        rank_zero_warn(
            f"{inside / moved:.0%} of the movement of the weights of {rule} is inside the noise floor: with equal "
            f"weights and no privileged text, rounding in {precision} ({floor.divergence:.2g} nats, p99) already moves "
            f"weights up to {floor.weights:.2g} (p99) from the median of their rollout, so most of this credit is "
            "rounding. Use a higher trainer.precision, or a more informative teacher (gear-lightning teacher-check); "
            "otherwise plain GRPO (--config configs/credit/grpo.yaml) has the same effect at a lower cost; see "
            "`gear-lightning noise-floor` with this config."
        )

    def state_dict(self) -> dict[str, Any]:
        kept = None if self._floor is None else {**self._conditions, "floor": self._floor.plain()}
        return {"floor": kept, "anchors": self._anchors, "moved": self._moved, "warned": self._warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "moved" not in state_dict:  # written by a version without this floor: measure again
            return
        self._kept = state_dict["floor"]
        self._anchors, self._moved = list(state_dict["anchors"]), list(state_dict["moved"])
        self._warned = dict(state_dict["warned"])
