"""Measures before training whether the teacher's divergence contains information about the task.

The teacher scores rollouts of the policy with their task's own reference, and again with another task's reference. The
part of the divergence that appears with both references comes from the teacher's style when it sees privileged text;
only the part that needs the task's own reference is knowledge of the task. In addition, the divergence should be higher
in failed rollouts and at wrong decisions, if these are known.
"""

from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..batch import collate
from ..data import RolloutDataModule, make_row
from ..environments.base import Task
from ..errors import UserError
from ..learning.token_stats import token_stats
from ..lens.difference import auc, onset, rank_correlation
from ..rollout import Rollout
from ..teacher import TeacherOptions, privileged_text, shown_as

FILE = "teacher_check.json"
FORMAT = 1
VIEWS = ("own", "other")


@dataclass(frozen=True)
class Scored:
    """A rollout and the teacher's log-ratios at its t tokens.

    Attributes:
        own: log p_policy - log p_teacher at the sampled token, with the task's own reference; nats.
        other: the same with another task's reference.
        counts: True on sampled tokens, except stop tokens.
        decisions: 1 on tokens of right decisions, -1 on those of wrong ones, 0 elsewhere.
        success: whether the rollout solved its task.
    """

    own: Float[Tensor, " t"]
    other: Float[Tensor, " t"]
    counts: Bool[Tensor, " t"]
    decisions: Tensor
    success: bool


def pairs_of(tasks: list[Task], options: TeacherOptions) -> dict[str, Task]:
    """Return each task with the text of the next task whose text differs, by task id (see `shown_as`).

    Raises:
        UserError: all tasks have the same text, or one has none.
    """
    texts = [privileged_text(task, options) for task in tasks]
    if (bare := next((task for task, text in zip(tasks, texts, strict=True) if text is None), None)) is not None:
        raise UserError(f"task {bare.id} has no {options.shows}, but model.teacher.shows={options.shows} needs one")
    found = {}
    for i, task in enumerate(tasks):
        others = (j % len(tasks) for j in range(i + 1, i + len(tasks)))
        there = next((j for j in others if texts[j] != texts[i]), None)
        if there is None:
            raise UserError(f"all {len(tasks)} tasks have the same {options.shows}, so there is none to compare with")
        found[task.id] = shown_as(task, tasks[there])
    return found


@torch.no_grad()
def score(module: Any, rollouts: list[Rollout], pairs: dict[str, Task], temperature: float) -> list[Scored]:
    """Score rollouts with the policy, and with the teacher in both views. The caller provides the precision context.

    Args:
        module: the module with policy and teacher.
        rollouts: rollouts of one micro-batch.
        pairs: see `pairs_of`.
        temperature: sampling temperature.

    Returns:
        The scores of the rollouts of which neither privileged text was dropped for its length.
    """
    prompts: dict[str, list[list[int]]] = {view: [] for view in VIEWS}
    kept = []
    for rollout in rollouts:
        opening = rollout.prompt
        response = len(rollout.tokens) - rollout.prompt_length
        views = (rollout.task, pairs[rollout.task.id])
        made = [module.privileged_prompt(task, opening, response=response) for task in views]
        if not any(dropped for _, dropped in made):
            kept.append(rollout)
            for view, (ids, _) in zip(VIEWS, made, strict=True):
                prompts[view].append(ids)
    if not kept:
        return []
    batches = {
        view: collate(
            [make_row(r, p, 1.0, 0, i) for i, (r, p) in enumerate(zip(kept, prompts[view], strict=True))],
            step_tokens=1,
            step_rollouts=1,
            temperature=temperature,
        ).to(module.device)
        for view in VIEWS
    }
    batch = batches["own"]
    policy = token_stats(module.policy, batch.tokens, batch.valid, batch.action_mask, temperature=temperature)
    gaps = {
        view: (policy.logprobs - module.teacher.score(module.policy, batches[view], batch.action_mask).logprobs).cpu()
        for view in VIEWS
    }
    counts, decisions = (batch.action_mask & ~batch.stop_mask).cpu(), batch.decisions.cpu()
    return [Scored(gaps["own"][i], gaps["other"][i], counts[i], decisions[i], r.success) for i, r in enumerate(kept)]


