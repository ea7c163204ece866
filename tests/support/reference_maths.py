"""Helpers for the tests of the math: evidence from plain lists, random rollouts, and a slow left-to-right reference.

The reference uses no tensors, no padding and no mask: it iterates over a Python list of one rollout's action tokens.
"""

import math
import random
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st

from gear_lightning.batch import Credit, TokenStats
from gear_lightning.credit import GEAR, Evidence, RoundingNoise

SAMPLED, LISTED = ["k1", "k3"], ["reverse_kl", "forward_kl", "jsd"]
SEEDS = st.integers(0, 10**9)


@dataclass
class Rollout:
    """One rollout as lists over all of its columns; ``turns`` is -1 on prompt and tool output.

    ``turn_advantages`` are the advantages of each column, if turns have their own.
    """

    turns: list[int]
    policy: list[float]
    teacher: list[float]
    entropy: list[float]
    advantage: float = 1.0
    teacher_entropy: list[float] | None = None
    stop: list[bool] | None = None
    version: int = 0
    policy_top: list[list[float]] | None = None
    teacher_top: list[list[float]] | None = None
    decisions: list[int] | None = None
    turn_advantages: list[float] | None = None
    solved: int = 2
    parts: list[int] | None = None

    def __post_init__(self) -> None:
        self.parts = self.parts or [0] * len(self.turns)
        self.decisions = self.decisions or [0] * len(self.turns)
        self.stop = self.stop or [False] * len(self.turns)
        self.teacher_entropy = self.teacher_entropy or self.entropy

    @property
    def actions(self) -> list[int]:
        """Return the columns of the action tokens."""
        return [t for t, turn in enumerate(self.turns) if turn >= 0]

    @property
    def base(self) -> list[float]:
        """Return the advantage of each column before credit."""
        return self.turn_advantages or [self.advantage] * len(self.turns)

    def only(self, keep: list[int]) -> "Rollout":
        """Return the rollout with only these columns."""
        parts = {
            name: None if (value := getattr(self, name)) is None else [value[t] for t in keep]
            for name in (
                "turns",
                "policy",
                "teacher",
                "entropy",
                "teacher_entropy",
                "stop",
                "policy_top",
                "teacher_top",
                "decisions",
                "turn_advantages",
                "parts",
            )
        }
        return Rollout(advantage=self.advantage, version=self.version, solved=self.solved, **parts)  # type: ignore[arg-type]


def rollout(d: list[float], **options: Any) -> Rollout:
    """Return a rollout with one turn and k1 divergence ``d``: the teacher is at -1 nat, the policy d above it."""
    n = len(d)
    options = {"turns": [0] * n, "entropy": [0.0] * n, **options}
    return Rollout(policy=[x - 1.0 for x in d], teacher=[-1.0] * n, **options)


def with_turn_advantages(rng: random.Random, r: Rollout) -> Rollout:
    """Return the rollout with an advantage for each turn, of either sign or 0."""
    own = {k: rng.choice([-1.5, -0.5, 0.0, 0.75]) for k in sorted(set(r.turns))}
    return replace(r, turn_advantages=[own[k] for k in r.turns])


