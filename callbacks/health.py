"""Detect runs that cannot learn, and report how to fix them."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from gear_lightning.errors import UserError
from gear_lightning.rollout import STATUSES

FIRST_TOKEN_GAP = 1.0  # nats
ADVICE = (
    "Every rollout of a task gets the same reward, so there is nothing to learn from. Make the tasks easier or harder, "
    "raise data.group_size or generation.sampling.temperature, warm-start the policy (warm_start), or inspect its "
    "rollouts with `gear-lightning credit RUN --list`."
)
BLIND = (
    "model.teacher.shows={shows}, and no rollout had {lacks} for {n} iterations: the teacher sees nothing that the "
    "policy does not see, and {user} has no effect. Use model.teacher.shows=reference (or answer), or an environment "
    "whose steps return feedback (Step.info)"
)


class Health(L.Callback):
    """Warns about runs that cannot learn, and later stops them.

    It warns, and later stops the run, if all rewards of every group are equal for many iterations in a row. It does not
    check this with a ``model.distillation``, which needs no rewards.

    It does the same if ``model.teacher.shows`` is ``feedback`` or ``peer_or_feedback`` and no rollout had any. It only
    warns if the run also learns without the teacher: with an objective under ``Uniform`` credit, or until a peer is
    found.

    It warns once for each kind of failure that excludes more than half of an iteration's rollouts from learning.
    Excluded rollouts give no information about the policy, and a policy that causes such failures is not corrected.

    A stopped run saves its state and ends with an error. It resumes from that checkpoint only if the checkpoint is
    given by name.

    It also stops the run after several optimizer steps in a row with a non-finite gradient (each such step is skipped).
    It warns once if teacher and policy disagree far more at the first response token than elsewhere, which indicates
    that the two prompts end differently.

    Args:
        warn_after: iterations with equal rewards, or without feedback, before the warning.
        stop_after: iterations with equal rewards, or without feedback, before the run stops.
        stop_after_skipped: optimizer steps skipped in a row before the run stops.
    """

    def __init__(self, warn_after: int = 5, stop_after: int = 20, stop_after_skipped: int = 5):
        counts = {"warn_after": warn_after, "stop_after": stop_after, "stop_after_skipped": stop_after_skipped}
        for name, count in counts.items():
            if count < 1:
                raise UserError(f"health.{name}={count}: must be at least 1")
        self.warn_after = warn_after
        self.stop_after = stop_after
        self.stop_after_skipped = stop_after_skipped
        self._no_spread = 0
        self._no_feedback = 0
        self._rows = [0, 0]  # rollouts of this iteration and rank: all, and those whose teacher saw more
        self._gaps = [0.0, 0.0, 0.0, 0.0]  # sum and count of |log-ratio| at first response tokens, and at all others
        self._misaligned = False
        self.why: str | None = None  # why this callback has ended the run
        self._reported: set[str] = set()  # kinds of failures already reported

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.why = None

    def _end(self, module: Any, why: str) -> None:
        """End the run permanently after saving its state."""
        self.why = why
        module.fail(UserError(why))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.steps_after(batch_idx):  # before its own first step a resumed run holds the checkpoint's count
            try:  # raises on all ranks or on none: all ranks skip the same steps
                pl_module.check_steps(self.stop_after_skipped)
            except UserError as error:
                pl_module.fail(error)
        if outputs["teacher"] is not None and not batch.inner_epoch:
            real = batch.index >= 0
            self._rows[0] += int(real.sum())
            self._rows[1] += int((real & batch.privileged).sum())
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
                "elsewhere: their prompts seem to end differently (a <think> tag on one side?). Check "
                "model.teacher.template and model.chat.template_arguments."
            )
        self._gaps = [0.0, 0.0, 0.0, 0.0]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        stats = trainer.datamodule.stats  # pyright: ignore[reportAttributeAccessIssue]
        mine = [stats.groups - stats.zero_spread, self._rows[0], self._rows[1] + stats.overlong]
        mine += [sum(stats.statuses.values()), *(stats.left_out[status] for status in STATUSES)]
        counts = torch.tensor(mine, device=trainer.strategy.root_device)
        with_spread, rows, informed, rollouts, *left_out = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        self._rows = [0, 0]
        self._check_left_out(rollouts, dict(zip(STATUSES, left_out, strict=True)))
        self._check_alignment()
        self._check_teacher(pl_module, rows, informed)
        distils = getattr(pl_module, "distillation", None) is not None  # distillation needs no rewards
        self._no_spread = 0 if with_spread or distils else self._no_spread + 1
        if self._no_spread == self.warn_after:
            rank_zero_warn(f"No group has had any spread of rewards for {self._no_spread} iterations. {ADVICE}")
        if self._no_spread >= self.stop_after:
            self._end(pl_module, f"no group had any spread of rewards for {self._no_spread} iterations. {ADVICE}")

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if pl_module.skipped_in_a_row:
            rank_zero_warn(
                f"The gradients of the last {pl_module.skipped_in_a_row} optimizer steps of this run were not finite. "
                "They did not change the policy, which may be unusable. train/skipped_steps shows when this began."
            )

    def _check_left_out(self, rollouts: int, left_out: dict[str, int]) -> None:
        """Warn about failures that exclude more than half of the rollouts from learning."""
        for status, count in left_out.items():
            if 2 * count > rollouts and status not in self._reported:
                self._reported.add(status)
                cause = (
                    "data.truncated=mask; raise generation.budgets, or use data.truncated=learn"
                    if status == "truncated"
                    else "see `error` in RUN/rollouts"
                )
                rank_zero_warn(
                    f"{count} of the iteration's {rollouts} rollouts are left out of learning as {status} ({cause})."
                )

    def _check_teacher(self, module: Any, rows: int, informed: int) -> None:
        """Count iterations without privileged text for the teacher; warn or stop if there are too many in a row.

        Args:
            module: the `GearModule`.
            rows: rollouts of the iteration that a teacher scored, over all processes.
            informed: those that had privileged text, even if it was dropped for its length.
        """
        if not rows or "feedback" not in (shows := module.teacher_options.shows):
            return
        self._no_feedback = 0 if informed else self._no_feedback + 1
        user = module.credit if module.credit.needs_teacher else module.distillation
        lacks = "feedback" if shows == "feedback" else "a successful peer or feedback"
        text = BLIND.format(shows=shows, lacks=lacks, n=self._no_feedback, user=type(user).__name__)
        # a later iteration may have a peer, and until then credit is uniform
        idle = module.objective is None or (module.credit.needs_teacher and shows == "feedback")
        if self._no_feedback >= self.stop_after and idle:
            self._end(module, text)
        if self._no_feedback == self.warn_after:
            rank_zero_warn(text)

    def state_dict(self) -> dict[str, Any]:
        return {"barren": self._no_spread, "blind": self._no_feedback, "rows": self._rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._no_spread, self._no_feedback = state_dict["barren"], state_dict.get("blind", 0)
        self._rows = list(state_dict.get("rows", [0, 0]))
