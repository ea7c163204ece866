"""The teacher: the policy's own weights (live, frozen or averaged) with a privileged prompt.

The privileged prompt also contains a reference, another rollout or feedback.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .batch import RolloutBatch, TokenStats
from .distributed.sharding import is_sharded, local, part_of, rest, stored, whole_of
from .environments.base import Message, Task
from .errors import UserError
from .generation.chat import Chat
from .learning.lora import POLICY, TEACHER, active, adapter_parameters, add_teacher, has_teacher, is_adapted
from .learning.positions import Longest
from .learning.token_stats import token_stats

SHOWN = ("reference", "answer")  # values of `TeacherOptions.shows` that a task has before any rollout


class OverlongError(UserError):
    """A privileged prompt is too long, and ``teacher.overlong=error`` is set."""


@dataclass(frozen=True)
class TeacherOptions:
    """The teacher's weights and its privileged text.

    Args:
        weights: ``ema`` of the policy's weights, ``live`` (the policy itself), or ``frozen`` at the start of training.
        rate: update rate of the average: teacher = (1 - rate) teacher + rate policy. Only for ``ema``.
        every: optimizer steps between two updates of the average; with ``rate`` 1, the teacher is a copy of the policy
            made every this many steps (RLSD's released script: 20). Only for ``ema``.
        shows: the privileged text: the task's ``reference`` (a worked solution, or tool calls, if the task has any),
            its bare ``answer``, the transcript of a successful ``peer`` of the rollout's group, without its reasoning
            (SC-GRPO; never the rollout itself) or the reference if there is no such peer, the environment's
            ``feedback`` on the rollout, or ``peer_or_feedback`` (SDPO): a peer, or the feedback if there is no peer. If
            none of them exists, there is no privileged text: credit weights are then 1, and distillation skips the
            rollout.
        park: keep the teacher's weights in CPU memory between uses; each use copies them to the GPU. Not for ``live``.
        template: privileged text, appended to the task's last user message; ``{reference}`` is replaced by the
            reference, the answer or the peer's transcript.
        feedback_template: the same for feedback; ``{feedback}`` is replaced by it. Only if ``shows`` includes feedback.
        max_prompt: longest privileged prompt, tokens. The question is never truncated.
        overlong: handling of a longer prompt, and of one that together with the response exceeds the model's positions
            (or the length above which its rotary frequencies change): ``drop`` the privileged text for that rollout
            (its weights become 1, distillation skips it, and ``teacher/overlong`` counts it), or stop with an
            ``error``.
    """

    weights: Literal["ema", "live", "frozen"] = "ema"
    rate: float = 0.05
    every: int = 1
    shows: Literal["reference", "answer", "peer", "feedback", "peer_or_feedback"] = "reference"
    park: bool = False
    template: str = (
        "\n\nHere is a correct reference solution:\n{reference}\n\nNow solve the problem yourself, in your own words."
    )
    feedback_template: str = (
        "\n\nAn earlier attempt of yours got this feedback:\n{feedback}\n\nNow solve the problem again, correctly."
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
        if self.park and self.weights == "live":
            raise UserError("teacher.park does nothing with teacher.weights=live: the teacher is the policy itself")
        if "{reference}" not in self.template:
            raise UserError("teacher.template must contain {reference}")
        if "{feedback}" not in self.feedback_template:
            raise UserError("teacher.feedback_template must contain {feedback}")
        if "feedback" not in self.shows and self.feedback_template != TeacherOptions.feedback_template:
            raise UserError(
                f"teacher.feedback_template does nothing with teacher.shows={self.shows}; use shows=feedback or "
                "shows=peer_or_feedback"
            )


def privileged_text(
    task: Task, options: TeacherOptions, peer: list[Message] | None = None, feedback: str | None = None
) -> str | None:
    """Return the text that the teacher reads in addition to the policy's prompt, in its template; None for no text.

    Only this function and `shown_as` read ``Task.reference``.

    Args:
        task: the task.
        options: ``shows`` selects the text.
        peer: messages of a successful rollout of the same group after the prompt.
        feedback: the environment's feedback on the rollout.
    """
    shows, shown = options.shows, None
    if shows == "answer":
        answer = task.meta.get("answer")
        answer = answer[0] if isinstance(answer, list) and answer else answer  # the first of those it accepts
        shown = None if answer is None else str(answer)
    elif shows in ("peer", "peer_or_feedback"):
        shown = peer
    if shows == "reference" or (shows == "peer" and shown is None):
        shown = task.reference
    if shown is not None:
        text = shown if isinstance(shown, str) else "\n".join(map(_line, shown))
        return options.template.replace("{reference}", text)
    if "feedback" in shows and feedback is not None and feedback.strip():
        return options.feedback_template.replace("{feedback}", feedback)
    return None


def shown_as(task: Task, other: Task) -> Task:
    """Return a copy of the task whose teacher is shown another task's reference or answer."""
    return replace(task, reference=other.reference, meta={**task.meta, "answer": other.meta.get("answer")})


def privileged_prompt(
    task: Task,
    opening: list[Message],
    chat: Chat,
    options: TeacherOptions,
    peer: list[Message] | None = None,
    feedback: str | None = None,
    longest: Longest | None = None,
    response: int = 0,
) -> tuple[list[int], bool]:
    """Return the token ids of the prompt that contains the privileged text.

    Args:
        task: without privileged text, the result is the policy's own prompt.
        opening: the first messages of the policy's rollout.
        chat: converts messages to ids.
        options: privileged text, template and length limits.
        peer: see `privileged_text`.
        feedback: see `privileged_text`.
        longest: maximum length of prompt and response together. None: no limit.
        response: tokens that follow the prompt in the teacher's view.

    Returns:
        The ids, and whether the privileged text was dropped because of its length.

    Raises:
        OverlongError: the prompt is too long, and ``overlong=error`` is set.
    """
    plain = chat.prompt(opening, task.tools)
    text = privileged_text(task, options, peer, feedback)
    if text is None:
        return plain, False
    last = max((i for i, m in enumerate(opening) if m["role"] == "user"), default=len(opening) - 1)
    hinted = dict(opening[last], content=opening[last]["content"] + text)
    ids = chat.prompt([*opening[:last], hinted, *opening[last + 1 :]], task.tools)
    fits = longest is None or len(ids) + response <= longest.tokens
    if fits and len(ids) <= options.max_prompt:
        return ids, False
    if options.overlong == "error":
        told = f"task {task.id}: its privileged prompt has {len(ids)} tokens"
        if longest is None or fits:
            raise OverlongError(f"{told}, max_prompt={options.max_prompt}")
        raise OverlongError(
            f"{told}, which with the {response} of the response is more than {longest.why} "
            "(model.teacher.overlong=drop trains on such rollouts without a teacher)"
        )
    return plain, True


def _in_memory_like(part: Tensor, average: Tensor) -> Tensor:
    """Return the average in the same kind of memory as the part that scores."""
    average = average.to(part.device)
    return average.pin_memory() if part.is_pinned() else average


def _line(message: Message) -> str:
    calls = [f"{c['function']['name']}({c['function']['arguments']})" for c in message.get("tool_calls") or []]
    return " ".join([f"{message['role']}:", message.get("content") or "", *calls]).strip()


class Teacher(nn.Module):
    """Holds the teacher's weights, sharded over the ranks like the policy's, and scores rollouts with them.

    For a policy with adapters it holds no copy: the average is a second adapter inside the policy, and the frozen
    teacher is the policy without its adapters, which have no effect at the start.

    Args:
        policy: the model at the start of training.
        options: see `TeacherOptions`.
        low_precision: the weights are below float32; the average is then also kept in float32, next to the copy that
            scores, because a bfloat16 average stops changing. Adapters are float32 themselves.
        duplicate: returns a second model with the policy's values.
    """

    def __init__(
        self,
        policy: nn.Module,
        options: TeacherOptions,
        *,
        low_precision: bool = False,
        duplicate: Callable[[Any], Any] = copy.deepcopy,
    ):
        super().__init__()
        self.options = options
        self.adapted = is_adapted(policy)
        self.low_precision = low_precision and options.weights == "ema" and not self.adapted
        self.parked = False
        self.shadow: list[Tensor] | None = None  # float32 averages of this rank's parts, made at the first update
        self.model = None
        if self.adapted and options.weights == "ema" and not has_teacher(policy):
            if is_sharded(policy):
                raise UserError("with model.lora and a strategy that shards the weights, run fit before validate")
            add_teacher(policy)
        elif not self.adapted and options.weights != "live":
            self.model = duplicate(policy).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Keep the teacher in evaluation mode (no dropout), whatever ``mode`` is."""
        return super().train(False)

    def _pair(self, policy: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Return the average's parameters that score, and the policy's parameters that they follow."""
        if self.adapted:
            return [*adapter_parameters(policy, TEACHER)], [*adapter_parameters(policy, POLICY)]
        assert self.model is not None
        return [*self.model.parameters()], [*policy.parameters()]

    @torch.no_grad()
    def update(self, policy: nn.Module, step: int) -> None:
        """Update the average after the policy's ``step``-th optimizer step. Each rank averages its own shards."""
        if self.options.weights != "ema" or step % self.options.every:
            return
        rest(policy)
        if self.model is not None:
            rest(self.model)
        parts, newest = ([local(p) for p in side] for side in self._pair(policy))
        if self.low_precision:
            averages = self.shadow or [part.float() for part in parts]
            averages = self.shadow = [
                _in_memory_like(part, average) for average, part in zip(averages, parts, strict=True)
            ]
        else:
            averages = parts
            if all(part.device == new.device for part, new in zip(parts, newest, strict=True)):
                get_ema_multi_avg_fn(1 - self.options.rate)(parts, newest, 0)
                return
        visited = None
        for average, part, new in zip(averages, parts, newest, strict=True):
            # one tensor at a time, on the policy's device: a parked average is copied there and back
            there = average.to(new.device, non_blocking=True)
            there.lerp_(new.to(there.dtype), self.options.rate)
            if part is not average:
                part.copy_(there, non_blocking=True)
            if there is not average:
                average.copy_(there, non_blocking=True)
                visited = new.device
        if visited is not None and visited.type == "cuda":
            torch.cuda.current_stream(visited).synchronize()  # the CPU may read them after this

    @contextmanager
    def _on_device(self, device: torch.device) -> Iterator[None]:
        """Keep a parked teacher's weights on the policy's device inside the context."""
        if self.model is None or not self.parked:
            yield
            return
        places = [stored(p) for p in self.model.parameters()]
        kept = [place.data for place in places]
        if any(isinstance(p, DTensor) for p in self.model.parameters()):
            self.model.to(device)
            yield
            self.park()
            return
        try:
            for place in places:
                place.data = place.data.to(device, non_blocking=True)
            yield
        finally:
            for place, data in zip(places, kept, strict=True):
                place.data = data

    def park(self) -> None:
        """Keep the weights in CPU memory between uses from now on."""
        if self.model is None:
            return
        self.parked = True
        if any(isinstance(p, DTensor) for p in self.model.parameters()):
            rest(self.model)
            self.model.to("cpu")
            return
        for parameter in self.model.parameters():
            place = stored(parameter)
            place.data = place.data.cpu().pin_memory() if place.is_cuda else place.data

    @torch.no_grad()
    def shadow_state(self, policy: nn.Module, keep: bool = True) -> list[Tensor]:
        """Return the float32 averages as whole tensors in CPU memory; an empty list if there are none yet. Collective.

        Args:
            policy: the policy that the teacher follows.
            keep: False on a rank that only takes part in the collective; it gets an empty list.
        """
        if self.shadow is None:
            return []
        states = []
        for parameter, mine in zip(self._pair(policy)[0], self.shadow, strict=True):
            whole = whole_of(parameter, mine)
            if keep:
                states.append(whole.cpu().clone())
        return states

    def load_shadow(self, policy: nn.Module, saved: list[Tensor]) -> None:
        """Load what `shadow_state` returned."""
        if saved:
            self.shadow = [part_of(p, whole).clone() for p, whole in zip(self._pair(policy)[0], saved, strict=True)]

    @torch.no_grad()
    def score(
        self, policy: nn.Module, batch: RolloutBatch, wanted: Bool[Tensor, "batch seq"], top_ids: Tensor | None = None
    ) -> TokenStats:
        """Return the statistics of the wanted tokens in the teacher's view, at the policy's positions."""
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
        with weights, self._on_device(batch.tokens.device):
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