def evidence(rows: list[Rollout], padding: int = 0, noise: RoundingNoise = RoundingNoise()) -> Evidence:
    """Return the rows as a padded micro-batch, with garbage (not zeros) in entries that must be ignored."""
    width = max(len(r.turns) for r in rows) + padding

    def pad(lists: list[list[float]], fill: float = 7.0) -> torch.Tensor:
        return torch.tensor([x + [fill] * (width - len(x)) for x in lists], dtype=torch.float32)

    def stack(lists: list[list[list[float]]] | None) -> torch.Tensor | None:
        if lists is None:
            return None
        top = max((len(p) for row in lists for p in row), default=1)
        return torch.tensor([row + [[-math.log(top)] * top] * (width - len(row)) for row in lists])

    turns = pad([r.turns for r in rows], -1).long()
    policy_top = None if rows[0].policy_top is None else [r.policy_top or [] for r in rows]
    teacher_top = None if rows[0].teacher_top is None else [r.teacher_top or [] for r in rows]
    tops = [stack(policy_top), stack(teacher_top)]
    ids = [None if top is None else torch.zeros_like(top, dtype=torch.long) for top in tops]
    return Evidence(
        advantages=torch.tensor([float(r.advantage) for r in rows]),
        action_mask=turns >= 0,
        turn_ids=turns,
        stop_mask=pad([[float(s) for s in r.stop] for r in rows], 0.0) > 0,
        policy_version=torch.tensor([r.version for r in rows]),
        policy=TokenStats(pad([r.policy for r in rows]), pad([r.entropy for r in rows]), ids[0], tops[0]),
        teacher=TokenStats(
            pad([r.teacher for r in rows], -3.0), pad([r.teacher_entropy for r in rows]), ids[1], tops[1]
        ),
        turn_advantages=pad([r.base for r in rows]) if any(r.turn_advantages for r in rows) else None,
        decisions=pad([[float(x) for x in r.decisions or []] for r in rows], -1).long(),
        solved=torch.tensor([r.solved for r in rows]),
        parts=pad([[float(x) for x in r.parts or []] for r in rows], 1).long(),
        noise=noise,
    )


def in_float64(given: Any) -> Any:
    """Evidence, or a part of it, with its floats in double precision: dividing by a small standard deviation makes
    float32's rounding as large as one likes."""
    if isinstance(given, torch.Tensor):
        return given.double() if given.is_floating_point() else given
    if is_dataclass(given):
        return replace(given, **{name: in_float64(value) for name, value in vars(given).items()})
    return given


def random_rollout(rng: random.Random, *, vocabulary: int = 0) -> Rollout:
    """Return a prompt, turns of 0 to 40 actions, and observations between them.

    Values are on a grid, so that sums are exact and ties are common. About one rollout in ten has no action tokens.
    """
    turns = [-1] * rng.randint(0, 3)
    for turn in range(rng.choice([0, 1, 1, 1, 2, 2, 3, 3, 4])):
        for _ in range(rng.choice([0, 1, 2, 4, 6, 9, 9, 40])):
            turns += [turn] + [-1] * (rng.random() < 0.05)  # a masked token inside a turn must have no effect
        turns += [-1] * rng.randint(0, 3)
    turns = turns or [-1]
    n = len(turns)
    spread = rng.choice([0, 4, 32, 32, 200])
    teacher = [-rng.randint(0, 64) / 16 - 12 for _ in turns]

    more = random.Random(str(teacher))  # a separate generator: the other values do not depend on it
    decisions: list[int] = []
    while len(decisions) < n:
        decisions += [more.choice([-1, 0, 0, 1])] * more.choice([1, 1, 2, 3])

    def distribution() -> list[float]:
        logits = torch.tensor([rng.gauss(0, 2) for _ in range(vocabulary)])
        return logits.log_softmax(-1).tolist()

    return Rollout(
        turns=turns,
        policy=[t + rng.randint(-spread, spread) / 16 for t in teacher],
        teacher=teacher,
        entropy=[rng.randint(0, 16) / 8 for _ in turns],
        teacher_entropy=[rng.randint(0, 16) / 8 for _ in turns],
        advantage=rng.choice([-1.5, -0.5, 0.0, 0.75, 2.0]),
        stop=[
            turn >= 0 and (t + 1 == n or turns[t + 1] != turn) and rng.random() < 0.7 for t, turn in enumerate(turns)
        ],
        version=rng.randint(0, 12),
        policy_top=[distribution() for _ in turns] if vocabulary else None,
        teacher_top=[distribution() for _ in turns] if vocabulary else None,
        decisions=decisions[:n],
        solved=more.randint(0, 4),
        parts=_parts(turns, more),
    )


def _parts(turns: list[int], rng: random.Random) -> list[int]:
    """Return parts of the turns' tokens: 0 answer, 1 reasoning, 2 call, in runs; 0 elsewhere."""
    parts: list[int] = []
    while len(parts) < len(turns):
        parts += [rng.choice([0, 1, 2])] * rng.choice([1, 2, 5, 9])
    return [part if turn >= 0 else 0 for turn, part in zip(turns, parts, strict=False)]


