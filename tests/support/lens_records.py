"""Fabricated records and credit for the tests of the credit page, as varied as those of a run."""

import random

import torch
from credit_pages import fake_rollout

from gear_lightning.batch import Credit
from gear_lightning.runs.records import Record

WORDS = (
    *("the", "a", "look", "open", "red", "door", "it", "is", "locked", "I", "quit", "so", "then", "move", "left"),
    *("right", "because", "answer", "12", "34", "five", "key", "box"),
)
STATUSES = ("done", "truncated", "environment_error")


def decode(token: int) -> str:
    return "\n" if token == 0 else f" {WORDS[token % len(WORDS)]}{'' if token < len(WORDS) else token}"


def record(
    iteration: int,
    rollouts: int = 8,
    tokens: int = 120,
    seed: int = 0,
    group: int = 4,
    judged: bool = True,
    vocabulary: int = 400,
) -> Record:
    """Return rollouts of random text in turns, with groups of ``group`` per task; the last rollout has no row."""
    draw, random_numbers = torch.Generator().manual_seed(seed + iteration), random.Random(seed + iteration)
    shape = (rollouts, tokens)
    where = torch.arange(tokens).expand(shape)
    lengths = torch.randint(tokens // 2, tokens + 1, (rollouts,), generator=draw)
    valid = where < lengths[:, None]
    prompt, step = 12, max(16, tokens // 6)
    turn = torch.where(where < prompt, -1, (where - prompt) // step)
    action = valid & (where >= prompt) & ((where - prompt) % step < step - 6)  # the last six tokens: observation

    def noise(scale: float) -> torch.Tensor:
        return torch.where(action, torch.randn(shape, generator=draw) * scale, 0.0)

    entropy, divergence = noise(1.0).abs() ** 2, noise(1.0) ** 3 * 0.3
    logprobs = -noise(1.0).abs()
    success = [random_numbers.random() < 0.5 for _ in range(rollouts)]
    advantage = torch.tensor([0.7 if s else -0.9 for s in success])
    decisions = torch.zeros(shape, dtype=torch.long)
    if judged:
        decisions[action & ((where - prompt) % step < 4)] = 1
        for row, won in enumerate(success):
            if not won:
                decisions[row, (turn[row] == 1) & (decisions[row] == 1)] = -1
    weights, anchor = segments(divergence, action, 1.2)
    tensors = {
        "tokens": torch.where(valid, torch.randint(0, vocabulary, shape, generator=draw), 0),
        "valid": valid,
        "action_mask": action,
        "turn_ids": torch.where(action, turn, -1),
        "stop_mask": torch.zeros(shape, dtype=torch.bool),
        "sampler_logprobs": logprobs,
        "policy_logprobs": logprobs.clone(),
        "teacher_logprobs": logprobs - divergence,
        "entropy": entropy,
        "teacher_entropy": entropy * 0.5,
        "divergence": divergence,
        "weights": weights,
        "base_advantages": torch.where(action, advantage[:, None], 0.0),
        "token_advantages": torch.where(action, weights * advantage[:, None], 0.0),
        "decisions": decisions,
        "parts": torch.zeros(shape, dtype=torch.long),
        "anchor": anchor,
        "rewards": torch.tensor(success).float(),
        "advantages": advantage,
        "privileged": torch.ones(rollouts, dtype=torch.bool),
        "solved": torch.full((rollouts,), sum(success)),
        "group_ids": torch.arange(rollouts) // group,
        "policy_version": torch.full((rollouts,), iteration),
    }
    entries = [
        fake_rollout(
            iteration=iteration,
            row=row if row < rollouts - 1 else None,
            task_id=f"task/{(row // group) % 5}",
            group_id=row // group,
            rollout=row % group,
            reward=(1.0 if success[row] else 0.25 * (row % 3)) if row < rollouts - 1 else None,
            reward_parts={"answer": float(success[row])},
            success=success[row] and row < rollouts - 1,
            status=STATUSES[2] if row == rollouts - 1 else STATUSES[row % 2],
            error="ValueError: the door is stuck" if row == rollouts - 1 else None,
            turns=int(turn[row, : lengths[row]].max()) + 1,
        )
        for row in range(rollouts)
    ]
    return Record(iteration, 0, entries, tensors)


def segments(divergence: torch.Tensor, action: torch.Tensor, least: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights and anchors: a segment of up to four sampled tokens from each token with a large divergence."""
    weights, anchor = torch.ones(divergence.shape), torch.full(divergence.shape, -1)
    for row, t in (divergence.abs() > least).nonzero().tolist():
        for u in range(t, min(t + 4, divergence.shape[1])):
            if not action[row, u]:
                break
            anchor[row, u], weights[row, u] = t, 1 + float(divergence[row, t].clamp(-2.4, 2.4)) * 0.4
    return weights, anchor


def other_credit(one: Record, least: float = 2.0) -> Credit:
    """Return possible credit of another rule for a record."""
    action, divergence = one.tensors["action_mask"], -one.tensors["divergence"]
    weights, anchor = segments(divergence, action, least)
    return Credit(weights, weights * one.tensors["base_advantages"] * action, divergence, anchor)
