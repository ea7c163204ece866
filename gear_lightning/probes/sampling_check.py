"""The start-up check that what is sampled is what is trained.

Before a policy's first rollouts, the engine samples two conversations of different length, and they are scored as the
update scores them. Three pairs of log-probs may differ by rounding alone (see `perturbation`): those in the update's
mode and in the sampler's mode; those of a row alone and beside a longer one; those of the engine and of the trainer.
The cost is bounded: two rows are sampled, and passed through the model four times without gradients.
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
USUAL = 256  # tokens of the longer row, where nothing in the model's configuration names a longer one
FURTHEST = 4096  # tokens of the longest such length that is tried
BEYOND = 16  # tokens by which a row goes beyond a length that the configuration names
TRIES = 3  # a difference counts where it shows in each: a router's near tie may fall either way in one
# integers of a configuration that may be lengths from which the model computes something else
LENGTHS = re.compile(r"window|chunk|block_size|original_max|top_?k|local|sparse|floor_scale")


@dataclass(frozen=True)
class Allowed:
    """What counts as rounding: ``factor`` x the measured rounding + a floor, nats; ``random`` bounds the median where
    nothing but the mode differs."""

    factor: float
    median: float
    largest: float
    random: float


FLOAT32 = Allowed(10, 1e-5, 1e-4, 1e-3)
LOW = Allowed(4, 5e-3, 2e-2, 0.1)


@dataclass(frozen=True)
class Trial:
    """Two conversations to try, the second the longer one.

    Attributes:
        contexts: ids that are given before each turn, for each turn and row.
        new: tokens to sample in a turn.
        filler: ids that make the longer row as long as the teacher's view may be.
    """

    contexts: list[list[list[int]]]
    new: int
    filler: list[int]


@dataclass
class Row:
    """A sampled conversation: ids, which of them were sampled, in which turn (-1: none), and the engine's log-probs."""

    ids: list[int]
    turns: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Difference:
    """A pair of log-probs that differ by more than rounding: what they are, and by how many nats."""

    what: str
    nats: float
    rounding: float


def ordinary_ids(tokenizer: Any, model: Any) -> list[int]:
    """Ids that stand for text, and the padding id, which a policy can sample as well."""
    size = min(len(tokenizer), shape(model.get_input_embeddings().weight)[0])
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})} - {tokenizer.pad_token_id}
    return [i for i in range(size) if i not in special] or list(range(size))