def some_rollouts(seed: int, n: int = 6, **options: Any) -> list[Rollout]:
    """Return random rollouts."""
    rng = random.Random(seed)
    return [random_rollout(rng, **options) for _ in range(n)]


def some_noise(rng: random.Random) -> RoundingNoise:
    """Return no noise, as in float32, or noise as large as the signals."""
    return RoundingNoise(*(rng.choice([0.0, 1e-5, 0.1, 0.5]) for _ in range(2)))


def random_rule(rng: random.Random, divergences: list[str], cls: type[GEAR] = GEAR, **fixed: Any) -> GEAR:
    """Return a GEAR rule with random options."""
    divergence = rng.choice(divergences)
    signed = divergence == "k1"
    rule = rng.choice(["quantile", "absolute", "zscore", "rise"])
    # z-score levels for which no 0/1 pattern of few tokens is exactly at the threshold
    level = {"quantile": rng.choice([0.5, 0.8, 0.95, 1.0]), "zscore": rng.choice([1.1, 1.7]), "rise": rng.randint(1, 5)}
    options: dict[str, Any] = {
        "divergence": divergence,
        **({"divergence_limit": rng.choice([None, 4.0])} if divergence in ("k1", "k3") else {"divergence_top_k": 8}),
        "scale": rng.choice([None, "none", "zscore"] + ([] if signed else ["saturate"])),
        "anchor_rule": rule,
        "anchor_level": level[rule] if rule == "zscore" else rng.choice([None, level.get(rule) and float(level[rule])]),
        # a rise of 0 over the mean of equal values that are not on the grid depends on rounding
        "anchor_floor": rng.choice([None, 0.25, 1.0] + [0.0] * (signed or rule != "rise")),
        "anchor_at": rng.choice(["onset", "peak"]),
        "segment_end": (end := rng.choice(["entropy_high", "entropy_low", "window", "turn", "divergence", "none"])),
        "segment_max": rng.choice([1, 2, 3, 5, 128]),
        "segment_value": rng.choice(["departure", "mean"]),
        "entropy": rng.choice(["policy", "teacher", "surprisal"]) if "entropy" in end else "policy",
        "entropy_quantile": rng.choice([0.0, 0.3, 0.5, 0.8, 1.0]) if "entropy" in end else 0.8,
        "sign_rule": rng.choice(["symmetric", "negatives_only", "reversed_on_correct"] + ["sign_aware"] * signed),
        "kappa": rng.choice([0.0] + 3 * [0.3, 1.0, 2.5]),
        "clip": rng.choice([0.0] + 3 * [0.2, 0.9, 0.99]),
        "direction_gate": rng.random() < 0.2,
        "mix": rng.choice([1.0, 1.0, 1.0, 0.5, 0.5, 0.0]),
        "mix_decay": rng.choice([None, None, None, 1, 8, 100]),
        "normalise": rng.choice(["mean", "geometric", "none"]),
        "exclude_stop": rng.random() < 0.5,
        "exclude_tail": rng.choice([0, 0, 1, 4]),
    }
    options |= fixed
    segments = options["segment_end"] != "none" and cls.__name__ != "Turn"
    if not segments:  # these would do nothing, and are rejected
        idle = ["anchor_rule", "anchor_level", "anchor_floor", "anchor_at", "segment_max", "segment_value"]
        for name in [*idle, "entropy", "entropy_quantile", *["segment_end"] * (cls.__name__ == "Turn")]:
            options.pop(name, None)
    return cls(**options)


def quantile(values: list[float], q: float) -> float:
    """Return torch's own quantile, as the reference."""
    return torch.quantile(torch.tensor(values), q).item()


def mean(values: list[float]) -> float:
    """Return the mean, with an exact sum."""
    return math.fsum(values) / len(values)


def single(x: float) -> float:
    """Return the value rounded to float32."""
    return torch.tensor(x, dtype=torch.float32).item()


