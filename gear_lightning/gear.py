"""GEAR's maths: divergence -> anchors -> segments -> weights, as pure functions of tensors.

Index convention: entry t of every ``[batch, seq]`` tensor is about token t. ``mask`` marks tokens the policy sampled;
prompt and tool output in between are invisible to every statistic, length and neighbour here. All statistics are those
of one rollout, so that no split into micro-batches can change a weight.

Source: GEAR, arXiv 2605.11853 (abstract and summaries). The paper's body is not public; the rules below that it leaves
open are reconstructions, and each is an argument. `gear_lightning.credit.GEAR` lists them with their defaults.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Divergence = Literal["k1", "k3", "reverse_kl", "forward_kl", "jsd"]
Scale = Literal["none", "zscore", "saturate"]
AnchorRule = Literal["quantile", "absolute", "zscore", "rise"]
SegmentEnd = Literal["entropy_high", "entropy_low", "window", "turn", "divergence", "none"]
SignRule = Literal["sign_aware", "symmetric", "negatives_only", "reversed_on_correct"]
Normalise = Literal["mean", "geometric", "none"]

SATURATE_FLOOR = 1e-4  # nats; SC-GRPO's floor of c in x / (x + c)


def sampled_divergence(
    policy: Float[Tensor, "batch seq"], teacher: Float[Tensor, "batch seq"], kind: Divergence, limit: float = 10.0
) -> Float[Tensor, "batch seq"]:
    """Divergence at the sampled token from its log-probs under policy and teacher, in nats.

    ``k1 = log p_S - log p_T`` (signed; the single-sample estimate of KL(S || T)), ``k3 = exp(-k1) - 1 + k1`` (>= 0);
    k1 is limited to [-limit, limit] first.

    Raises:
        ValueError: ``kind`` needs whole distributions (see `distribution_divergence`).
    """
    k1 = (policy - teacher).clamp(-limit, limit)
    if kind == "k1":
        return k1
    if kind == "k3":
        return (torch.expm1(-k1) + k1).clamp_min(0)  # exp(-k1) - 1 is rounded below -k1 near 0
    raise ValueError(f"{kind} is not a divergence of sampled tokens")


def with_tail(logprobs: Float[Tensor, "batch seq top"]) -> Float[Tensor, "batch seq bins"]:
    """Append one bucket with the probability that the listed tokens leave over, so that each row sums to 1."""
    rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp_min(1e-10)
    return torch.cat([logprobs, rest.log()], dim=-1)


def distribution_divergence(
    policy_top: Float[Tensor, "batch seq top"], teacher_top: Float[Tensor, "batch seq top"], kind: Divergence
) -> Float[Tensor, "batch seq"]:
    """Divergence of two distributions given by log-probs of the policy's top-k tokens plus one tail bucket, in nats.

    ``reverse_kl`` = KL(S || T), ``forward_kl`` = KL(T || S), ``jsd`` = half their sum against the mixture (<= log 2).
    All are >= 0, and exact where the top-k is the whole vocabulary.

    Raises:
        ValueError: ``kind`` is a divergence of sampled tokens.
    """
    s, t = with_tail(policy_top), with_tail(teacher_top)
    if kind == "reverse_kl":
        return (s.exp() * (s - t)).sum(-1).clamp_min(0)
    if kind == "forward_kl":
        return (t.exp() * (t - s)).sum(-1).clamp_min(0)
    if kind == "jsd":
        gap = t - s
        mixture = torch.logaddexp(torch.zeros_like(gap), gap) - math.log(2)  # less s; so written, it is 0 where s = t
        return (0.5 * (t.exp() * (gap - mixture) - s.exp() * mixture)).sum(-1).clamp_min(0)
    raise ValueError(f"{kind} is not a divergence of distributions")


def masked_mean(x: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]) -> Float[Tensor, "batch 1"]:
    """Mean over the masked-in entries of each row; 0 for an empty row, and exactly x where all entries equal x."""
    low = masked_quantile(x, mask, 0.0)  # a plain sum is rounded; (x - mean) / std of equal values would then be noise
    return low + torch.where(mask, x - low, 0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp_min(1)


def masked_quantile(
    x: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"], q: float
) -> Float[Tensor, "batch 1"]:
    """Linearly interpolated quantile over the masked-in entries of each row (as `torch.quantile`); 0 for no entries."""
    count = mask.sum(-1, keepdim=True)
    ordered = torch.where(mask, x, torch.inf).sort(-1).values
    place = q * (count - 1).clamp_min(0).to(x.dtype)
    low, high = place.floor().long(), place.ceil().long()
    value = torch.lerp(ordered.gather(-1, low), ordered.gather(-1, high), place - low)
    return torch.where(count > 0, value, torch.zeros_like(value))


def compact(mask: Bool[Tensor, "batch seq"]) -> tuple[Int[Tensor, "batch n"], Bool[Tensor, "batch n"]]:
    """Columns of the masked-in entries of each row, moved to the left.

    Returns:
        ``columns`` (for `torch.gather`; padding repeats masked-out columns) and which of them are real.
    """
    width = int(mask.sum(-1).max()) if mask.numel() else 0
    columns = torch.argsort((~mask).to(torch.uint8), dim=-1, stable=True)[:, : max(width, 1)]
    return columns, mask.gather(-1, columns)


def find_spikes(
    divergence: Float[Tensor, "batch n"],
    mask: Bool[Tensor, "batch n"],
    *,
    rule: AnchorRule = "quantile",
    level: float = 0.95,
    floor: float = 0.5,
    at: Literal["onset", "peak"] = "onset",
) -> Bool[Tensor, "batch n"]:
    """Tokens at which a departure starts, on compacted tokens.

    A token is a spike where its divergence reaches both ``floor`` (nats) and the rule's threshold: ``quantile``: the
    rollout's ``level`` quantile; ``absolute``: only the floor; ``zscore``: mean + ``level`` standard deviations of the
    rollout; ``rise``: the mean of the ``level`` tokens before it, plus the floor. ``at="peak"`` keeps only local maxima
    of the divergence among them.
    """
    if rule == "quantile":
        threshold = masked_quantile(divergence, mask, level).clamp_min(floor)
    elif rule == "absolute":
        threshold = torch.full_like(divergence[:, :1], floor)
    elif rule == "zscore":
        mean = masked_mean(divergence, mask)
        std = masked_mean((divergence - mean) ** 2, mask).sqrt()
        threshold = (mean + level * std).clamp_min(floor)
    else:
        total = torch.nn.functional.pad(torch.where(mask, divergence, 0).cumsum(-1), (1, 0))
        here = torch.arange(divergence.shape[-1], device=divergence.device)
        start = (here - min(int(level), divergence.shape[-1])).clamp_min(0)
        before = (total[:, here] - total[:, start]) / (here - start).clamp_min(1)
        threshold = (before + floor).clamp_min(floor)
    spikes = mask & (divergence >= threshold)
    if at == "peak":
        left = torch.nn.functional.pad(divergence[:, :-1], (1, 0), value=-torch.inf)
        right = torch.nn.functional.pad(torch.where(mask, divergence, -torch.inf)[:, 1:], (0, 1), value=-torch.inf)
        spikes = spikes & (divergence > left) & (divergence >= right)
    return spikes


def find_segments(
    spikes: Bool[Tensor, "batch n"],
    divergence: Float[Tensor, "batch n"],
    entropy: Float[Tensor, "batch n"],
    turns: Int[Tensor, "batch n"],
    mask: Bool[Tensor, "batch n"],
    *,
    end: SegmentEnd = "entropy_high",
    entropy_quantile: float = 0.8,
    floor: float = 0.5,
    max_length: int = 128,
) -> Int[Tensor, "batch n"]:
    """Anchor of the segment that each compacted token is in, -1 outside segments.

    A segment opens at a spike and runs until the next spike, the end of the assistant turn, ``max_length`` tokens, or
    the closing event: ``entropy_high``: the first token with entropy at or above the rollout's ``entropy_quantile``
    (the next decision point); ``entropy_low``: the first token below it; ``divergence``: the first token below
    ``floor``; ``window`` and ``turn``: no other event; ``none``: there are no segments at all.

    Equal to a left-to-right scan: the two running maxima are the last spike and the last closing event.
    """
    if end == "none":
        return torch.full_like(turns, -1)
    where = torch.arange(spikes.shape[-1], device=spikes.device).expand_as(turns)
    closing = torch.nn.functional.pad(turns[:, 1:] != turns[:, :-1], (1, 0), value=True)
    if end in ("entropy_high", "entropy_low"):
        decision = entropy >= masked_quantile(entropy, mask, entropy_quantile)
        closing = closing | (decision if end == "entropy_high" else ~decision)
    elif end == "divergence":
        closing = closing | (divergence < floor)
    last_spike = torch.where(spikes, where, -1).cummax(-1).values
    last_close = torch.where(closing & ~spikes, where, -1).cummax(-1).values
    inside = mask & (last_spike > last_close) & (where - last_spike < max_length)
    return torch.where(inside, last_spike, -1)


def segment_signal(
    divergence: Float[Tensor, "batch seq"], anchor: Int[Tensor, "batch seq"], value: Literal["departure", "mean"]
) -> Float[Tensor, "batch seq"]:
    """Credit signal of each token: inside a segment the divergence at its anchor (``departure``) or the segment's
    ``mean``, outside its own."""
    where = anchor.clamp_min(0)
    if value == "departure":
        inside = divergence.gather(-1, where)
    else:
        member = (anchor >= 0).to(divergence.dtype)
        total = torch.zeros_like(divergence).scatter_add(-1, where, divergence * member)
        count = torch.zeros_like(divergence).scatter_add(-1, where, member)
        inside = (total / count.clamp_min(1)).gather(-1, where)
    return torch.where(anchor >= 0, inside, divergence)


def scale_signal(
    signal: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"], scale: Scale
) -> Float[Tensor, "batch seq"]:
    """Scale of the credit signal: ``none``; ``zscore`` per rollout; ``saturate``: x / (x + c) with c the rollout's 75th
    percentile, at least 1e-4 (for unsigned signals; result in [0, 1))."""
    if scale == "none":
        return signal
    if scale == "saturate":
        return signal / (signal + masked_quantile(signal, mask, 0.75).clamp_min(SATURATE_FLOOR))
    mean = masked_mean(signal, mask)
    std = masked_mean((signal - mean) ** 2, mask).sqrt()
    return (signal - mean) / (std + 1e-6)


def signal_weights(
    signal: Float[Tensor, "batch seq"],
    advantages: Float[Tensor, "batch #seq"],
    mask: Bool[Tensor, "batch seq"],
    *,
    sign_rule: SignRule = "sign_aware",
    kappa: float = 1.0,
    clip: float = 0.9,
    direction_gate: bool = False,
) -> Float[Tensor, "batch seq"]:
    """Weight of each token before mixing and normalisation, in [1 - clip, 1 + clip]; 1 outside ``mask``.

    With c the signal (large = departure) and A the advantage before credit, of the rollout or of each token:
    ``sign_aware``: exp(-sign(A) kappa c); ``symmetric``: 1 + kappa (c - mean c); ``negatives_only``: exp(kappa c) where
    A < 0, else 1; ``reversed_on_correct``: exp(kappa c) for both signs. ``direction_gate`` (from CREST) puts the weight
    to 1 where it would be lower.
    """
    sign = advantages.sign()
    if sign_rule == "symmetric":
        weights = 1 + kappa * (signal - masked_mean(signal, mask))
    else:
        direction = {
            "sign_aware": -sign,
            "negatives_only": (sign < 0).to(signal.dtype),
            "reversed_on_correct": torch.ones_like(sign),
        }[sign_rule]
        weights = torch.exp(direction * kappa * signal)
    weights = weights.clamp(1 - clip, 1 + clip)
    if direction_gate:
        weights = weights.clamp_min(1)
    return torch.where(mask, weights, 1)


def normalise_weights(
    weights: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"], how: Normalise
) -> Float[Tensor, "batch seq"]:
    """Divide by the rollout's arithmetic or geometric mean weight, so that credit is moved and not made.

    Where that mean is 0 (the weights underflowed) it cannot be restored: the weights are 1.
    """
    if how == "none":
        return weights
    if how == "mean":
        mean = masked_mean(weights, mask)
    else:
        mean = masked_mean(weights.log(), mask).exp()
    return torch.where(mask & (mean > 0), weights / torch.where(mean > 0, mean, 1), 1)
