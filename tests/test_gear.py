"""GEAR's pure functions: hand-computed values, reference implementations, invariants, degenerate input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from gear_lightning import gear

EVERY = torch.ones(1, 5, dtype=torch.bool)


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float32)


def bits(text: str) -> torch.Tensor:
    return torch.tensor([[c == "x" for c in text]])


def random_masked(seed: int, rows: int = 40, width: int = 17) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values with ties and masks with empty rows; masked-out entries contain infinities and NaN."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-40, 40, (rows, width), generator=g) / 8
    mask = torch.rand(rows, width, generator=g) < torch.rand(rows, 1, generator=g)
    mask[0] = False
    junk = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.randint(0, 3, (rows, width), generator=g)]
    return torch.where(mask, x, junk), mask


# divergences ----------------------------------------------------------------------------------------------------------


def test_golden_k1():
    # log p_S - log p_T: -1 + 3 = 2; -3 + 1 = -2; 0 + 12 = 12 -> 10; -12 -> -10
    d = gear.sampled_divergence(row(-1, -3, 0, -12), row(-3, -1, -12, 0), "k1")
    assert d.tolist() == [[2, -2, 10, -10]]


def test_golden_k3():
    # k1 = log 2: exp(-log 2) - 1 + log 2 = 1/2 - 1 + 0.693147 = 0.193147; k1 = -log 2: 2 - 1 - 0.693147 = 0.306853
    d = gear.sampled_divergence(row(0, -math.log(2)), row(-math.log(2), 0), "k3")
    assert_close(d, row(0.193147, 0.306853), atol=1e-6, rtol=0)
    # clamped to 1 nat first: exp(-1) - 1 + 1 = 0.367879; exp(1) - 1 - 1 = 0.718282
    d = gear.sampled_divergence(row(0, -9), row(-9, 0), "k3", limit=1.0)
    assert_close(d, row(0.367879, 0.718282), atol=1e-6, rtol=0)


def test_k3_is_never_negative():
    small = torch.logspace(-12, 1, 4000)[None]
    for k1 in (small, -small):
        d = gear.sampled_divergence(k1, torch.zeros_like(k1), "k3")
        assert (d >= 0).all()
        oracle = torch.expm1(-k1.double()) + k1.double()
        assert_close(d.double(), oracle, atol=1e-7, rtol=1e-5)


def test_golden_distribution_divergences():
    # S = (1/2, tail 1/2), T = (1/4, tail 3/4)
    s, t = torch.tensor([[[0.5]]]).log(), torch.tensor([[[0.25]]]).log()
    # KL(S||T) = 1/2 log 2 + 1/2 log(2/3) = 0.346574 - 0.202733 = 0.143841
    assert_close(gear.distribution_divergence(s, t, "reverse_kl"), row(0.143841), atol=1e-6, rtol=0)
    # KL(T||S) = 1/4 log(1/2) + 3/4 log(3/2) = -0.173287 + 0.304099 = 0.130812
    assert_close(gear.distribution_divergence(s, t, "forward_kl"), row(0.130812), atol=1e-6, rtol=0)
    # M = (3/8, 5/8); 1/2 [1/2 log(4/3) + 1/2 log(4/5)] + 1/2 [1/4 log(2/3) + 3/4 log(6/5)]
    # = 1/2 [0.143841 - 0.111572] + 1/2 [-0.101366 + 0.136741] = 0.016135 + 0.017688 = 0.033822
    assert_close(gear.distribution_divergence(s, t, "jsd"), row(0.033822), atol=1e-6, rtol=0)


def test_golden_tail():
    # 1 - 0.5 - 0.2 = 0.3; an empty tail: 1e-10
    tail = gear.with_tail(torch.tensor([[[0.5, 0.2], [0.5, 0.5]]]).log())
    assert_close(tail.exp()[0, 0], torch.tensor([0.5, 0.2, 0.3]))
    assert tail[0, 1, 2].item() == pytest.approx(math.log(1e-10))


@pytest.mark.parametrize("vocabulary", [2, 5, 50])
def test_full_vocabulary_divergences_equal_torch_distributions(vocabulary):
    g = torch.Generator().manual_seed(vocabulary)
    s, t = (torch.randn(20, 30, vocabulary, generator=g).mul(2).log_softmax(-1) for _ in range(2))
    p, q = (torch.distributions.Categorical(logits=x.double()) for x in (s, t))
    m = torch.distributions.Categorical(probs=(p.probs + q.probs) / 2)
    kl = torch.distributions.kl_divergence
    for kind, oracle in (
        ("reverse_kl", kl(p, q)),
        ("forward_kl", kl(q, p)),
        ("jsd", (kl(p, m) + kl(q, m)) / 2),
    ):
        d = gear.distribution_divergence(s, t, kind)
        assert_close(d.double(), oracle, atol=3e-6, rtol=1e-5)
        assert (d >= 0).all()
    assert (gear.distribution_divergence(s, t, "jsd") <= math.log(2) + 1e-6).all()


def test_divergence_of_equal_models_is_exactly_zero():
    s = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    for top in (s, s[..., :5]):
        for kind in ("reverse_kl", "forward_kl", "jsd"):
            assert (gear.distribution_divergence(top, top, kind) == 0).all()
    for kind in ("k1", "k3"):
        assert (gear.sampled_divergence(s[..., 0], s[..., 0], kind) == 0).all()


def test_merging_the_tail_never_increases_a_divergence():
    # data processing inequality: coarser distributions are not easier to distinguish
    g = torch.Generator().manual_seed(1)
    s, t = (torch.randn(8, 9, 12, generator=g).double().log_softmax(-1) for _ in range(2))
    for kind in ("reverse_kl", "forward_kl", "jsd"):
        full = gear.distribution_divergence(s, t, kind)
        for k in (1, 4, 11):
            assert (gear.distribution_divergence(s[..., :k], t[..., :k], kind) <= full + 1e-8).all()


def test_wrong_kinds_of_divergence_are_rejected():
    with pytest.raises(ValueError, match="jsd is not a divergence of sampled tokens"):
        gear.sampled_divergence(row(0), row(0), "jsd")
    with pytest.raises(ValueError, match="k1 is not a divergence of distributions"):
        gear.distribution_divergence(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), "k1")


# statistics -----------------------------------------------------------------------------------------------------------


def test_golden_mean_and_quantile():
    x, mask = row(4, -100, 1, 3, 2), bits("x.xxx")
    assert gear.masked_mean(x, mask).item() == 2.5  # (4 + 1 + 3 + 2) / 4
    assert gear.masked_quantile(x, mask, 0.5).item() == 2.5  # of 1 2 3 4, place 1.5
    assert gear.masked_quantile(x, mask, 0.75).item() == 3.25  # place 2.25
    assert gear.masked_quantile(x, mask, 0.0).item() == 1
    assert gear.masked_quantile(x, mask, 1.0).item() == 4


@pytest.mark.parametrize("q", [0.0, 0.1, 0.25, 0.5, 0.75, 0.8, 0.95, 1.0])
def test_statistics_equal_torch_and_numpy_row_by_row(q):
    x, mask = random_masked(seed=int(q * 100), rows=300)
    got, average = gear.masked_quantile(x, mask, q), gear.masked_mean(x, mask)
    assert got.shape == average.shape == (300, 1)
    for values, keep, value, mu in zip(x, mask, got, average, strict=True):
        if keep.any():
            assert value.item() == torch.quantile(values[keep], q).item()
            assert value.item() == pytest.approx(np.quantile(values[keep].double().numpy(), q), abs=2e-5)
            assert mu.item() == pytest.approx(values[keep].double().mean().item(), abs=1e-6)
        else:
            assert value.item() == mu.item() == 0


@given(st.floats(-1e4, 1e4, width=32), st.integers(1, 60))
def test_statistics_of_equal_values_are_exact(value, n):
    x, mask = torch.full((1, n), value), torch.ones(1, n, dtype=torch.bool)
    assert gear.masked_mean(x, mask).item() == x[0, 0].item()
    assert gear.masked_quantile(x, mask, 0.3).item() == x[0, 0].item()
    assert (gear.scale_signal(x, mask, "zscore") == 0).all()


def test_golden_compact():
    columns, real = gear.compact(torch.cat([bits(".x.xx"), bits("x...."), bits(".....")]))
    assert columns[0].tolist() == [1, 3, 4]
    assert real.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    assert columns[1, 0] == 0
    assert all(len(set(c)) == 3 for c in columns.tolist())  # no column twice, so that a scatter is unambiguous
    columns, real = gear.compact(bits("....."))
    assert columns.shape == (1, 1)
    assert not real.any()


# anchors and segments -------------------------------------------------------------------------------------------------


def spikes(d: torch.Tensor, mask: torch.Tensor | None = None, **options) -> str:
    mask = torch.ones_like(d, dtype=torch.bool) if mask is None else mask
    return "".join(".x"[int(s)] for s in gear.find_spikes(d, mask, **options)[0])


def test_golden_anchor_quantile():
    d = row(0, 1, 2, 3, 4)
    assert spikes(d, rule="quantile", level=0.75) == "...xx"  # threshold 3, reached by 3 and 4
    assert spikes(d, rule="quantile", level=0.75, floor=3.5) == "....x"  # the floor is higher
    assert spikes(d, rule="quantile", level=0.5, floor=4.0) == "....x"
    assert spikes(-d, rule="quantile", level=0.5) == "....."  # all at or below 0, floor 0.5


def test_golden_anchor_absolute():
    assert spikes(row(0.5, 0.49, 1, -3), rule="absolute", floor=0.5) == "x.x."


def test_golden_anchor_zscore():
    d = row(0, 0, 0, 0, 4)  # mean 0.8, variance (4 * 0.64 + 10.24) / 5 = 2.56, std 1.6 (sample std: 1.789)
    assert spikes(d, rule="zscore", level=1.9) == "....x"  # 0.8 + 3.04 = 3.84 (sample std: 4.199, none)
    assert spikes(d, rule="zscore", level=2.1) == "....."  # 0.8 + 3.36 = 4.16
    assert spikes(d, rule="zscore", level=-1.0) == "....x"  # threshold -0.8, so the floor of 0.5 decides


def test_golden_anchor_rise():
    d = row(1, 2, 3, 3.9, 9)  # means of the 2 before: 0 (none), 1, 1.5, 2.5, 3.45
    assert spikes(d, rule="rise", level=2.0, floor=1.5) == "..x.x"  # to reach: 1.5 2.5 3 4 4.95
    assert spikes(d, rule="rise", level=2.0, floor=1.25) == "..xxx"  # 1.25 2.25 2.75 3.75 4.7
    # never below the floor: the mean before is -2, and -1 is still not a departure
    assert spikes(row(-2, -2, -1, 0.4, 0.5), rule="rise", level=2.0, floor=0.5) == "....x"


def test_golden_anchor_peak():
    d = row(3, 4, 4, 2, 5)
    assert spikes(d, rule="absolute", floor=3.0) == "xxx.x"
    assert spikes(d, rule="absolute", floor=3.0, at="peak") == ".x..x"  # the first of a plateau; the ends count
    # the 9 is padding: the 3 before it is the last token, and therefore a peak
    assert spikes(row(3, 4, 2, 3, 9), bits("xxxx."), rule="absolute", floor=2.0, at="peak") == ".x.x."


def segments(spike: str, h: list[float], turns: list[int] | None = None, d: list[float] | None = None, **options):
    n = len(spike)
    return gear.find_segments(
        bits(spike), row(*(d or [0] * n)), row(*h), torch.tensor([turns or [0] * n]), bits("x" * n), **options
    )[0].tolist()


def test_golden_segments_by_entropy():
    # quantile 0.8 of 0 0 1 1 2 2: place 4.0 -> 2; of the 6 tokens the last and the third are decisions
    h = [0, 1, 2, 0, 1, 2]
    assert segments("x.....", h, end="entropy_high") == [0, 0, -1, -1, -1, -1]
    assert segments("xxx...", h, end="entropy_high") == [0, 1, 2, 2, 2, -1]  # an anchor opens, at any entropy
    # low: closes at the first token below the quantile
    assert segments("x.....", [0, 2, 2, 1, 2, 2], end="entropy_low") == [0, 0, 0, -1, -1, -1]
    assert segments("x.....", h, end="entropy_high", entropy_quantile=0.4) == [0, -1, -1, -1, -1, -1]  # quantile 1


def test_golden_segments_by_other_events():
    h = [9.0] * 6
    assert segments("x...x.", h, end="turn") == [0, 0, 0, 0, 4, 4]
    assert segments(".x..x.", h, turns=[0, 0, 0, 1, 1, 2], end="turn") == [-1, 1, 1, -1, 4, -1]
    assert segments("x...x.", h, end="window", max_length=2) == [0, 0, -1, -1, 4, 4]
    assert segments("x.....", h, d=[3, 0.5, 0.4, 3, 3, 3], end="divergence") == [0, 0, -1, -1, -1, -1]
    assert segments("x.....", h, end="none") == [-1] * 6


def test_segments_ignore_padding():
    d, h = row(1, 1, 1, 9), row(0, 0, 0, 9)
    place = gear.find_segments(bits("x..x"), d, h, torch.tensor([[0, 0, 0, -1]]), bits("xxx."), end="turn")
    assert place.tolist() == [[0, 0, 0, -1]]


# weights --------------------------------------------------------------------------------------------------------------


def test_golden_scale():
    x = row(0, 1, 3, 4, 4)
    assert_close(gear.scale_signal(x, EVERY, "saturate"), row(0, 1 / 5, 3 / 7, 0.5, 0.5))  # 75th percentile 4
    assert_close(gear.scale_signal(row(0, 0, 0, 0, 1e-4), EVERY, "saturate"), row(0, 0, 0, 0, 0.5))  # floor 1e-4
    # mean 2, variance (4 + 1 + 1 + 4) / 4 = 2.5, std 1.581139
    got = gear.scale_signal(row(0, 1, 9, 3, 4), bits("xx.xx"), "zscore")[0, [0, 1, 3, 4]]
    assert_close(got, torch.tensor([-2, -1, 1, 2]) / 1.581139, atol=1e-5, rtol=0)
    assert gear.scale_signal(x, EVERY, "none") is x


@pytest.mark.parametrize(
    ("rule", "advantage", "expected"),
    [
        # signal log 2, -log 2, log 8; clip 0.9 -> [0.1, 1.9]
        ("sign_aware", 2.0, [0.5, 1.9, 0.125]),  # 1/2, 2 -> 1.9, 1/8
        ("sign_aware", -2.0, [1.9, 0.5, 1.9]),
        ("sign_aware", 0.0, [1, 1, 1]),
        ("negatives_only", 2.0, [1, 1, 1]),
        ("negatives_only", -2.0, [1.9, 0.5, 1.9]),
        ("reversed_on_correct", 2.0, [1.9, 0.5, 1.9]),
        ("reversed_on_correct", -2.0, [1.9, 0.5, 1.9]),
        # mean log 2: 1 + 0, 1 - 2 log 2 -> 0.1, 1 + 2 log 2 -> 1.9
        ("symmetric", 2.0, [1, 0.1, 1.9]),
        ("symmetric", -2.0, [1, 0.1, 1.9]),
    ],
)
def test_golden_sign_rules(rule, advantage, expected):
    c = row(math.log(2), -math.log(2), 7.0, math.log(8))
    weights = gear.signal_weights(c, torch.tensor([[advantage]]), bits("xx.x"), sign_rule=rule)
    assert_close(weights, row(expected[0], expected[1], 1, expected[2]))
    gated = gear.signal_weights(c, torch.tensor([[advantage]]), bits("xx.x"), sign_rule=rule, direction_gate=True)
    assert_close(gated, row(max(expected[0], 1), max(expected[1], 1), 1, max(expected[2], 1)))


def test_golden_kappa_and_clip():
    c, plus = row(0.1, -0.1), torch.tensor([[1.0]])
    weights = gear.signal_weights(c, plus, bits("xx"), kappa=2.0, clip=0.2)
    assert_close(weights, row(0.818731, 1.2), atol=1e-6, rtol=0)  # exp(-0.2); exp(0.2) = 1.2214 -> 1.2
    weights = gear.signal_weights(c, plus, bits("xx"), kappa=2.0, sign_rule="symmetric")
    assert_close(weights, row(1.2, 0.8))  # 1 +- 2 * 0.1
    assert (gear.signal_weights(c, plus, bits("xx"), clip=0.0) == 1).all()


def test_golden_normalize():
    w, mask = row(0.5, 2, 1, 1), bits("xx.x")
    assert_close(gear.normalise_weights(w, mask, "mean"), row(3 / 7, 12 / 7, 1, 6 / 7))  # mean 3.5 / 3
    assert_close(gear.normalise_weights(w, mask, "geometric"), w)  # 0.5 * 2 * 1 = 1
    w = row(1, 4, 9, 2)  # 8^(1/3) = 2
    assert_close(gear.normalise_weights(w, mask, "geometric"), row(0.5, 2, 1, 1))
    assert gear.normalise_weights(w, mask, "none") is w


def test_golden_normalize_by_sign():
    # 1 and 3 with A = 2, 2: mean 2; 2, 1, 1 with A = -1, -2, -1: (2 + 2 + 1) / 4 = 1.25; and one with A = 0
    w, mask = row(1, 3, 9, 2, 1, 1, 5), bits("xx.xxxx")
    a = row(2, 2, 2, -1, -2, -1, 0)
    normal = gear.normalise_weights(w, mask, "mean", a)
    assert_close(normal, row(0.5, 1.5, 1, 1.6, 0.8, 0.8, 1))
    # sums 1 + 3 = 4 and -1.6 - 1.6 - 0.8 = -4: unchanged
    assert_close((normal * a)[mask].sum(), torch.tensor(0.0), atol=1e-6, rtol=0)
    # geometric: sqrt(3), and (2 * 1 * 1 * 1) ^ (1 / 4)
    expected = row(1 / 3**0.5, 3**0.5, 1, 2 / 2**0.25, 2**-0.25, 2**-0.25, 1)
    assert_close(gear.normalise_weights(w, mask, "geometric", a), expected)


def test_golden_scales_by_sign():
    x, a = row(0, 1, 3, 4, 4, 10, 30), row(1, 1, 1, 1, 1, -1, -1)
    every = bits("xxxxxxx")
    # the 75th percentile is 4 for the five positive ones, and 25 for the two negative ones
    got = gear.scale_signal(x, every, "saturate", advantages=a)
    assert_close(got, row(0, 1 / 5, 3 / 7, 0.5, 0.5, 10 / 35, 30 / 55))
    # z-scores: mean 2.4, variance (5.76 + 1.96 + 0.36 + 2.56 + 2.56) / 5 = 2.64; and -1, 1
    got = gear.scale_signal(x, every, "zscore", advantages=a)
    assert_close(got, row(*((v - 2.4) / 2.64**0.5 for v in (0, 1, 3, 4, 4)), -1, 1), atol=1e-5, rtol=0)
    # symmetric: minus the mean over the same sign, each weighted by |A|: (2 * 1 + 1 * 4) / 3 = 2
    weights = gear.signal_weights(row(1, 4, 7), row(2, 1, -1), bits("xxx"), sign_rule="symmetric", kappa=0.1)
    assert_close(weights, row(0.9, 1.2, 1))


def test_golden_above_noise():
    size = row(0, 1, 2, 4, 40)
    assert_close(gear.above_noise(size, 2.0), row(0, 1 / 17, 0.5, 16 / 17, 1 - 1 / 160001))
    assert gear.above_noise(size, 0.0).tolist() == [[1, 1, 1, 1, 1]]
    assert gear.above_noise(row(130), 2.0).item() == 1.0


def test_golden_scales_within_the_noise():
    # mean 2, deviation sqrt(2.5) = 1.581139, the size: as large as the noise, so half remains; c = max(P75 = 3.25, 4)
    x = row(0, 1, 3, 4)
    got = gear.scale_signal(x, bits("xxxx"), "zscore", noise=2.5**0.5)
    assert_close(got, row(-2, -1, 1, 2) / 2.5**0.5 / 2, atol=1e-5, rtol=0)
    # root mean square sqrt(26 / 4) = 2.549510; noise 4: kept (26/4)^2 / ((26/4)^2 + 4^4) = 42.25 / 298.25
    got = gear.scale_signal(x, bits("xxxx"), "saturate", noise=4.0)
    assert_close(got, row(0, 1 / 5, 3 / 7, 0.5) * 42.25 / 298.25)
    # noise of each token: the root of the mean square of 0, 0, 3, 4 is 2.5
    each = gear.scale_signal(x, bits("xxxx"), "zscore", noise=row(0, 0, 3, 4))
    assert_close(each, gear.scale_signal(x, bits("xxxx"), "zscore", noise=2.5))


@pytest.mark.parametrize("value", [1.0, -0.7, 0.0])
def test_statistics_by_sign_are_bitwise_unchanged_for_one_sign(value):
    """Reference: the statistics over all tokens of the rollout."""
    x, mask = random_masked(seed=5, rows=300)
    x, advantages = x.abs(), torch.full((300, 1), value)
    for how in ("mean", "geometric"):
        by_sign = gear.normalise_weights(x, mask, how, advantages)
        assert torch.equal(by_sign, gear.normalise_weights(x, mask, how)), how
        assert torch.equal(by_sign, gear.normalise_weights(x, mask, how, advantages.expand(x.shape)))
    mean = gear.masked_mean(x, mask)
    plain = {
        "none": x,
        "saturate": x / (x + gear.masked_quantile(x, mask, 0.75).clamp_min(1e-4)),
        "zscore": (x - mean) / (gear.masked_mean((x - mean) ** 2, mask).sqrt() + 1e-6),
    }
    for scale, reference in plain.items():
        found = gear.scale_signal(x, mask, scale, advantages=advantages)
        assert torch.equal(found[mask], reference[mask]), scale
    weights = gear.signal_weights(x, advantages, mask, sign_rule="symmetric")
    assert torch.equal(weights[mask], (1 + (x - mean)).clamp(0.1, 1.9)[mask])


@settings(deadline=None)
@given(
    st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=30),
    st.sampled_from(["sign_aware", "symmetric", "negatives_only", "reversed_on_correct"]),
    st.sampled_from([-1.0, 1.0]),
    st.floats(0, 1),
    st.floats(0, 50),
)
def test_weights_stay_in_their_range_and_have_a_mean_of_one(signal, rule, advantage, clip, kappa):
    c = torch.tensor([signal])
    mask = torch.ones_like(c, dtype=torch.bool)
    w = gear.signal_weights(c, torch.tensor([[advantage]]), mask, sign_rule=rule, clip=clip, kappa=kappa)
    assert (w >= 1 - clip - 1e-6).all()
    assert (w <= 1 + clip + 1e-6).all()
    normal = gear.normalise_weights(w, mask, "mean")
    assert normal.isfinite().all()
    assert (normal >= 0).all()
    assert normal.double().mean().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("how", ["mean", "geometric", "none"])
def test_degenerate_weights_are_finite(how):
    mask = torch.cat([bits("xxxx"), bits("xxxx"), bits("...."), bits("x...")])
    w = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 3], [1, 1, 1, 1], [0.25, 1, 1, 1]])
    got = gear.normalise_weights(w, mask, how)
    assert got.isfinite().all()
    assert (got[2] == 1).all()
    if how != "none":
        assert (got[0] == 1).all()  # all underflowed: no weight can be redistributed
        assert got[3, 0] == 1


def test_huge_signals_give_finite_weights():
    c = row(1e30, -1e30, 0, 3e38, -3e38)
    for rule in ("sign_aware", "negatives_only", "reversed_on_correct"):
        for advantage in (-1.0, 0.0, 1.0):
            w = gear.signal_weights(c, torch.tensor([[advantage]]), EVERY, sign_rule=rule)
            assert w.isfinite().all()