def slow_divergence(rule: GEAR, r: Rollout, t: int) -> float:
    """Return the divergence of policy and teacher at column t, from the definitions."""
    limit = 10.0 if rule.divergence_limit is None else rule.divergence_limit
    k1 = min(max(r.policy[t] - r.teacher[t], -limit), limit)
    if rule.divergence == "k1":
        return k1
    if rule.divergence == "k3":
        return math.expm1(-k1) + k1
    assert r.policy_top is not None
    assert r.teacher_top is not None
    s, u = torch.tensor(r.policy_top[t]).double(), torch.tensor(r.teacher_top[t]).double()
    s, u = (torch.distributions.Categorical(logits=x) for x in (s, u))
    if rule.divergence == "reverse_kl":
        return torch.distributions.kl_divergence(s, u).item()
    if rule.divergence == "forward_kl":
        return torch.distributions.kl_divergence(u, s).item()
    m = torch.distributions.Categorical(probs=(s.probs + u.probs) / 2)
    return 0.5 * sum(torch.distributions.kl_divergence(x, m).item() for x in (s, u))


def slow_anchors(rule: GEAR, d: list[float]) -> list[bool]:
    """Return the anchors, token by token."""
    n = len(d)
    floor = (0.5 if rule.divergence == "k1" else 0.05) if rule.anchor_floor is None else rule.anchor_floor
    level = {"quantile": 0.95, "absolute": 0, "zscore": 2.0, "rise": 16}[rule.anchor_rule]
    level = level if rule.anchor_level is None else rule.anchor_level
    found = []
    for t in range(n):
        if rule.anchor_rule == "quantile":
            tau = quantile(d, level)
        elif rule.anchor_rule == "zscore":
            mu = mean(d)
            tau = mu + level * math.sqrt(mean([(x - mu) ** 2 for x in d]))
        elif rule.anchor_rule == "rise":
            before = d[max(0, t - int(level)) : t]
            tau = single(single(mean(before) if before else 0.0) + floor)
        else:
            tau = -math.inf
        yes = d[t] >= tau and d[t] >= single(floor)
        if rule.anchor_at == "peak":
            yes = yes and (t == 0 or d[t] > d[t - 1]) and (t == n - 1 or d[t] >= d[t + 1])
        found.append(yes)
    return found


def slow_segments(rule: GEAR, d: list[float], h: list[float], turns: list[int]) -> list[int]:
    """Return the anchor (index among the action tokens) of every token, -1 outside: the scan of the specification."""
    n, place = len(d), [-1] * len(d)
    if n == 0 or rule.segment_end == "none":
        return place
    floor = single((0.5 if rule.divergence == "k1" else 0.05) if rule.anchor_floor is None else rule.anchor_floor)
    spikes, decision = slow_anchors(rule, d), quantile(h, rule.entropy_quantile)
    closes = {
        "entropy_high": lambda e: h[e] >= decision,
        "entropy_low": lambda e: h[e] < decision,
        "divergence": lambda e: d[e] < floor,
        "window": lambda e: False,
        "turn": lambda e: False,
    }[rule.segment_end]
    t = 0
    while t < n:
        if not spikes[t]:
            t += 1
            continue
        e = t + 1
        while e < n and turns[e] == turns[t] and e - t < rule.segment_max and not closes(e) and not spikes[e]:
            e += 1
        place[t:e] = [t] * (e - t)
        t = e
    return place


def sign_of(x: float) -> int:
    """Return 1, 0 or -1."""
    return (x > 0) - (x < 0)


def trust(size: float, noise: float) -> float:
    """Return the share of a signal of this size to keep."""
    if noise == 0:
        return 1.0
    return 0.0 if size == 0 else size**4 / (size**4 + noise**4)


def slow_scale(how: str, c: list[float], noise: list[float] | None = None) -> list[float]:
    """Return the scaled credit signal of tokens that share their credit."""
    floor = math.sqrt(mean([x * x for x in noise])) if noise else 0.0
    if how == "saturate":
        half = max(quantile(c, 0.75), 1e-4, floor)
        kept = trust(math.sqrt(mean([x * x for x in c])), floor)
        return [kept * x / (x + half) for x in c]
    if how == "zscore":
        mu = mean(c)
        std = 0.0 if min(c) == max(c) else math.sqrt(mean([(x - mu) ** 2 for x in c]))
        return [0.0 if min(c) == max(c) else trust(std, floor) * (x - mu) / (std + 1e-6) for x in c]
    return c


