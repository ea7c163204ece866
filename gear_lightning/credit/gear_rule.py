"""GEAR, its controls, and its special cases: without segments (token by token), and with fixed turns."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import gear
from ..batch import Credit
from ..checks import check_positive, check_range
from ..errors import UserError
from .base import CreditAssigner, Evidence, at_bound, mixing, spread_credit, teacher_of, top_of, turn_starts

SEGMENT_OPTIONS = ("anchor_rule", "anchor_level", "anchor_floor", "anchor_at", "segment_max", "segment_value")


@dataclass(frozen=True)
class GEAR(CreditAssigner):
    """Granularity-adaptive advantage reweighting (arXiv 2605.11853).

    Only the paper's abstract and summaries were available: every argument is a choice that these leave open, and every
    default is this project's own.

    All statistics that scale, center or divide are taken over the rollout's tokens whose advantages have one sign: if
    turns have advantages of both signs, credit moves only among positive and only among negative advantages.

    Args:
        divergence: divergence between policy and teacher, per token. ``k1``: log-ratio at the sampled token, signed;
            ``k3``: its non-negative form; ``reverse_kl`` KL(policy || teacher), ``forward_kl`` and ``jsd``: on the
            policy's ``divergence_top_k`` most likely tokens plus a tail bucket.
        divergence_top_k: number of tokens that the distribution divergences compare. Null: 100 for those.
        divergence_limit: nats; log-ratios are clamped to plus and minus this value. Null: 10 for k1 and k3.
        scale: scaling of the credit signal within a rollout: ``none``, ``zscore``, or ``saturate`` x / (x + 75th
            percentile). With ``zscore`` and ``saturate``, a signal no larger than the rounding noise of the run goes to
            0 (see `gear_lightning.gear.scale_signal`). Null: ``none`` for k1, ``saturate`` for the others.
        anchor_rule: threshold of an anchor: ``quantile`` of the rollout, ``absolute`` (the floor alone), ``zscore`` of
            the rollout, ``rise`` over the mean of the tokens before.
        anchor_level: the quantile (default 0.95), the z-score (2.0) or the number of tokens before (16), depending on
            ``anchor_rule``. Not for ``absolute``.
        anchor_floor: minimum divergence of an anchor, nats. Null: 0.5 for k1, 0.05 for the others.
        anchor_at: first token above the threshold (``onset``) or local maximum (``peak``).
        segment_end: event that closes a segment, besides the next anchor, the end of the turn and ``segment_max``:
            ``entropy_high`` (the next decision point), ``entropy_low``, ``divergence`` (back below the floor),
            ``window`` or ``turn`` (nothing else). ``none``: no segments, each token has its own signal.
        segment_max: maximum length of a segment, tokens.
        segment_value: divergence assigned to the tokens of a segment: that of its anchor (``departure``) or its
            ``mean``.
        entropy: signal that closes segments on entropy: the ``policy``'s entropy, the ``teacher``'s entropy, or the
            ``surprisal`` of the sampled token.
        entropy_quantile: quantile within the rollout; a token at or above it counts as a decision. Only if segments end
            on entropy.
        sign_rule: ``sign_aware`` (A): departures get more of a negative and less of a positive advantage;
            ``symmetric`` (B): more of both; ``negatives_only`` (C): more of a negative advantage only;
            ``reversed_on_correct`` (D): more of a negative advantage, and more of a positive one where they succeed.
        kappa: strength of the weighting, per nat (1/temperature).
        clip: weights stay within 1 - clip and 1 + clip before normalization.
        direction_gate: raise weights below 1 to 1 (from CREST). This happens before normalization, which then lowers
            all weights of a rollout by the same factor: with ``normalise=none`` no weight is below 1.
        mix: share of the weighting; the rest is uniform.
        mix_decay: optimizer steps over which ``mix`` decays linearly to 0. Null: constant.
        normalise: divide by the ``mean`` weight of the rollout's tokens of one sign, by their ``geometric`` mean, or
            not at all. Each token is weighted in the mean by the size of its advantage, so that ``mean`` preserves the
            sum of the positive and of the negative advantages.
        exclude_stop: set the divergence of stop tokens to 0.
        exclude_tail: set the divergence of this many last action tokens to 0 (the answer, where spikes repeat the
            reward).

    Raises:
        UserError: values out of range, an argument that would have no effect, or an unsigned divergence with the
            sign-aware rule (it would reduce the positive advantage of decisions that were right).
    """

    divergence: gear.Divergence = "k1"
    divergence_top_k: int | None = None
    divergence_limit: float | None = None
    scale: gear.Scale | None = None
    anchor_rule: gear.AnchorRule = "quantile"
    anchor_level: float | None = None
    anchor_floor: float | None = None
    anchor_at: Literal["onset", "peak"] = "onset"
    segment_end: gear.SegmentEnd = "entropy_high"
    segment_max: int = 128
    segment_value: Literal["departure", "mean"] = "departure"
    entropy: Literal["policy", "teacher", "surprisal"] = "policy"
    entropy_quantile: float = 0.8
    sign_rule: gear.SignRule = "sign_aware"
    kappa: float = 1.0
    clip: float = 0.9
    direction_gate: bool = False
    mix: float = 1.0
    mix_decay: int | None = None
    normalise: gear.Normalise = "mean"
    exclude_stop: bool = True
    exclude_tail: int = 0

    def __post_init__(self):
        if not self.signed and self.sign_rule == "sign_aware":
            raise UserError(
                f"divergence={self.divergence} has no sign and cannot be combined with sign_rule=sign_aware, which "
                "would reduce the advantage of right decisions; use sign_rule=symmetric, or divergence=k1"
            )
        if self.signed and self.scale == "saturate":
            raise UserError("scale=saturate needs a divergence that is never negative; k1 is signed")
        check_range(self, 0, 1, "clip", "mix", "entropy_quantile")
        check_range(self, 0, math.inf, "kappa", "anchor_floor", "exclude_tail")
        check_positive(self, "divergence_limit")
        check_range(self, 1, math.inf, "segment_max", "divergence_top_k", "mix_decay")
        sampled = self.divergence in ("k1", "k3")
        self._refuse(("divergence_top_k" if sampled else "divergence_limit",), f"with divergence={self.divergence}")
        if self.segment_end not in ("entropy_high", "entropy_low"):
            self._refuse(("entropy", "entropy_quantile"), f"with segment_end={self.segment_end}")
        if self.segment_end == "none":
            self._refuse(SEGMENT_OPTIONS, "without segments")
        if self.anchor_rule == "absolute":
            self._refuse(("anchor_level",), "with anchor_rule=absolute (the threshold is anchor_floor)")
        if self.anchor_rule == "quantile" and not 0 <= self.level <= 1:
            raise UserError(f"GEAR: anchor_level={self.anchor_level} is not a quantile; use a value from 0 to 1")
        if self.anchor_rule == "zscore" and not math.isfinite(self.level):
            raise UserError(f"GEAR: anchor_level={self.anchor_level} must be finite, for anchor_rule=zscore")
        if self.anchor_rule == "rise" and not (self.level >= 1 and float(self.level).is_integer()):
            raise UserError(
                f"GEAR: anchor_level={self.anchor_level} must be a whole number of tokens before, at least 1, for "
                "anchor_rule=rise"
            )
        if self.normalise == "geometric" and self.clip == 1:
            raise UserError("GEAR: with clip=1 weights can be 0 and have no geometric mean; use clip below 1")

    def _refuse(self, names: tuple[str, ...], why: str) -> None:
        """Raise if an option that does nothing differs from its default."""
        for name in names:
            if getattr(self, name) != getattr(type(self), name):
                raise UserError(f"{type(self).__name__}: {name} does nothing {why}; leave it out")

    @property
    def signed(self) -> bool:
        """Whether the divergence can be negative."""
        return self.divergence == "k1"

    @property
    def level(self) -> float:
        """``anchor_level``, or the default of ``anchor_rule``."""
        defaults = {"quantile": 0.95, "absolute": 0.0, "zscore": 2.0, "rise": 16.0}
        return defaults[self.anchor_rule] if self.anchor_level is None else self.anchor_level

    @property
    def floor(self) -> float:
        """``anchor_floor``, or the default of the divergence."""
        return (0.5 if self.signed else 0.05) if self.anchor_floor is None else self.anchor_floor

    @property
    def top_k(self) -> int:
        return 0 if self.divergence in ("k1", "k3") else self.divergence_top_k or 100

    @property
    def carried(self) -> Literal["departure", "mean"]:
        """``segment_value``, or the value that a subclass fixes."""
        return self.segment_value

    def measure(self, evidence: Evidence) -> Float[Tensor, "batch seq"]:
        """Return the divergence per token, in nats; excluded tokens have 0."""
        if self.top_k and evidence.divergence is not None:
            divergence = evidence.divergence
        elif self.top_k:
            divergence = gear.distribution_divergence(*top_of(evidence, self), self.divergence)
        else:
            teacher = teacher_of(evidence, self).logprobs
            divergence = gear.sampled_divergence(
                evidence.policy.logprobs,
                teacher,
                self.divergence,
                10.0 if self.divergence_limit is None else self.divergence_limit,
            )
        keep = evidence.action_mask
        if self.exclude_stop:
            keep = keep & ~evidence.stop_mask
        if self.exclude_tail:
            behind = evidence.action_mask.flip(-1).cumsum(-1).flip(-1)
            keep = keep & (behind > self.exclude_tail)
        return torch.where(keep, divergence, 0)

    def segments(self, evidence: Evidence, divergence: Float[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
        """Return the anchor index of each token's segment, -1 outside segments (see `gear.find_segments`)."""
        if self.entropy == "policy":
            entropy = evidence.policy.entropy
        elif self.entropy == "teacher":
            entropy = teacher_of(evidence, self).entropy
        else:
            entropy = -evidence.policy.logprobs
        columns, real = gear.compact(evidence.action_mask)
        d, h, k = (x.gather(-1, columns) for x in (divergence, entropy, evidence.turn_ids))
        spikes = gear.find_spikes(d, real, rule=self.anchor_rule, level=self.level, floor=self.floor, at=self.anchor_at)
        place = gear.find_segments(
            spikes,
            d,
            h,
            k,
            real,
            end=self.segment_end,
            entropy_quantile=self.entropy_quantile,
            floor=self.floor,
            max_length=self.segment_max,
        )
        anchor = torch.where(place >= 0, columns.gather(-1, place.clamp_min(0)), -1)
        return torch.full_like(evidence.turn_ids, -1).scatter(-1, columns, anchor)

    def rounding(self, evidence: Evidence, anchor: Tensor) -> Float[Tensor, "batch seq"]:
        """Return the part of each token's credit signal that rounding alone produces, in nats."""
        noise = evidence.noise.divergence if self.top_k else evidence.noise.log_ratio
        if self.divergence == "k3":
            noise = math.expm1(noise) - noise  # k3 of a log-ratio of -noise
        each = torch.full_like(evidence.policy.logprobs, noise)
        if self.signed and self.carried == "mean":  # errors of both signs average out
            each = each / gear.segment_lengths(anchor).sqrt()
        return each

    def __call__(self, evidence: Evidence) -> Credit:
        mask, base = evidence.action_mask, evidence.base_advantages
        divergence = self.measure(evidence)
        anchor = self.segments(evidence, divergence)
        weights = gear.signal_weights(
            gear.scale_signal(
                gear.segment_signal(divergence, anchor, self.carried),
                mask,
                self.scale or ("none" if self.signed else "saturate"),
                advantages=base,
                noise=self.rounding(evidence, anchor),
            ),
            base,
            mask,
            sign_rule=self.sign_rule,
            kappa=self.kappa,
            clip=self.clip,
            direction_gate=self.direction_gate,
        )
        clipped = at_bound(weights, self.clip)
        weights = 1 + mixing(self.mix, self.mix_decay, evidence.policy_version) * (weights - 1)
        weights = gear.normalise_weights(weights, mask, self.normalise, base)
        return spread_credit(evidence, weights, divergence, anchor, clipped)


