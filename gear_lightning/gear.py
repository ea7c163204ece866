"""GEAR's math: divergence -> anchors -> segments -> weights, as pure functions of tensors.

Index convention: entry t of every ``[batch, seq]`` tensor belongs to token t. ``mask`` marks tokens the policy sampled;
every statistic, length and neighbor here ignores prompt tokens and the tool output between turns. All statistics are
computed within one rollout, so the split into micro-batches cannot change a weight. Statistics that divide or center
weights are further restricted to the tokens of a rollout whose advantages have one sign: if turns have advantages of
both signs, the positive and the negative advantages each keep their sum. ``noise`` is a constant: the 99th percentile
of a signal that rounding alone produces.

Source: GEAR, arXiv 2605.11853. Only its abstract and summaries were available; the rules below that they leave open are
reconstructions, and each of them is an argument. `gear_lightning.credit.GEAR` lists them with their defaults.
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

SATURATE_FLOOR = 1e-4  # nats; lower bound of c in x / (x + c), from SC-GRPO


def sampled_divergence(
    policy: Float[Tensor, "batch seq"], teacher: Float[Tensor, "batch seq"], kind: Divergence, limit: float = 10.0
) -> Float[Tensor, "batch seq"]:
    """Return the divergence at the sampled token from its log-probs under policy and teacher, in nats.

    ``k1 = log p_S - log p_T`` (signed; the single-sample estimate of KL(S || T)), ``k3 = exp(-k1) - 1 + k1`` (>= 0);
    k1 is clamped to [-limit, limit] first.

    Raises:
        ValueError: ``kind`` needs full distributions (see `distribution_divergence`).
    """
    k1 = (policy - teacher).clamp(-limit, limit)
    if kind == "k1":
        return k1
    if kind == "k3":
        return (torch.expm1(-k1) + k1).clamp_min(0)  # near 0, rounding puts exp(-k1) - 1 below -k1
    raise ValueError(f"{kind} is not a divergence of sampled tokens")


def with_tail(logprobs: Float[Tensor, "batch seq top"]) -> Float[Tensor, "batch seq bins"]:
    """Append one bucket with the probability of all tokens that are not listed, so that each row sums to 1."""
    rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp_min(1e-10)
    return torch.cat([logprobs, rest.log()], dim=-1)


def distribution_divergence(
    policy_top: Float[Tensor, "batch seq top"], teacher_top: Float[Tensor, "batch seq top"], kind: Divergence
) -> Float[Tensor, "batch seq"]:
    """Return the divergence of two distributions, in nats.

    Both are given by log-probs of the policy's top-k tokens plus one tail bucket. ``reverse_kl`` = KL(S || T),
    ``forward_kl`` = KL(T || S), ``jsd`` = half the sum of both against the mixture (<= log 2). All are >= 0, and exact
    if the top-k is the full vocabulary.

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
        mixture = torch.logaddexp(torch.zeros_like(gap), gap) - math.log(2)  # minus s; exactly 0 where s = t
        return (0.5 * (t.exp() * (gap - mixture) - s.exp() * mixture)).sum(-1).clamp_min(0)
    raise ValueError(f"{kind} is not a divergence of distributions")


def masked_mean(
    x: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"], share: Float[Tensor, "batch seq"] | None = None
) -> Float[Tensor, "batch 1"]:
    """Return the mean over the masked-in entries of each row; 0 for an empty row, exactly x if all entries equal x.

    Args:
        x: values.
        mask: entries that count.
        share: weight of each entry, not negative; None: equal weights.
    """
    # subtract the smallest entry first: a plain sum is rounded, and (x - mean) / std of equal values would be noise
    low = torch.where(mask, x, torch.inf).amin(-1, keepdim=True)
    low = torch.where(mask.any(-1, keepdim=True), low, 0)
    share = torch.ones_like(x) if share is None else share
    total = torch.where(mask, (x - low) * share, 0).sum(-1, keepdim=True)
    count = torch.where(mask, share, 0).sum(-1, keepdim=True)
    return low + total / torch.where(count > 0, count, 1)