def tried_length(config: Any, limit: int) -> int:
    """Tokens of the longest row to try, where the budgets allow ``limit``: beyond every length that the configuration
    names, up to `FURTHEST`."""
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
    """Conversations within the budgets, of random ids.

    Args:
        ids: to draw from.
        config: of the model.
        context: longest row of the policy, tokens.
        teacher: longest row of the teacher's view; ``context`` without one.
        turns: that a conversation may have.
        seed: of the ids.
    """
    random = np.random.default_rng(seed)
    length, wide = tried_length(config, context), tried_length(config, max(context, teacher))
    new = max(1, min(NEW, length // 8))
    if turns > 1 and length >= 24:  # the shorter row's second context is the longer one, so that padding changes sides
        sizes = [[max(2, min(8, length // 16)), length - 2 * new - 2], [min(24, length // 4), 2]]
    else:
        sizes = [[max(1, min(8, length // 4)), max(1, length - new)]]
    contexts = [[random.choice(ids, size).tolist() for size in row] for row in sizes]
    return Trial(contexts, new, random.choice(ids, max(0, wide - length)).tolist())


@torch.no_grad()
def sample(engine: GenerationEngine, model: Any, sampling: Sampling, trial: Trial) -> list[Row]:
    """The trial's rows, with turns sampled by the engine."""
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
                for said in done:
                    add(rows[said.key], said.ids, turn, said.logprobs)
        for key in range(len(rows)):
            engine.release(key)
    finally:
        engine.end()
        model.train(training)
    return rows


@torch.no_grad()
def scores(model: Any, rows: list[Row], filler: list[int], temperature: float) -> list[Tensor]:
    """The trainer's log-probs [sampled] of each row's sampled tokens; the last row is made longer by the filler."""
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
    """The first pair of log-probs that differs by more than rounding.

    The caller provides the precision context of training. All ranks must call it: where weights are spread over them,
    each forward of the policy is a collective, and every rank makes four.

    Args:
        policy: scores the rows.
        sampler: the model that the engine sampled with; the policy itself, or a copy that may be rounded.
        rows: from `sample`.
        filler: ids that make the longer row longer.
        temperature: of the sampling.
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
    said = [torch.tensor([x for x, t in zip(r.logprobs, r.turns, strict=True) if t >= 0]) for r in rows]
    turns = [torch.tensor([t for t in row.turns if t >= 0]) for row in rows]
    for what, ours, theirs in (("mode", trained, evaluated), ("alone", alone, trained), ("engine", said, trained)):
        gaps = [(a - b).abs() for a, b in zip(ours, theirs, strict=False)]
        if (largest := _beyond(what, gaps, turns, noise, LOW if low else FLOAT32)) is not None:
            return Difference(what, largest, float(noise.max()))
    return None


def _rounding(model: Any, rows: list[Row], filler: list[int], temperature: float, known: Any = None) -> Tensor:
    """Nats [sampled] by which rounding alone moves the model's log-probs. ``known``: the log-probs, if they are."""
    known = scores(model, rows, filler, temperature) if known is None else known
    with rounded_anew(model):
        return (torch.cat(scores(model, rows, filler, temperature)) - torch.cat(known)).abs()


def _beyond(what: str, gaps: list[Tensor], turns: list[Tensor], noise: Tensor, allowed: Allowed) -> float | None:
    """The largest difference, where the differences are more than rounding: those of one turn by their median, or the
    largest of all."""
    parts = [gap[of == turn] for gap, of in zip(gaps, turns, strict=False) for turn in of.unique()]
    median, largest = (max(float(f(part)) for part in parts) for f in (torch.median, torch.max))
    limit = allowed.median + allowed.factor * float(noise.mean())
    if what == "mode":  # a model that is random in both modes has no rounding to measure
        limit = min(limit, allowed.random)
    fine = median <= limit and largest <= allowed.largest + allowed.factor * float(noise.max())
    return None if fine else largest


def explain(found: Difference, policy: Any, engine: GenerationEngine, trial: Trial) -> str:
    """What differs, by how many nats, and what to set."""
    name, short = type(policy).__name__, sum(len(turn[0]) + trial.new for turn in trial.contexts)
    long = sum(len(turn[1]) + trial.new for turn in trial.contexts) + len(trial.filler)
    if found.what == "finite":
        return f"{name}: its log-probs are not finite in this precision; use a wider one (trainer.precision)"
    size = f"differ by up to {found.nats:.2g} nats, and rounding explains {found.rounding:.1g}"
    if found.what == "mode":
        return (
            f"{name}: log-probs of the same tokens in the update's mode and in the sampler's {size}: the model is "
            "random, or computes something else in training, so that another policy would be trained than is sampled; "
            "use another model.policy"
        )
    if found.what == "alone":
        return (
            f"{name}: log-probs of a row of {short} tokens alone and beside one of {long} tokens {size}: the model's "
            "output depends on the other rows of a micro-batch; set generation.budgets.context (and "
            f"model.teacher.max_prompt, where there is a teacher) so that no row has {long} tokens, or use another "
            "model.policy"
        )
    kind = type(engine).__name__
    if type(engine) is GenerateEngine:
        advice = "set model.policy.attn_implementation to eager, or use another model.policy"
    elif type(engine) is CachedEngine:
        advice = OTHER_ENGINE
    else:
        advice = (
            "an engine must sample with the model that `begin` gives it, and tell log-probs of softmax(logits / "
            "temperature) before top-p and top-k"
        )
    return f"{name}: log-probs of {kind} and of the trainer {size}, on rows of up to {long} tokens; {advice}"
