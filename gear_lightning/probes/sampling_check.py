"""Start-up check that the sampling engine and the trainer compute the same log-probs.

Before a policy's first rollouts, the engine samples two conversations of different lengths, and the trainer scores them
as in an update. Three pairs of log-probs may differ only by rounding (see `perturbation`): those in the update's mode
and in the sampler's mode; those of a row alone and next to a longer row; those of the engine and of the trainer. The
cost is bounded: two rows are sampled, and passed through the model four times without gradients.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distributed.sharding import rest, shape
from ..generation.cached_engine import OTHER_ENGINE, CachedEngine
from ..generation.engine import GenerationEngine, Sampling, TurnRequest
from ..generation.generate_engine import GenerateEngine
from ..generation.perturbation import low_precision, rounded_anew
from ..learning.token_stats import token_stats

NEW = 4  # tokens sampled in a turn
USUAL = 256  # tokens of the longer row, if the model's configuration contains no longer length
FURTHEST = 4096  # maximum length in the configuration that is tried, tokens
BEYOND = 16  # tokens by which the row exceeds a length in the configuration
TRIES = 3  # a difference counts only if it occurs in each try: a router may resolve a near tie either way in one
# keys of integers in a configuration that may be lengths from which on the model computes differently
LENGTHS = re.compile(r"window|chunk|block_size|original_max|top_?k|local|sparse|floor_scale")


@dataclass(frozen=True)
class Allowed:
    """Tolerances, nats: ``factor`` x the measured rounding + ``median`` or ``largest``. ``random`` is an upper limit of
    the median tolerance if only the mode differs."""

    factor: float
    median: float
    largest: float
    random: float


FLOAT32 = Allowed(10, 1e-5, 1e-4, 1e-3)
LOW = Allowed(4, 5e-3, 2e-2, 0.1)


@dataclass(frozen=True)
class Trial:
    """Two conversations to try; the second is longer.

    Attributes:
        contexts: ids before each turn, for each turn and row.
        new: number of tokens to sample in a turn.
        filler: ids that extend the longer row to the maximum length of the teacher's view.
    """

    contexts: list[list[list[int]]]
    new: int
    filler: list[int]


@dataclass
class Row:
    """A sampled conversation: ids, the turn in which each was sampled (-1: not sampled), and the engine's log-probs."""

    ids: list[int]
    turns: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Difference:
    """A pair of log-probs that differ by more than rounding: the pair, the difference and the rounding in nats."""

    what: str
    nats: float
    rounding: float


def ordinary_ids(tokenizer: Any, model: Any) -> list[int]:
    """Return the ids of ordinary text, and the padding id, which a policy can also sample."""
    size = min(len(tokenizer), shape(model.get_input_embeddings().weight)[0])
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})} - {tokenizer.pad_token_id}
    return [i for i in range(size) if i not in special] or list(range(size))


def tried_length(config: Any, limit: int) -> int:
    """Return the length of the longest row to try, at most ``limit`` (the budget): beyond every length up to `FURTHEST`
    in the configuration."""
    named = [n for n in _lengths(config.get_text_config().to_dict()) if n < limit and n <= FURTHEST]
    return min(limit, max([USUAL, *(n + BEYOND for n in named)]))


def _lengths(config: dict[str, Any]) -> list[int]:
    found = []
    for name, value in config.items():
        if isinstance(value, dict):
            found += _lengths(value)
        elif isinstance(value, int) and LENGTHS.search(str(name)):
            found.append(value)
    return found


