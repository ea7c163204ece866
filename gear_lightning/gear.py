"""GEAR's maths: divergence -> anchors -> segments -> weights, as pure functions of tensors.

Index convention: entry t of every ``[batch, seq]`` tensor is about token t. ``mask`` marks tokens the policy sampled;
prompt and tool output in between are invisible to every statistic, length and neighbour here. All statistics are those
of one rollout, so that no split into micro-batches can change a weight. What divides or centers weights is, further,
of the tokens of a rollout whose advantages have one sign: where turns have advantages of both signs, praise and blame
each keep their sum. ``noise`` is a constant: the 99th percentile of what rounding alone makes of a signal.

Source: GEAR, arXiv 2605.11853. We had only its abstract and summaries; the rules below that they leave open are
reconstructions, and each is an argument. `gear_lightning.credit.GEAR` lists them with their defaults.
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


def masked_mean(
    x: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"], share: Float[Tensor, "batch seq"] | None = None
) -> Float[Tensor, "batch 1"]:
    """Mean over the masked-in entries of each row; 0 for an empty row, and exactly x where all entries equal x.

    Args:
        x: values.
        mask: entries that count.
        share: how much each counts, not negative; None: alike.
    """
    # from the least entry on: a plain sum is rounded, and (x - mean) / std of equal values would then be noise
    low = torch.where(mask, x, torch.inf).amin(-1, keepdim=True)
    low = torch.where(mask.any(-1, keepdim=True), low, 0)
    share = torch.ones_like(x) if share is None else share
    total = torch.where(mask, (x - low) * share, 0).sum(-1, keepdim=True)
    count = torch.where(mask, share, 0).sum(-1, keepdim=True)
    return low + total / torch.where(count > 0, count, 1)


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


def one_sign(
    advantages: Float[Tensor, "batch #seq"] | None, mask: Bool[Tensor, "batch seq"]
) -> list[Bool[Tensor, "batch seq"]]:
    """Parts of ``mask`` whose advantages have the same sign (praise, blame, 0), empty ones left out.

    Statistics over one part at a time move credit within praise and within blame, never from one to the other. None:
    all of ``mask`` is one part. A row of one sign has one part, equal to its row of ``mask``.
    """
    if advantages is None:
        return [mask]
    sign = advantages.sign()
    parts = [mask & (sign == s) for s in (1, -1, 0)]
    return [part for part in parts if part.any()]


def size_shares(
    advantages: Float[Tensor, "batch #seq"] | None, part: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq"] | None:
    """How much each token of one of `one_sign`'s parts counts in a mean that is to keep its credit: |A| by the largest
    of the row, and so exactly 1 where all are equal (0, too)."""
    if advantages is None:
        return None
    size = torch.where(part, advantages.abs(), 0)
    largest = size.amax(-1, keepdim=True)
    return torch.where(largest > 0, size / torch.where(largest > 0, largest, 1), 1)


def above_noise(
    size: Float[Tensor, "batch #seq"], noise: Float[Tensor, "batch #seq"] | float
) -> Float[Tensor, "batch #seq"]:
    """Share of a signal to keep, by how its size compares with rounding noise: 1 / (1 + (noise / size)^4).

    1/2 where the size is that of the noise (its 99th percentile), below 0.01 from a third of it down, within 1e-3 of 1
    from 5.7 times it up, and exactly 1 where there is no noise. The form is ours.
    """
    noise = torch.as_tensor(noise, dtype=size.dtype, device=size.device)
    return torch.where(noise > 0, 1 / (1 + (noise / size) ** 4), 1)


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


def segment_lengths(anchor: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
    """Tokens of the segment that each token is in; 1 outside segments."""
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
    """Scale of the credit signal, by the rollout's tokens of one sign of advantage (see `one_sign`).

    ``none``: the signal; ``zscore``: (x - mean) / standard deviation; ``saturate``: x / (x + c) with c the 75th
    percentile, at least 1e-4 and the noise (for unsigned signals; result in [0, 1)).

    Both take out the signal's size, and would make as much of rounding as of a teacher that knows something. So they
    are multiplied by `above_noise` of that size: the standard deviation, or the root of the mean square.

    Args:
        signal: of each token.
        mask: tokens that count.
        scale: see above.
        advantages: before credit; None: the statistics are of all tokens of the rollout.
        noise: of the signal, for all tokens or each.
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
    """Weight of each token before mixing and normalisation, in [1 - clip, 1 + clip]; 1 outside ``mask``.

    With c the signal (large = departure) and A the advantage before credit, of the rollout or of each token:
    ``sign_aware``: exp(-sign(A) kappa c); ``symmetric``: 1 + kappa (c - mean c), the mean over the rollout's tokens of
    the same sign of A, each counted by its |A|; ``negatives_only``: exp(kappa c) where A < 0, else 1;
    ``reversed_on_correct``: exp(kappa c) for both signs. ``direction_gate`` (from CREST) puts the weight to 1 where it
    would be lower.
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
    """Divide by the arithmetic or geometric mean weight of the rollout's tokens of one sign of advantage, each counted
    by its |A|: with ``mean``, praise and blame each keep their sum, so that credit is moved and not made.

    Where that mean is 0 (the weights underflowed) it cannot be restored: the weights are 1.

    Args:
        weights: of each token.
        mask: tokens that count; the others get 1.
        how: ``mean``, ``geometric``, or ``none``: the weights as they are.
        advantages: before credit; None: the mean is of all tokens of the rollout.
    """
    if how == "none":
        return weights
    normal = torch.ones_like(weights)
    for part in one_sign(advantages, mask):
        share = size_shares(advantages, part)
        mean = masked_mean(weights, part, share) if how == "mean" else masked_mean(weights.log(), part, share).exp()
        normal = torch.where(part & (mean > 0), weights / torch.where(mean > 0, mean, 1), normal)
    return normal