def slow_noise(rule: GEAR, noise: RoundingNoise, place: list[int]) -> list[float]:
    """Return the rounding noise of each token's credit signal, given its segments."""
    each = noise.divergence if rule.divergence in LISTED else noise.log_ratio
    if rule.divergence == "k3":
        each = math.exp(each) - 1 - each
    averaged = rule.divergence == "k1" and rule.segment_value == "mean"
    return [each / math.sqrt(place.count(a)) if averaged and a >= 0 else each for a in place]


def moved_mean(values: list[float], advantages: list[float]) -> float:
    """Return the mean weighted by the size of the advantages; with equal weights if all are 0."""
    total = math.fsum(map(abs, advantages))
    if total == 0:
        return mean(values)
    return math.fsum(x * abs(a) for x, a in zip(values, advantages, strict=True)) / total


def slow_weight(rule: GEAR, c: float, average: float, advantage: float) -> float:
    """Return the weight of one token before mixing."""
    sign = sign_of(advantage)
    if rule.sign_rule == "symmetric":
        w = 1 + rule.kappa * (c - average)
    else:
        rules = {"sign_aware": -sign, "negatives_only": float(sign < 0), "reversed_on_correct": 1.0}
        w = math.exp(min(rules[rule.sign_rule] * rule.kappa * c, 100.0))
    w = min(max(w, 1 - rule.clip), 1 + rule.clip)
    return max(w, 1.0) if rule.direction_gate else w


def slow_credit(
    rule: GEAR, r: Rollout, noise: RoundingNoise = RoundingNoise()
) -> tuple[list[float], list[float], list[int]]:
    """Return weights, divergence and anchors over the action tokens of one rollout; anchors are columns."""
    where = r.actions
    n = len(where)
    if n == 0:
        return [], [], []
    d = [single(slow_divergence(rule, r, t)) for t in where]
    for i, t in enumerate(where):
        if (rule.exclude_stop and r.stop[t]) or n - i <= rule.exclude_tail:
            d[i] = 0.0
    h = {"policy": r.entropy, "teacher": r.teacher_entropy, "surprisal": [-x for x in r.policy]}
    place = slow_segments(rule, d, [h[rule.entropy][t] for t in where], [r.turns[t] for t in where])
    if rule.segment_value == "departure":
        c = [d[a] if a >= 0 else d[i] for i, a in enumerate(place)]
    else:
        c = [mean([d[j] for j in range(n) if place[j] == a]) if a >= 0 else d[i] for i, a in enumerate(place)]
    rounding = slow_noise(rule, noise, place)
    share = rule.mix if rule.mix_decay is None else rule.mix * max(0.0, 1 - r.version / rule.mix_decay)
    weights = [1.0] * n
    for sign in (-1, 0, 1):  # credit moves among tokens whose advantages have the same sign
        side = [i for i, t in enumerate(where) if sign_of(r.base[t]) == sign]
        if not side:
            continue
        base = [r.base[where[i]] for i in side]
        own = slow_scale(
            rule.scale or ("none" if rule.divergence == "k1" else "saturate"),
            [c[i] for i in side],
            [rounding[i] for i in side],
        )
        average = moved_mean(own, base)
        mine = [1 + share * (slow_weight(rule, x, average, base[0]) - 1) for x in own]
        if rule.normalise == "mean":
            mine = [w / moved_mean(mine, base) for w in mine]
        elif rule.normalise == "geometric":
            mine = [w / math.exp(moved_mean([math.log(x) for x in mine], base)) for w in mine]
        for i, w in zip(side, mine, strict=True):
            weights[i] = w
    return weights, d, [where[a] if a >= 0 else -1 for a in place]


def on_actions(credit: Credit, e: Evidence) -> list[list[float]]:
    """Return the weights of the action tokens of each row."""
    return [w[m].tolist() for w, m in zip(credit.weights, e.action_mask, strict=True)]