def make_trial(ids: list[int], config: Any, context: int, teacher: int, turns: int, seed: int = 0) -> Trial:
    """Return conversations of random ids within the budgets.

    Args:
        ids: ids to draw from.
        config: configuration of the model.
        context: maximum length of the policy's rows, tokens.
        teacher: maximum length of the teacher's view, tokens; ``context`` if there is no teacher.
        turns: maximum number of turns of a conversation.
        seed: seed of the ids.
    """
    random = np.random.default_rng(seed)
    length, wide = tried_length(config, context), tried_length(config, max(context, teacher))
    new = max(1, min(NEW, length // 8))
    if turns > 1 and length >= 24:  # in the second turn the other row has the longer new context and needs no padding
        sizes = [[max(2, min(8, length // 16)), length - 2 * new - 2], [min(24, length // 4), 2]]
    else:
        sizes = [[max(1, min(8, length // 4)), max(1, length - new)]]
    contexts = [[random.choice(ids, size).tolist() for size in row] for row in sizes]
    return Trial(contexts, new, random.choice(ids, max(0, wide - length)).tolist())


@torch.no_grad()
def sample(engine: GenerationEngine, model: Any, sampling: Sampling, trial: Trial) -> list[Row]:
    """Return the trial's rows, with turns sampled by the engine."""
    rows = [Row([], [], []) for _ in trial.contexts[0]]

    def add(row: Row, ids: list[int], turn: int, logprobs: list[float]) -> None:
        row.ids, row.turns, row.logprobs = row.ids + ids, row.turns + [turn] * len(ids), row.logprobs + logprobs

    training = model.training
    engine.begin(model.eval(), sampling, set())
    try:
        for turn, contexts in enumerate(trial.contexts):
            for key, (row, ids) in enumerate(zip(rows, contexts, strict=True)):
                add(row, ids, -1, [0.0] * len(ids))
                engine.submit(TurnRequest(key, list(row.ids), trial.new, (0, key, turn)))
            waiting = len(rows)
            while waiting and (done := engine.poll()):
                waiting -= len(done)
                for sampled in done:
                    add(rows[sampled.key], sampled.ids, turn, sampled.logprobs)
        for key in range(len(rows)):
            engine.release(key)
    finally:
        engine.end()
        model.train(training)
    return rows


@torch.no_grad()
def scores(model: Any, rows: list[Row], filler: list[int], temperature: float) -> list[Tensor]:
    """Return the trainer's log-probs [sampled] of each row's sampled tokens. The filler extends the last row."""
    device = next(model.parameters()).device
    ids = [*(row.ids for row in rows[:-1]), rows[-1].ids + filler]
    tokens = torch.zeros(len(rows), max(map(len, ids)), dtype=torch.long)
    valid, wanted = (torch.zeros_like(tokens, dtype=torch.bool) for _ in range(2))
    for i, (row, mine) in enumerate(zip(rows, ids, strict=True)):
        tokens[i, : len(mine)], valid[i, : len(mine)] = torch.tensor(mine), True
        wanted[i, : len(row.turns)] = torch.tensor(row.turns) >= 0
    stats = token_stats(model, *(x.to(device) for x in (tokens, valid, wanted)), temperature=temperature)
    return [mine.cpu()[there] for mine, there in zip(stats.logprobs, wanted, strict=True)]


def compare(policy: Any, sampler: Any, rows: list[Row], filler: list[int], temperature: float) -> Difference | None:
    """Return the first pair of log-probs that differs by more than rounding; None if there is none.

    The caller must provide the precision context of training. All ranks must call it: with sharded weights, each
    forward of the policy is a collective, and every rank makes four.

    Args:
        policy: scores the rows.
        sampler: the model that the engine sampled with; the policy itself, or a copy that may be rounded.
        rows: rows from `sample`.
        filler: ids that extend the longer row.
        temperature: sampling temperature.
    """
    training = policy.training
    trained = scores(policy.train(), rows, filler, temperature)
    alone = scores(policy, rows[:1], [], temperature)
    evaluated = scores(policy.eval(), rows, filler, temperature)
    noise, low = _rounding(policy, rows, filler, temperature, evaluated), low_precision(policy)
    policy.train(training)
    rest(policy)
    if sampler is not policy:
        noise = torch.maximum(noise, _rounding(sampler, rows, filler, temperature))
        low = low or low_precision(sampler)
    if not torch.cat(trained).isfinite().all():
        return Difference("finite", math.nan, math.nan)
    reported = [torch.tensor([x for x, t in zip(r.logprobs, r.turns, strict=True) if t >= 0]) for r in rows]
    turns = [torch.tensor([t for t in row.turns if t >= 0]) for row in rows]
    for what, ours, theirs in (("mode", trained, evaluated), ("alone", alone, trained), ("engine", reported, trained)):
        gaps = [(a - b).abs() for a, b in zip(ours, theirs, strict=False)]
        if (largest := _beyond(what, gaps, turns, noise, LOW if low else FLOAT32)) is not None:
            return Difference(what, largest, float(noise.max()))
    return None


def _rounding(model: Any, rows: list[Row], filler: list[int], temperature: float, known: Any = None) -> Tensor:
    """Return by how many nats [sampled] rounding alone changes the model's log-probs. ``known``: the log-probs, if they
    are known."""
    known = scores(model, rows, filler, temperature) if known is None else known
    with rounded_anew(model):
        return (torch.cat(scores(model, rows, filler, temperature)) - torch.cat(known)).abs()


def _beyond(what: str, gaps: list[Tensor], turns: list[Tensor], noise: Tensor, allowed: Allowed) -> float | None:
    """Return the largest difference if the differences exceed rounding, else None. Both the median of each turn and the
    largest difference are compared with their tolerance."""
    parts = [gap[of == turn] for gap, of in zip(gaps, turns, strict=False) for turn in of.unique()]
    median, largest = (max(float(f(part)) for part in parts) for f in (torch.median, torch.max))
    limit = allowed.median + allowed.factor * float(noise.mean())
    if what == "mode":  # a model that is random in both modes has no rounding to measure
        limit = min(limit, allowed.random)
    fine = median <= limit and largest <= allowed.largest + allowed.factor * float(noise.max())
    return None if fine else largest


def explain(found: Difference, policy: Any, engine: GenerationEngine, trial: Trial) -> str:
    """Return a message that states what differs, by how many nats, and what to do."""
    name, short = type(policy).__name__, sum(len(turn[0]) + trial.new for turn in trial.contexts)
    long = sum(len(turn[1]) + trial.new for turn in trial.contexts) + len(trial.filler)
    if found.what == "finite":
        return f"{name}: its log-probs are not finite in this precision; use a wider one (trainer.precision)"
    size = f"differ by up to {found.nats:.2g} nats, but rounding explains only {found.rounding:.1g}"
    if found.what == "mode":
        return (
            f"{name}: log-probs of the same tokens in training mode and in sampling mode {size}: the model is random, "
            "or computes differently in training, so the trained policy would differ from the sampled one; use another "
            "model.policy"
        )
    if found.what == "alone":
        return (
            f"{name}: log-probs of a row of {short} tokens alone and next to one of {long} tokens {size}: the model's "
            "output depends on the other rows of a micro-batch; set generation.budgets.context (and "
            f"model.teacher.max_prompt, if there is a teacher) so that no row has {long} tokens, or use another "
            "model.policy"
        )
    kind = type(engine).__name__
    if type(engine) is GenerateEngine:
        advice = "set model.policy.attn_implementation to eager, or use another model.policy"
    elif type(engine) is CachedEngine:
        advice = OTHER_ENGINE
    else:
        advice = (
            "an engine must sample with the model that `begin` receives, and return log-probs of softmax(logits / "
            "temperature) before top-p and top-k"
        )
    return f"{name}: log-probs of {kind} and of the trainer {size}, on rows of up to {long} tokens; {advice}"