def masked_quantile(
    x: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"], q: float
) -> Float[Tensor, "batch 1"]:
    """Return the linearly interpolated quantile of each row's masked-in entries (as `torch.quantile`); 0 if empty."""
    count = mask.sum(-1, keepdim=True)
    ordered = torch.where(mask, x, torch.inf).sort(-1).values
    place = q * (count - 1).clamp_min(0).to(x.dtype)
    low, high = place.floor().long(), place.ceil().long()
    value = torch.lerp(ordered.gather(-1, low), ordered.gather(-1, high), place - low)
    return torch.where(count > 0, value, torch.zeros_like(value))


def one_sign(
    advantages: Float[Tensor, "batch #seq"] | None, mask: Bool[Tensor, "batch seq"]
) -> list[Bool[Tensor, "batch seq"]]:
    """Split ``mask`` into parts whose advantages have the same sign (positive, negative, 0), without empty parts.

    Statistics over one part at a time move credit only among tokens of the same sign, never from one sign to the other.
    None: all of ``mask`` is one part. A row of one sign has one part, equal to its row of ``mask``.
    """
    if advantages is None:
        return [mask]
    sign = advantages.sign()
    parts = [mask & (sign == s) for s in (1, -1, 0)]
    return [part for part in parts if part.any()]


def size_shares(
    advantages: Float[Tensor, "batch #seq"] | None, part: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq"] | None:
    """Return the weight of each token of one part from `one_sign` in a mean that must preserve the part's total credit.

    The weight is the size of the advantage divided by the largest one of the row, and exactly 1 if all sizes are equal
    (also if all are 0).
    """
    if advantages is None:
        return None
    size = torch.where(part, advantages.abs(), 0)
    largest = size.amax(-1, keepdim=True)
    return torch.where(largest > 0, size / torch.where(largest > 0, largest, 1), 1)


def above_noise(
    size: Float[Tensor, "batch #seq"], noise: Float[Tensor, "batch #seq"] | float
) -> Float[Tensor, "batch #seq"]:
    """Return the share of a signal to keep, given its size relative to rounding noise: 1 / (1 + (noise / size)^4).

    The share is 1/2 if the size equals the noise (its 99th percentile), about 0.01 at a third of the noise, within
    1e-3 of 1 from 5.7 times the noise, and exactly 1 if there is no noise. The formula is this project's own.
    """
    noise = torch.as_tensor(noise, dtype=size.dtype, device=size.device)
    return torch.where(noise > 0, 1 / (1 + (noise / size) ** 4), 1)


def compact(mask: Bool[Tensor, "batch seq"]) -> tuple[Int[Tensor, "batch n"], Bool[Tensor, "batch n"]]:
    """Return the columns of the masked-in entries of each row, moved to the left.

    Returns:
        ``columns`` (for `torch.gather`; padding repeats masked-out columns), and a mask of the columns that are real.
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
    """Return the tokens at which a departure starts, on compacted tokens.

    A token is a spike if its divergence reaches both ``floor`` (nats) and the rule's threshold: ``quantile``: the
    rollout's ``level`` quantile; ``absolute``: only the floor; ``zscore``: mean + ``level`` standard deviations of the
    rollout; ``rise``: the mean of the ``level`` tokens before it, plus the floor. ``at="peak"`` keeps only the spikes
    that are local maxima of the divergence.
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
    """Return the anchor of the segment that contains each compacted token, -1 outside segments.

    A segment opens at a spike and runs until the next spike, the end of the assistant turn, ``max_length`` tokens, or
    the closing event: ``entropy_high``: the first token with entropy at or above the rollout's ``entropy_quantile``
    (the next decision point); ``entropy_low``: the first token below it; ``divergence``: the first token below
    ``floor``; ``window`` and ``turn``: no other event; ``none``: there are no segments.

    The result equals that of a left-to-right scan: the two running maxima are the last spike and the last closing
    event.
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
    """Return the credit signal of each token.

    Inside a segment it is the divergence at the anchor (``departure``) or the segment's ``mean``, outside segments the
    token's own divergence.
    """
    where = anchor.clamp_min(0)
    if value == "departure":
        inside = divergence.gather(-1, where)
    else:
        member = (anchor >= 0).to(divergence.dtype)
        total = torch.zeros_like(divergence).scatter_add(-1, where, divergence * member)
        count = torch.zeros_like(divergence).scatter_add(-1, where, member)
        inside = (total / count.clamp_min(1)).gather(-1, where)
    return torch.where(anchor >= 0, inside, divergence)


def segment_lengths(anchor: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
    """Return the number of tokens of the segment that contains each token; 1 outside segments."""
    member = (anchor >= 0).float()
    count = torch.zeros_like(member).scatter_add(-1, anchor.clamp_min(0), member)
    return torch.where(anchor >= 0, count.gather(-1, anchor.clamp_min(0)), 1)


def scale_signal(
    signal: Float[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    scale: Scale,
    *,
    advantages: Float[Tensor, "batch #seq"] | None = None,
    noise: Float[Tensor, "batch #seq"] | float = 0.0,
) -> Float[Tensor, "batch seq"]:
    """Scale the credit signal with statistics of the rollout's tokens of one sign of advantage (see `one_sign`).

    ``none``: the signal itself; ``zscore``: (x - mean) / standard deviation; ``saturate``: x / (x + c), where c is the
    75th percentile, but at least 1e-4 and at least the noise (for unsigned signals; result in [0, 1)).

    ``zscore`` and ``saturate`` remove the size of the signal, and would amplify pure rounding noise as much as a real
    difference between teacher and policy. They are therefore multiplied by `above_noise` of that size: the standard
    deviation, or the root mean square.

    Args:
        signal: of each token.
        mask: tokens that count.
        scale: see above.
        advantages: before credit; None: statistics over all tokens of the rollout.
        noise: of the signal, for all tokens or for each token.
    """
    if scale == "none":
        return signal
    noise = torch.as_tensor(noise, dtype=signal.dtype, device=signal.device).expand_as(signal)
    scaled = signal
    for part in one_sign(advantages, mask):
        mean = masked_mean(signal, part)
        floor = masked_mean(noise**2, part).sqrt()
        if scale == "saturate":
            size = masked_mean(signal**2, part).sqrt()
            low = floor.clamp_min(SATURATE_FLOOR)
            found = signal / (signal + torch.maximum(masked_quantile(signal, part, 0.75), low))
        else:
            size = masked_mean((signal - mean) ** 2, part).sqrt()
            found = (signal - mean) / (size + 1e-6)
        scaled = torch.where(part, found * above_noise(size, floor), scaled)
    return scaled


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
    """Return the weight of each token before mixing and normalization, in [1 - clip, 1 + clip]; 1 outside ``mask``.

    With c the signal (large = departure) and A the advantage before credit, of the rollout or of each token:
    ``sign_aware``: exp(-sign(A) kappa c); ``symmetric``: 1 + kappa (c - mean c), the mean over the rollout's tokens of
    the same sign of A, each weighted by the size of A; ``negatives_only``: exp(kappa c) where A < 0, else 1;
    ``reversed_on_correct``: exp(kappa c) for both signs. ``direction_gate`` (from CREST) raises weights below 1 to 1.
    """
    sign = advantages.sign()
    if sign_rule == "symmetric":
        weights = signal
        for part in one_sign(advantages, mask):
            mean = masked_mean(signal, part, size_shares(advantages, part))
            weights = torch.where(part, 1 + kappa * (signal - mean), weights)
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
    weights: Float[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    how: Normalise,
    advantages: Float[Tensor, "batch #seq"] | None = None,
) -> Float[Tensor, "batch seq"]:
    """Divide by the arithmetic or geometric mean weight of the rollout's tokens of one sign, weighted by their ``|A|``.

    With ``mean``, the positive and the negative advantages each keep their sum: credit moves between tokens, and the
    total does not change. If the mean is 0 (the weights underflowed), the sum cannot be restored, and the weights are
    1.

    Args:
        weights: of each token.
        mask: tokens that count; the others get 1.
        how: ``mean``, ``geometric``, or ``none``: return the weights unchanged.
        advantages: before credit; None: the mean is over all tokens of the rollout.
    """
    if how == "none":
        return weights
    normal = torch.ones_like(weights)
    for part in one_sign(advantages, mask):
        share = size_shares(advantages, part)
        mean = masked_mean(weights, part, share) if how == "mean" else masked_mean(weights.log(), part, share).exp()
        normal = torch.where(part & (mean > 0), weights / torch.where(mean > 0, mean, 1), normal)
    return normal