def summary(scored: list[Scored]) -> dict[str, Any]:
    """Return the results for scored rollouts as plain data.

    Returns:
        ``rollouts``, ``tokens``, ``solved``; ``shared``: Spearman's rank correlation of the two views over all tokens;
        and for each view ``size`` (mean absolute log-ratio, nats) and areas under the ROC curve, null if there is
        nothing to compare: ``first_wrong`` (tokens of first wrong decisions versus those of right decisions before
        them), ``last`` (last token of failed versus solved rollouts) and ``mean`` (mean log-ratio of failed versus
        solved rollouts).

    Raises:
        UserError: nothing was sampled, or the log-probs are not finite.
    """
    there = [s for s in scored if s.counts.any()]
    if not there:
        raise UserError("no rollout has sampled tokens and a reference that fits, so there is nothing to measure")
    flat = {view: torch.cat([getattr(s, view)[s.counts] for s in there]).double() for view in VIEWS}
    if not all(values.isfinite().all() for values in flat.values()):
        raise UserError("the model's log-probs are not finite in this precision; use a wider one (trainer.precision)")
    result: dict[str, Any] = {
        "rollouts": len(there),
        "tokens": len(flat["own"]),
        "solved": sum(s.success for s in there),
        "shared": rank_correlation(flat["own"], flat["other"]),
    }
    for view in VIEWS:
        wrong, right, sides = [], [], {True: ([], []), False: ([], [])}
        for s in there:
            gap, (first, before) = getattr(s, view), onset(s.decisions)
            wrong.append(gap[first])
            right.append(gap[before])
            last, mean = sides[s.success]
            last.append(gap[s.counts][-1])
            mean.append(gap[s.counts].mean())
        result[view] = {
            "size": float(flat[view].abs().mean()),
            "first_wrong": auc(torch.cat(wrong), torch.cat(right)),
            **{
                name: auc(_stack(sides[False][place]), _stack(sides[True][place]))
                for place, name in enumerate(("last", "mean"))
            },
        }
        result["first_wrong"], result["right_before"] = len(torch.cat(wrong)), len(torch.cat(right))
    return result


def _stack(values: list[Tensor]) -> Tensor:
    return torch.stack(values) if values else torch.zeros(0)


class CheckTeacher(L.Callback):
    """Generates the rollouts of one iteration, scores them instead of training, then ends the fit."""

    def __init__(self):
        self.result: dict[str, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        next(iter(data.train_dataloader()))  # generates the rollouts
        self.result = {"format": FORMAT, "shows": pl_module.teacher_options.shows, **self._measure(trainer, pl_module)}
        trainer.should_stop = True

    def _measure(self, trainer: L.Trainer, module: Any) -> dict[str, Any]:
        data: RolloutDataModule = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        assert data.generator is not None
        pairs = pairs_of([group.task for group in data.groups], module.teacher_options)
        rollouts = [r for group in data.groups for r in group.rollouts if r.learnable]
        rollouts.sort(key=lambda r: len(r.tokens))  # similar lengths together
        scored: list[Scored] = []
        for start in range(0, len(rollouts), data.micro_batch_size):
            part = rollouts[start : start + data.micro_batch_size]
            with trainer.strategy.precision_plugin.train_step_context():
                scored += score(module, part, pairs, data.generator.temperature)
        result, left_out = summary(scored), len(rollouts) - len(scored)
        made = sum(len(group.rollouts) for group in data.groups)
        empty = made - left_out - result["rollouts"]
        return {"tasks": len(data.groups), "left_out": left_out, "empty": empty, **result}


READING = (
    "AUC: probability that the divergence is higher there than on right decisions before it, or than in a solved",
    "rollout; 0.5 is chance. If the divergence is as high, at the same tokens, with another task's text, it shows the",
    "teacher's style and not knowledge of the task: try another model.teacher.template or shows, or use plain GRPO.",
    "The means show whether the teacher knows which rollouts fail; to place credit within one it must also know where.",
)


def table(result: dict[str, Any]) -> str:
    """Return a measurement as a text table, with an explanation."""
    rows = [
        ("size of the divergence (mean, absolute), nats", "size"),
        ("AUC of the first wrong decision", "first_wrong"),
        ("AUC of the last token of failed rollouts", "last"),
        ("AUC of the mean of failed rollouts", "mean"),
    ]
    lines = [
        (
            f"{result['rollouts']} rollouts of {result['tasks']} tasks, {result['solved']} solved, "
            f"{result['tokens']} tokens"
        ),
        *(
            [f"first wrong decisions: {result['first_wrong']} tokens; right ones before them: {result['right_before']}"]
            if result["first_wrong"]
            else []
        ),
        *([f"{result['empty']} more excluded: only a stop token, or a failed environment"] if result["empty"] else []),
        *([f"{result['left_out']} excluded: their privileged prompts are too long"] if result["left_out"] else []),
        *(
            ["AUCs need solved and failed rollouts: use more --tasks, or a policy that solves some of them."]
            if result["solved"] in (0, result["rollouts"])
            else []
        ),
        "",
        f"{'the teacher sees the ' + result['shows'] + ' of':<46}{'the task':>10}{'another':>10}",
    ]
    for what, name in rows:
        cells = ["-" if result[view][name] is None else f"{result[view][name]:.2f}" for view in VIEWS]
        lines.append(f"{what:<46}{cells[0]:>10}{cells[1]:>10}")
    shared = "-" if result["shared"] is None else f"{result['shared']:.2f}"
    return "\n".join([*lines, f"{'rank correlation of the two':<46}{shared:>10}", "", *READING])
