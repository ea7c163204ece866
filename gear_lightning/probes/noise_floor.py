"""Measures the noise floor of credit: the divergence and the weights that rounding alone causes.

In training, the policy and the teacher score the same response ids with two forwards of different shape: the teacher's
rows are wider, and its response tokens are further right, by the length of the privileged text. In exact arithmetic,
neither would change the result. With rounding, both do: other matrix shapes sum in another order, and rotary embeddings
are rounded differently at every position. So if both sides have equal weights and the policy's own prompt, and the
teacher's side is padded to the teacher's width and moved to the teacher's positions, any remaining divergence is noise.

This is the noise at a divergence of zero. For ``k1`` it is also the error of a nonzero divergence. The unsigned
divergences are curved, so the same rounding changes a divergence that is already large by more.

Credit rules use the 99th percentile as a constant (`gear_lightning.credit.RoundingNoise`);
`gear_lightning.probes.rounding` measures it for a run.
"""

import json
import math
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..batch import Credit, RolloutBatch, RolloutRow, TokenStats, collate
from ..credit import CreditAssigner, Evidence, RoundingNoise
from ..errors import UserError
from ..gear import masked_quantile
from ..learning.head import head_in_float32
from ..learning.positions import longest_row
from ..learning.token_stats import token_stats
from ..logits import decoder
from ..runs.files import replace_text
from ..runs.records import read_records, record_files
from ..teacher import Teacher, TeacherOptions

FILE = "noise_floor.json"
FORMAT = 2
QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
STAND_IN = 64  # assumed tokens of privileged text if a rollout has none: any number gives noise of the same size
NEAR_ONE = 0.01  # a weight this far from 1 still counts as 1


@dataclass(frozen=True)
class Noise:
    """Effect of rounding on one micro-batch with n action tokens.

    Attributes:
        log_ratio: absolute value of log p_policy - log p_teacher at the sampled token, nats.
        divergence: absolute value of the divergence that the rule uses, nats.
        weights: the resulting credit weights.
        spread: distance of each weight from the median weight of its rollout.
        anchors: number of anchors that the rule finds.
        rollouts: number of rows with action tokens.
        shape: rows, columns of the policy's forward, columns of the teacher's forward.
    """

    log_ratio: Float[Tensor, " n"]
    divergence: Float[Tensor, " n"]
    weights: Float[Tensor, " n"]
    spread: Float[Tensor, " n"]
    anchors: int
    rollouts: int
    shape: tuple[int, int, int]


def anchor_tokens(rule: CreditAssigner, credit: Credit) -> Tensor:
    """Return a mask ``[batch, seq]`` of the tokens at which the rule found an anchor: empty for rules without anchors,
    and for rules with fixed segments, whose starts do not depend on the divergence."""
    here = torch.arange(credit.anchor.shape[1], device=credit.anchor.device)
    return (credit.anchor == here) & (not rule.fixed_segments)


def teacher_view(batch: RolloutBatch, widest: int | None = None) -> tuple[RolloutBatch, Int[Tensor, " batch"]]:
    """Return the batch with the policy's own prompts in the teacher's view, padded to the width of the teacher's view.

    Every row counts as privileged, an advantage of 0 as 1, and all ``solved`` counts are 0; otherwise there would be no
    weights to measure.

    Args:
        batch: a batch as in training.
        widest: maximum number of columns of the model. None: no maximum.

    Returns:
        The batch, and by how many positions the teacher's response tokens are further right than the policy's.
    """
    shift = torch.where(batch.privileged, batch.teacher_offset, STAND_IN).clamp_min(1)
    lengths = batch.valid.sum(-1)
    width = int(((lengths + shift) * (lengths > 0)).max())
    pad = max(0, (width if widest is None else min(width, widest)) - batch.tokens.shape[1])
    view = replace(
        batch,
        teacher_tokens=nn.functional.pad(batch.tokens, (0, pad)),
        teacher_valid=nn.functional.pad(batch.valid, (0, pad)),
        teacher_offset=torch.zeros_like(batch.teacher_offset),
        privileged=torch.ones_like(batch.privileged),
        solved=torch.zeros_like(batch.solved),
        advantages=torch.where(batch.advantages == 0, 1, batch.advantages),
        base_advantages=torch.where(batch.base_advantages == 0, 1, batch.base_advantages),
    )
    return view, shift