@dataclass(frozen=True)
class TokenOnly(GEAR):
    """GEAR without segments: each token keeps its own divergence.

    Accepts GEAR's options except those of anchors and segments.
    """

    segment_end: gear.SegmentEnd = "none"

    def __post_init__(self):
        if self.segment_end != "none":
            raise UserError("TokenOnly has no segments; use GEAR with segment_end")
        super().__post_init__()


@dataclass(frozen=True)
class Turn(GEAR):
    """Fixed turns instead of adaptive segments: every token of a turn carries the turn's mean divergence.

    Turns are compared with those whose advantages have the same sign: a turn without such a counterpart keeps its
    advantage.

    Accepts GEAR's options except those of anchors, entropy and segments.
    """

    fixed_segments = True

    @property
    def compares_turns(self) -> bool:
        return self.normalise != "none"

    def __post_init__(self):
        super().__post_init__()
        self._refuse((*SEGMENT_OPTIONS, "segment_end", "entropy", "entropy_quantile"), "with fixed turns")

    def segments(self, evidence: Evidence, divergence: Tensor) -> Int[Tensor, "batch seq"]:
        return turn_starts(evidence.action_mask, evidence.turn_ids)

    @property
    def carried(self) -> Literal["departure", "mean"]:
        return "mean"


@dataclass(frozen=True)
class Placebo(GEAR):
    """Control for GEAR: permutes its weights among the tokens of a rollout whose advantages have the same sign.

    The control keeps the values of the weights and removes their positions. If those advantages differ in size, the
    permuted weights are divided by their mean again (see ``normalise``).

    Accepts GEAR's options.

    Args:
        seed: seed of the permutation, combined with the rollout's policy version and the positions of its tokens.
    """

    seed: int = 0

    def __call__(self, evidence: Evidence) -> Credit:
        credit, base, mask = super().__call__(evidence), evidence.base_advantages, evidence.action_mask
        weights = credit.weights.clone()
        for part in gear.one_sign(base, mask):
            for row in range(weights.shape[0]):
                where = part[row].nonzero().squeeze(-1)
                # the permutation's seed comes from the rollout, so that neither micro-batching nor resuming changes it
                turns = evidence.turn_ids[row, where].cpu()
                key = hash((self.seed, int(evidence.policy_version[row]), tuple(turns.tolist()), *where.tolist()))
                generator = torch.Generator().manual_seed(key % (2**63))
                order = torch.randperm(len(where), generator=generator).to(where.device)
                weights[row, where] = weights[row, where[order]]
            uneven = (part & (gear.size_shares(base, part) != 1)).any(-1, keepdim=True)
            again = gear.normalise_weights(weights, part, self.normalise, base)
            weights = torch.where(part & uneven, again, weights)
        return spread_credit(evidence, weights, credit.divergence, torch.full_like(credit.anchor, -1))
