"""The teacher: the policy's own weights (live, frozen or averaged), shown a prompt that also holds the reference."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .batch import RolloutBatch, TokenStats
from .chat import Chat
from .environments.base import Message, Task
from .errors import UserError
from .lora import POLICY, TEACHER, active, adapter_parameters, add_teacher, is_adapted
from .token_stats import token_stats


@dataclass(frozen=True)
class TeacherOptions:
    """What the teacher is and what it sees.

    Args:
        weights: ``ema`` of the policy's weights, ``live`` (the policy itself), or ``frozen`` at the start of training.
        rate: of the average: teacher = (1 - rate) teacher + rate policy. Only for ``ema``.
        every: optimizer steps from one update of the average to the next; with ``rate`` 1, a copy every so many steps
            (RLSD's released script: 20). Only for ``ema``.
        shows: the privileged text: the task's ``reference`` (a worked solution where there is one), its bare
            ``answer``, or the transcript of a successful ``peer`` of the rollout's group (SDPO, SC-GRPO; never the
            rollout itself). Without a peer, the reference, or nothing where there is none (weights are then 1).
        template: privileged text, appended to the task's last user message; ``{reference}`` stands for the reference.
        max_prompt: longest privileged prompt, tokens. The question is never cut.
        overlong: what happens to a longer one: ``drop`` the reference for that rollout (its weights become 1, and
            ``teacher/overlong`` counts it), or stop with an ``error``.
    """

    weights: Literal["ema", "live", "frozen"] = "ema"
    rate: float = 0.05
    every: int = 1
    shows: Literal["reference", "answer", "peer"] = "reference"
    template: str = (
        "\n\nHere is a correct reference solution:\n{reference}\n\nNow solve the problem yourself, in your own words."
    )
    max_prompt: int = 4096
    overlong: Literal["drop", "error"] = "drop"

    def __post_init__(self):
        if not 0 < self.rate <= 1:
            raise UserError(f"teacher.rate={self.rate} must lie in (0, 1]")
        if self.every < 1:
            raise UserError(f"teacher.every={self.every} must be at least 1")
        if self.weights != "ema" and (self.rate, self.every) != (TeacherOptions.rate, TeacherOptions.every):
            raise UserError(f"teacher.rate and teacher.every do nothing with teacher.weights={self.weights}")
        if "{reference}" not in self.template:
            raise UserError("teacher.template must contain {reference}")


def privileged_text(task: Task, options: TeacherOptions, peer: list[Message] | None = None) -> str | None:
    """What the teacher sees beyond the policy, None for nothing. The only reader of ``Task.reference``.

    Args:
        task: the task.
        options: ``shows`` says what is shown.
        peer: what a successful rollout of the same group said and saw after the prompt.
    """
    if options.shows == "answer":
        answer = task.meta.get("answer")
        return None if answer is None else str(answer)
    shown = peer if options.shows == "peer" and peer is not None else task.reference
    return shown if isinstance(shown, str) or shown is None else "\n".join(map(_line, shown))


def privileged_prompt(
    task: Task, opening: list[Message], chat: Chat, options: TeacherOptions, peer: list[Message] | None = None
) -> tuple[list[int], bool]:
    """Ids of the prompt with the privileged text in it.

    Args:
        task: without privileged text the policy's own prompt comes back.
        opening: the messages that the policy's rollout began with.
        chat: messages to ids.
        options: what is shown, template and length policy.
        peer: see `privileged_text`.

    Returns:
        The ids, and whether the reference was dropped for length.

    Raises:
        UserError: too long, under ``overlong=error``.
    """
    plain = chat.prompt(opening, task.tools)
    text = privileged_text(task, options, peer)
    if text is None:
        return plain, False
    last = max((i for i, m in enumerate(opening) if m["role"] == "user"), default=len(opening) - 1)
    hinted = dict(opening[last], content=opening[last]["content"] + options.template.replace("{reference}", text))
    ids = chat.prompt([*opening[:last], hinted, *opening[last + 1 :]], task.tools)
    if len(ids) <= options.max_prompt:
        return ids, False
    if options.overlong == "error":
        raise UserError(f"task {task.id}: its privileged prompt has {len(ids)} tokens, max_prompt={options.max_prompt}")
    return plain, True


def _line(message: Message) -> str:
    calls = [f"{c['function']['name']}({c['function']['arguments']})" for c in message.get("tool_calls") or []]
    return " ".join([f"{message['role']}:", message.get("content") or "", *calls]).strip()


class _Shadow(nn.Module):
    """Float32 copies of parameters, which stay float32 when the module around them changes its precision."""

    def __init__(self, parameters: list[Tensor]):
        super().__init__()
        self.values = nn.ParameterList([nn.Parameter(p.detach().float(), requires_grad=False) for p in parameters])

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class Teacher(nn.Module):
    """Holds the teacher's weights and scores rollouts with them.

    Of a policy with adapters it holds no copy: the average is a second adapter inside the policy, and the frozen
    teacher is the policy without its adapters, which start without effect.

    Args:
        policy: the model at the start of training.
        options: see `TeacherOptions`.
        low_precision: the policy will be cast below float32; then the average is kept in float32 beside the copy that
            scores, for a bfloat16 average stops moving.
    """

    def __init__(self, policy: nn.Module, options: TeacherOptions, *, low_precision: bool = False):
        super().__init__()
        self.options = options
        self.model = None
        self.shadow = None
        self.adapted = is_adapted(policy)
        if self.adapted and options.weights == "ema":
            add_teacher(policy)
        elif not self.adapted and options.weights != "live":
            self.model = copy.deepcopy(policy).requires_grad_(False).eval()
        if options.weights == "ema" and low_precision:
            self.shadow = _Shadow(self._pair(policy)[1])

    def train(self, mode: bool = True) -> "Teacher":
        """The teacher never trains: no dropout."""
        return super().train(False)

    def _pair(self, policy: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """The average's parameters that score, and those of the policy that they follow."""
        if self.adapted:
            return [*adapter_parameters(policy, TEACHER)], [*adapter_parameters(policy, POLICY)]
        assert self.model is not None
        return [*self.model.parameters()], [*policy.parameters()]

    @torch.no_grad()
    def update(self, policy: nn.Module, step: int) -> None:
        """Follow the policy after its ``step``-th optimizer step."""
        if self.options.weights != "ema" or step % self.options.every:
            return
        scoring, newest = self._pair(policy)
        if self.shadow is None:
            get_ema_multi_avg_fn(1 - self.options.rate)(scoring, newest, 0)
            return
        for average, new, low in zip(self.shadow.values, newest, scoring, strict=True):  # one float32 copy at a time
            average.lerp_(new.float(), self.options.rate)
            low.copy_(average)

    @torch.no_grad()
    def score(
        self, policy: nn.Module, batch: RolloutBatch, wanted: Bool[Tensor, "batch seq"], top_ids: Tensor | None = None
    ) -> TokenStats:
        """Stats of the wanted tokens in the teacher's view, put back at the policy's positions."""
        model = policy if self.model is None else self.model
        where = torch.arange(batch.tokens.shape[1], device=batch.tokens.device) + batch.teacher_offset[:, None]
        where = where.clamp(0, batch.teacher_tokens.shape[1] - 1)

        def there(x: Tensor) -> Tensor:  # to the teacher's columns
            out = x.new_zeros((*batch.teacher_tokens.shape, *x.shape[2:]))
            row, column = wanted.nonzero(as_tuple=True)
            out[row, where[row, column]] = x[row, column]
            return out

        weights = nullcontext()
        if self.adapted and self.options.weights != "live":
            weights = active(policy, TEACHER if self.options.weights == "ema" else None)
        training = model.training
        model.eval()
        with weights:
            stats = token_stats(
                model,
                batch.teacher_tokens,
                batch.teacher_valid,
                there(wanted),
                temperature=batch.temperature,
                top_ids=None if top_ids is None else there(top_ids),
            )
        model.train(training)

        def back(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            index = where.reshape(*where.shape, *([1] * (x.dim() - 2))).expand(*where.shape, *x.shape[2:])
            picked = x.gather(1, index)
            return torch.where(wanted.reshape(*wanted.shape, *([1] * (x.dim() - 2))), picked, 0)

        logprobs, entropy = back(stats.logprobs), back(stats.entropy)
        assert logprobs is not None
        assert entropy is not None
        return TokenStats(logprobs, entropy, back(stats.top_ids), back(stats.top_logprobs))
