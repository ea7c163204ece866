"""Watches for runs that cannot learn, and says what to do."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from gear_lightning.errors import UserError

FIRST_TOKEN_GAP = 1.0  # nats
ADVICE = (
    "Every rollout of a task gets the same reward, so there is nothing to learn from. Make the tasks easier or harder, "
    "raise data.group_size or generation.sampling.temperature, warm-start the policy (warm_start), or look at "
    "`gear-lightning credit RUN --list` for what the policy does."
)


class Health(L.Callback):
    """Warns, then stops, when no group has any spread of rewards for many iterations in a row. Not where there is
    a ``model.distillation``, which needs no rewards.

    Also stops on a loss that is not a number, and warns once where the teacher disagrees with the policy far more at
    the first response token than elsewhere: then the two prompts end differently.

    Args:
        warn_after: iterations without spread until a warning.
        stop_after: iterations without spread until the run stops.
    """

    def __init__(self, warn_after: int = 5, stop_after: int = 20):
        if warn_after < 1 or stop_after < 1:
            raise UserError(f"health.warn_after={warn_after} and health.stop_after={stop_after} must be at least 1")
        self.warn_after = warn_after
        self.stop_after = stop_after
        self._barren = 0
        self._gaps = [0.0, 0.0, 0.0, 0.0]  # sum and count of |log-ratio| at first response tokens, and at all others
        self._misaligned = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not torch.isfinite(outputs["loss"]):
            raise UserError(
                f"the loss is {outputs['loss'].item()} in iteration {trainer.current_epoch}; lower the learning rate, "
                "clip gradients (trainer.gradient_clip_val) or use a wider precision"
            )
        if outputs["teacher"] is not None and not batch.inner_epoch:
            mask = batch.action_mask
            gap = (outputs["policy"].logprobs.detach() - outputs["teacher"].logprobs).abs()
            first = mask & (mask.cumsum(-1) == 1)
            for place, part in ((0, first), (2, mask & ~first)):
                self._gaps[place] += float(gap[part].sum())
                self._gaps[place + 1] += float(part.sum())

    def _check_alignment(self) -> None:
        first, firsts, rest, others = self._gaps
        first, rest = first / max(firsts, 1), rest / max(others, 1)
        if firsts >= 8 and first > FIRST_TOKEN_GAP and first > 10 * rest and not self._misaligned:
            self._misaligned = True
            rank_zero_warn(
                f"The teacher and the policy are {first:.2f} nats apart at the first response token and {rest:.2f} "
                "elsewhere: their prompts seem to end differently (a <think> tag on one side?). Look at "
                "model.teacher.template and model.chat.template_arguments."
            )
        self._gaps = [0.0, 0.0, 0.0, 0.0]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        stats = trainer.datamodule.stats  # pyright: ignore[reportAttributeAccessIssue]
        counts = torch.tensor(stats.groups - stats.zero_spread, device=trainer.strategy.root_device)
        with_spread = int(trainer.strategy.reduce(counts, reduce_op="sum"))
        self._check_alignment()
        distils = getattr(pl_module, "distillation", None) is not None  # that needs no rewards
        self._barren = 0 if with_spread or distils else self._barren + 1
        if self._barren == self.warn_after:
            rank_zero_warn(f"No group has had any spread of rewards for {self._barren} iterations. {ADVICE}")
        if self._barren >= self.stop_after:
            raise UserError(f"no group had any spread of rewards for {self._barren} iterations. {ADVICE}")

    def state_dict(self) -> dict[str, int]:
        return {"barren": self._barren}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._barren = state_dict["barren"]
