"""Slow references for the credit rules of other papers: one rollout as Python lists, left to right, no tensors."""

import math

import torch
from reference_maths import Rollout, mean, quantile, sign_of, slow_scale, trust

from gear_lightning.credit import CREST, EGRSD, GTPO, PBSD, SCGRPO, Oracle, RoundingNoise, TurnSight


def clamp(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def gap(r: Rollout, t: int) -> float:
    return r.teacher[t] - r.policy[t]


def slow_egrsd(rule: EGRSD, r: Rollout, noise: RoundingNoise) -> list[float]:
    found = []
    for t in r.actions:
        ratio = clamp(math.exp(sign_of(r.base[t]) * gap(r, t)), 1 - rule.clip, 1 + rule.clip)
        unsure = min(r.teacher_entropy[t] / rule.entropy_scale, 1)
        gate = rule.gate_floor + (1 - rule.gate_floor) * (1 - unsure)
        found.append((1 - gate * rule.mix) + gate * rule.mix * ratio)
    return found


def slow_crest(rule: CREST, r: Rollout, noise: RoundingNoise) -> list[float]:
    rounding = [noise.log_ratio] * len(r.actions)
    z = slow_scale("zscore", [-r.policy[t] for t in r.actions], rounding) if r.actions else []
    found = []
    for t, score in zip(r.actions, z, strict=True):
        agrees = sign_of(r.base[t]) * gap(r, t)
        ratio = clamp(math.exp(agrees / rule.temperature), 1 - rule.clip, 1 + rule.clip)
        gate = 1 + rule.gate_slope * (2 / (1 + math.exp(-score)) - 1)
        share = clamp(rule.mix * (agrees > 0) * gate, 0, rule.mix)
        found.append(1 + share * (ratio - 1))
    return found


def slow_gtpo(rule: GTPO, r: Rollout, noise: RoundingNoise) -> list[float]:
    entropy = {t: max(r.entropy[t], rule.entropy_floor) for t in r.actions}
    good, bad = ([t for t in r.actions if sign_of(r.base[t]) == s] for s in (1, -1))
    found = []
    for t in r.actions:
        x = 1.0
        if t in good:
            x = entropy[t] / mean([entropy[u] for u in good])
        if t in bad:
            x = (1 / entropy[t]) / mean([1 / entropy[u] for u in bad])
        found.append((rule.alpha1 + rule.alpha2 * x) / (rule.alpha1 + rule.alpha2))
    return found


def turns_of(r: Rollout) -> dict[int, list[int]]:
    return {k: [t for t in r.actions if r.turns[t] == k] for k in sorted(set(r.turns) - {-1})}


def slow_turnsight(rule: TurnSight, r: Rollout, noise: RoundingNoise) -> list[float]:
    turns = turns_of(r)
    z: dict[int, float] = {}
    for sign in (-1, 0, 1):  # turns are compared with those of the same sign
        mine = [k for k, columns in turns.items() if sign_of(r.base[columns[0]]) == sign]
        means = [mean([gap(r, t) for t in turns[k]]) for k in mine]
        rounding = [noise.log_ratio / math.sqrt(len(turns[k])) for k in mine]
        z |= dict(zip(mine, slow_scale("zscore", means, rounding) if mine else [], strict=True))
    tanh = {t: math.tanh(sign_of(r.base[t]) * z[r.turns[t]]) for t in r.actions}
    return [(1 - rule.mix) + rule.mix * (1 + rule.strength * tanh[t]) for t in r.actions]


def slow_pbsd(rule: PBSD, r: Rollout, noise: RoundingNoise) -> list[float]:
    signal = {}
    for k, columns in turns_of(r).items():
        total = math.fsum(gap(r, t) for t in columns)
        total *= trust(abs(total), noise.log_ratio * math.sqrt(len(columns)))
        signal[k] = clamp(math.tanh(total / rule.delta), -rule.clip, rule.clip)
    return [1 + sign_of(r.base[t]) * signal[r.turns[t]] for t in r.actions]


def slow_scgrpo(rule: SCGRPO, r: Rollout, noise: RoundingNoise) -> list[float]:
    d = {}
    for t in r.actions:
        policy, teacher = (
            torch.distributions.Categorical(logits=torch.tensor(x[t]).double()) for x in (r.policy_top, r.teacher_top)
        )
        d[t] = torch.distributions.kl_divergence(teacher, policy).item()
    found = {}
    for sign in (-1, 0, 1):
        side = [t for t in r.actions if sign_of(r.base[t]) == sign]
        usual = quantile([d[t] for t in side], 0.75) if side else 0.0
        c, kept = max(usual, 1e-4), trust(usual, max(noise.divergence, 1e-4))
        found |= {t: (1 - kept) + kept * d[t] / (d[t] + c) for t in side}
    return [1.0 if r.solved == 1 else found[t] for t in r.actions]


def slow_oracle(rule: Oracle, r: Rollout, noise: RoundingNoise) -> list[float]:
    chosen, runs, inside = set(), [], None
    for t in r.actions:  # left to right: runs of wrong tokens
        wrong = r.decisions[t] < 0 and r.base[t] < 0
        if wrong and inside == r.turns[t]:
            runs[-1].append(t)
        elif wrong:
            runs.append([t])
        inside = r.turns[t] if wrong else None
        if r.decisions[t] > 0 and r.base[t] > 0:
            chosen.add(t)
    chosen |= {t for run in (runs[:1] if rule.blame == "first" else runs) for t in run}
    weights = {}
    for sign in (-1, 0, 1):
        side = [t for t in r.actions if sign_of(r.base[t]) == sign]
        raw = {t: 1 + rule.clip if t in chosen else 1 - rule.clip for t in side}
        some = sign != 0 and any(t in chosen for t in side)
        scale = mean(list(raw.values())) if some and rule.normalise == "mean" else 1.0
        weights |= {t: raw[t] / scale if some else 1.0 for t in side}
    return [weights[t] for t in r.actions]


SLOW = {
    EGRSD: slow_egrsd,
    CREST: slow_crest,
    GTPO: slow_gtpo,
    TurnSight: slow_turnsight,
    PBSD: slow_pbsd,
    Oracle: slow_oracle,
    SCGRPO: slow_scgrpo,
}