def _moves(model: Any) -> bool:
    """Return whether, except for rounding, the model's output is independent of the position at which a text starts:
    true for rotary embeddings whose frequencies do not depend on the length."""
    rotary = getattr(decoder(model), "rotary_emb", None)
    kind = getattr(rotary, "rope_type", "default")
    kinds = set(kind.values()) if isinstance(kind, dict) else {kind}
    return rotary is not None and not kinds & {"dynamic", "longrope"}


@contextmanager
def moved(model: Any, shift: Int[Tensor, " batch"]) -> Iterator[None]:
    """Shift the positions of the rows in the model's forwards, so that they start at ``shift`` instead of 0."""

    def place(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        columns = kwargs["input_ids"].shape[1]
        return args, {**kwargs, "position_ids": torch.arange(columns, device=shift.device) + shift[:, None]}

    handle = decoder(model).register_forward_pre_hook(place, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class Scored(NamedTuple):
    """A micro-batch in the teacher's view (see `teacher_view`), and two scores of it by the same weights."""

    view: RolloutBatch
    policy: TokenStats
    teacher: TokenStats


@torch.no_grad()
def score(policy: Any, batch: RolloutBatch, rule: CreditAssigner) -> Scored:
    """Score a micro-batch with the policy, and again as a teacher with equal weights and no privileged text.

    The passes are those of training (`token_stats`, `Teacher.score`), without the gradient. The caller must provide the
    precision context of training, and a policy in training mode.

    Args:
        policy: the model; also the teacher's weights.
        batch: the micro-batch, on the policy's device; blank rows are ignored.
        rule: the credit rule.
    """
    moves, longest = _moves(policy), longest_row(policy.config, type(policy).__name__)
    view, shift = teacher_view(batch, None if moves or longest is None else longest.tokens)
    if not moves:
        shift = torch.zeros_like(shift)
    ours = token_stats(
        policy, batch.tokens, batch.valid, batch.action_mask, temperature=batch.temperature, top_k=rule.top_k
    )
    with moved(policy, shift):
        theirs = Teacher(policy, TeacherOptions("live")).score(policy, view, batch.action_mask, ours.top_ids)
    return Scored(view, ours, theirs)


def noise_of(scored: Scored, rule: CreditAssigner, rounding: RoundingNoise = RoundingNoise()) -> Noise:
    """Return the noise that the rule computes from two scores of the same tokens, with ``rounding`` as its constant."""
    batch, policy, teacher = scored
    credit, mask = rule(Evidence.of(batch, policy, teacher, rounding)), rule.scope(batch)
    return Noise(
        (policy.logprobs - teacher.logprobs)[mask].abs(),
        credit.divergence[mask].abs(),
        credit.weights[mask],
        weight_spread(credit, mask)[mask],
        int(anchor_tokens(rule, credit).sum()),
        int(mask.any(-1).sum()),
        (batch.size, batch.tokens.shape[1], batch.teacher_tokens.shape[1]),
    )


def measure(policy: Any, batch: RolloutBatch, rule: CreditAssigner) -> Noise:
    """Return the noise of a micro-batch: `score`, then `noise_of` without a rounding constant."""
    return noise_of(score(policy, batch, rule), rule)


def weight_spread(credit: Credit, mask: Bool[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
    """Return the distance of each weight from the median of its rollout's tokens in ``mask``. The median is used
    because, if the mean is fixed at 1, a few large weights shift all other weights of a rollout slightly."""
    return (credit.weights - masked_quantile(credit.weights, mask, 0.5)).abs()


def rounding_of(log_ratio: Float[Tensor, " n"], divergence: Float[Tensor, " n"], rule: CreditAssigner) -> RoundingNoise:
    """Return the constant that rules use: 99th percentiles (see `p99`) of the values in `Noise`."""
    return RoundingNoise(p99(log_ratio), p99(divergence) if rule.top_k else 0.0)


def p99(values: Float[Tensor, " n"]) -> float:
    """Return the 99th percentile of the finite values; 0 if there are none."""
    values = values[values.isfinite()]
    return quantiles(values)["p99"] if len(values) else 0.0


def quantiles(values: Float[Tensor, " n"]) -> dict[str, float]:
    """Return the `QUANTILES` of values, linearly interpolated."""
    wanted = torch.tensor(list(QUANTILES.values()), dtype=torch.float64)
    return dict(zip(QUANTILES, values.cpu().double().quantile(wanted).tolist(), strict=True))


def summary(parts: list[Noise]) -> dict[str, Any]:
    """Return the results of a measurement as plain data.

    Raises:
        UserError: there are no action tokens, or the model's values are not finite.
    """
    divergence, weights = torch.cat([p.divergence for p in parts]), torch.cat([p.weights for p in parts])
    if not len(divergence):
        raise UserError("no rollout has a sampled token, so there is nothing to measure")
    if not (divergence.isfinite().all() and weights.isfinite().all()):
        raise UserError("the model's log-probs are not finite in this precision; use a wider one (trainer.precision)")
    away, rollouts = (weights - 1).abs(), sum(p.rollouts for p in parts)
    return {
        "tokens": len(divergence),
        "rollouts": rollouts,
        "shapes": [dict(zip(("rows", "columns", "teacher_columns"), p.shape, strict=True)) for p in parts],
        "log_ratio": quantiles(torch.cat([p.log_ratio for p in parts])),
        "divergence": quantiles(divergence),
        "weight": {"min": float(weights.min()), **quantiles(weights)},
        "weight_off_one": quantiles(away),
        "weight_spread": quantiles(torch.cat([p.spread for p in parts])),
        "share_of_weights_off_one": float((away > NEAR_ONE).double().mean()),
        "anchors_per_rollout": sum(p.anchors for p in parts) / rollouts,
    }


def conditions(trainer: L.Trainer, module: Any) -> dict[str, Any]:
    """Return the conditions under which a floor is valid: precision of the layers and of the head, credit rule, and
    kind of divergence."""
    rule, gathered = module.credit, getattr(trainer.strategy, "computes_in", None)
    head = ", head in float32" if head_in_float32(module.head_precision, str(trainer.precision)) else ""
    return {
        "precision": str(trainer.precision) + ("" if gathered is None else f", gathered in {gathered}") + head,
        "rule": type(rule).__name__,
        "divergence_kind": getattr(rule, "divergence", None),
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that affect the numbers."""
    import transformers

    from .. import __version__

    return {
        "gear_lightning": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lightning": L.__version__,
        "python": platform.python_version(),
    }


class MeasureNoise(L.Callback):
    """Measures instead of training: scores micro-batches before the first step, then ends the fit.

    Args:
        micro_batches: number of micro-batches to measure.
        run: directory of a run whose recorded rollouts are measured. None: generate rollouts as the run does.
    """

    def __init__(self, micro_batches: int, run: str | None = None):
        self.micro_batches = micro_batches
        self.run = run
        self.result: dict[str, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if self.run is None:
            batches = (sealed.batch for sealed in data.train_dataloader())
        else:
            batches = recorded_batches(
                Path(self.run),
                micro_batch_size=data.micro_batch_size,
                temperature=data.generator.temperature,
                vocabulary=len(pl_module.chat_format.tokenizer),
            )
        scored, rule = [], pl_module.credit
        for batch in batches:
            with trainer.strategy.precision_plugin.train_step_context():
                scored.append(score(pl_module.policy, batch.to(pl_module.device), rule))
            if len(scored) == self.micro_batches:
                break
        raw = [noise_of(one, rule) for one in scored]
        log_ratio, divergence = (
            torch.cat([getattr(part, name) for part in raw]) for name in ("log_ratio", "divergence")
        )
        rounding = rounding_of(log_ratio, divergence, rule)
        parts = [noise_of(one, rule, rounding) for one in scored]  # with the measured constant, as in a run
        device = pl_module.device
        self.result = {
            "format": FORMAT,
            **conditions(trainer, pl_module),
            "weights_dtype": str(next(pl_module.policy.parameters()).dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "versions": versions(),
            **summary(parts),
            "rollouts_from": self.run or "generated for this measurement",
        }
        trainer.should_stop = True


def recorded_batches(run: Path, *, micro_batch_size: int, temperature: float, vocabulary: int) -> list[RolloutBatch]:
    """Return the newest recorded iteration of a run as micro-batches of similar lengths, as in training.

    Records do not contain the teacher's prompts: `teacher_view` assumes `STAND_IN` tokens of privileged text.

    Raises:
        UserError: there are no records, no rollout was used for learning, or the policy's vocabulary lacks an id.
    """
    newest = max((iteration for iteration, _, _ in record_files(run)), default=0)
    rows: list[RolloutRow] = []
    for record in read_records(run, [newest]):
        tensors = record.tensors
        for i in range(len(tensors["tokens"])):
            length = int(tensors["valid"][i].sum())
            cut: dict[str, Any] = {name: x[i, :length].tolist() for name, x in tensors.items() if x.dim() == 2}
            if not any(cut["action_mask"]):
                continue
            prompt = cut["action_mask"].index(True)
            rows.append(
                RolloutRow(
                    **{name: cut[name] for name in ("tokens", "action_mask", "turn_ids", "stop_mask")},
                    sampler_logprobs=cut["sampler_logprobs"],
                    prompt_length=prompt,
                    teacher_prompt=cut["tokens"][:prompt],
                    reward=float(tensors["rewards"][i]),
                    success=False,
                    advantage=float(tensors["advantages"][i]),
                    group_id=int(tensors["group_ids"][i]),
                    policy_version=int(tensors["policy_version"][i]),
                    index=len(rows),
                    turn_advantages=_of_turns(cut["turn_ids"], cut["base_advantages"]),
                    parts=cut["parts"],
                    versions=cut["versions"],
                )
            )
    if not rows:
        raise UserError(f"{run}: no rollout of iteration {newest} was used for learning: nothing to measure")
    highest = max(max(row.tokens) for row in rows)
    if highest >= vocabulary:
        raise UserError(
            f"{run}: its rollouts contain id {highest}, but this policy has only {vocabulary} ids; use a policy with "
            "the tokenizer of the run"
        )
    rows.sort(key=lambda row: len(row.tokens))
    cuts = [rows[i : i + micro_batch_size] for i in range(0, len(rows), micro_batch_size)]
    return [collate(cut, step_tokens=1, step_rollouts=1, temperature=temperature) for cut in cuts]


def _of_turns(turns: list[int], values: list[float]) -> list[float]:
    """Return the value of each turn, from per-token values that are constant within a turn."""
    found = dict(zip(turns, values, strict=True))
    return [found.get(turn, 0.0) for turn in range(max(found) + 1)]


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a measurement atomically.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(result, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def read_floor(path: Path) -> dict[str, Any]:
    """Read a result file of ``gear-lightning noise-floor``.

    Raises:
        UserError: the file does not exist or is not such a result.
    """
    try:
        result = json.loads(path.read_text())
        sizes = [float(result[name]["p99"]) for name in ("log_ratio", "divergence", "weight_spread")]
        whole = result["format"] == FORMAT and all(0 <= size < math.inf for size in sizes)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); create it with gear-lightning noise-floor"
        ) from None
    except (ValueError, TypeError, KeyError):
        whole, result = False, {}
    if not whole:
        raise UserError(f"{path}: not a result of this version of gear-lightning noise-floor; create it again")
    return result
