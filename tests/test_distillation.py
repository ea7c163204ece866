"""Distillation losses: hand-computed values, a reference loop, gradients, denominators, and training runs."""

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from every_rule import Sharp, Talk, TalkTasks, random_rows, untrained, watched
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import AnyCall, data, generation, module, trainer
from torch import Tensor
from torch.testing import assert_close

from gear_lightning.batch import RolloutBatch, TokenStats, collate
from gear_lightning.callbacks.health import Health
from gear_lightning.credit import GEAR, SCGRPO, Uniform
from gear_lightning.distillation import OPSD, SDAR, SDPG, SDPO, Distillation, gated_gap, skew_divergence
from gear_lightning.environments.lookup_chain import LookupChainTasks
from gear_lightning.errors import UserError
from gear_lightning.learning.token_stats import token_stats
from gear_lightning.loss import ClippedSurrogate
from gear_lightning.module import GearModule
from gear_lightning.teacher import Teacher, TeacherOptions

TEMPLATE = " <ref> {reference}"
FROZEN = TeacherOptions("frozen", template=TEMPLATE)
KINDS: list[Distillation] = [
    OPSD(),
    OPSD(beta=0.0),
    OPSD(beta=1.0),
    OPSD(coef=0.3, beta=0.2, top_k_tokens=3, token_clip=0.5),
    SDPO(),
    SDPO(coef=2.0, alpha=0.9, top_k_tokens=4, is_clip=1.2),
    SDPG(),
    SDPG(coef=0.5, top_k_tokens=2, token_clip=None, positives_only=True),
    SDAR(),
    SDAR(coef=1.0, beta=0.0),
]
VOCABULARY = 7


# -- the formulas -----------------------------------------------------------------------------------------------------


def logs(*probabilities: float) -> Tensor:
    """Return the log-probs as a tensor [1, 1, top]."""
    return torch.tensor([[probabilities]], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("skew", "expected"),
    [
        # S = (1/2, 1/4) with a tail of 1/4, T = (1/4, 1/4) with a tail of 1/2
        # KL(T || S) = 1/4 log(1/2) + 1/4 log 1 + 1/2 log 2 = 1/4 log 2
        (0.0, 0.25 * math.log(2)),
        # KL(S || T) = 1/2 log 2 + 1/4 log 1 + 1/4 log(1/2) = 1/4 log 2
        (1.0, 0.25 * math.log(2)),
        # M = (3/8, 1/4, 3/8); KL(S || M) = 1/2 log(4/3) + 1/4 log(2/3), and KL(T || M) is the same in reverse order
        (0.5, 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)),
        # M = 3/4 S + 1/4 T = (7/16, 1/4, 5/16)
        # 3/4 (1/2 log(8/7) + 1/4 log(4/5)) + 1/4 (1/4 log(4/7) + 1/2 log(8/5))
        (
            0.25,
            0.75 * (0.5 * math.log(8 / 7) + 0.25 * math.log(0.8))
            + 0.25 * (0.25 * math.log(4 / 7) + 0.5 * math.log(1.6)),
        ),
    ],
)
def test_golden_skew_divergence(skew, expected):
    assert skew_divergence(logs(0.5, 0.25), logs(0.25, 0.25), skew).item() == pytest.approx(expected)


def test_golden_gated_gap():
    # log T - log S is 1 and -1; gates sigmoid(2) = 0.8808 and sigmoid(-2) = 0.1192
    logprobs = torch.tensor([[-2.0, -2.0]], requires_grad=True)
    losses = gated_gap(logprobs, torch.tensor([[-1.0, -3.0]]), beta=2.0)
    assert losses[0].tolist() == pytest.approx([0.880797, -0.119203])
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    assert gradient[0].tolist() == pytest.approx([-0.880797, -0.119203]), "the gate has a gradient"


def stats(logits: Tensor, ids: Tensor, top_ids: Tensor | None, top_k: int) -> TokenStats:
    """Return the statistics of full distributions, in the form of `token_stats`."""
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1).detach()
    if top_ids is None:
        top_ids = logprobs.detach().topk(min(top_k, logits.shape[-1]), -1).indices
    picked = logprobs.gather(-1, ids[..., None])[..., 0]
    return TokenStats(picked, entropy, top_ids, logprobs.gather(-1, top_ids))


class Case:
    """Random distributions over a small vocabulary; row 1 has no action tokens, row 2 no privileged text."""

    def __init__(self, seed: int, top_k: int, rows: int = 5, width: int = 6, dtype: torch.dtype = torch.float32):
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

        self.logits = (2 * normal(rows, width, VOCABULARY)).requires_grad_()
        self.teacher_logits = 2 * normal(rows, width, VOCABULARY)
        self.ids = torch.randint(0, VOCABULARY, (rows, width), generator=g)
        self.mask = torch.rand(rows, width, generator=g) < 0.7
        self.mask[0] = False
        self.privileged = torch.rand(rows, generator=g) < 0.8
        self.privileged[1] = False
        self.advantages = normal(rows, width)
        self.policy = stats(self.logits, self.ids, None, top_k)
        self.teacher = stats(self.teacher_logits, self.ids, self.policy.top_ids, top_k)
        self.old = self.policy.logprobs.detach() + 0.5 * normal(rows, width)
        self.step_tokens = int(self.mask.sum()) + 3

    def loss(self, kind: Distillation, rows: slice = slice(None), **changed: Any) -> Tensor:
        parts = {**vars(self), **changed}

        def cut(x: TokenStats) -> TokenStats:
            return TokenStats(*(None if v is None else v[rows] for v in vars(x).values()))

        return kind(
            cut(parts["policy"]),
            cut(parts["teacher"]),
            parts["old"][rows],
            parts["mask"][rows],
            privileged=parts["privileged"][rows],
            advantages=parts["advantages"][rows],
            step_tokens=torch.tensor(parts["step_tokens"]),
        )


def slow(kind: Any, case: Case) -> float:
    """Return the loss, computed token by token with plain numbers; for SDAR its value, not its gradient."""

    def divergence(s: list[float], t: list[float], skew: float) -> float:
        def kl(a: list[float], b: list[float]) -> float:
            return math.fsum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

        if skew in (0.0, 1.0):
            return kl(s, t) if skew else kl(t, s)
        m = [(1 - skew) * x + skew * y for x, y in zip(s, t, strict=True)]
        return (1 - skew) * kl(s, m) + skew * kl(t, m)

    def bins(logprobs: list[float], keep: list[int]) -> list[float]:
        some = [math.exp(logprobs[i]) for i in keep]
        rest = math.fsum(math.exp(x) for i, x in enumerate(logprobs) if i not in keep)
        return [*some, rest] if len(keep) < VOCABULARY else some

    student, teacher = (x.detach().double().log_softmax(-1).tolist() for x in (case.logits, case.teacher_logits))
    total = []
    for row, t in case.mask.nonzero().tolist():
        if not case.privileged[row]:
            continue
        token = int(case.ids[row, t])
        gap = teacher[row][t][token] - student[row][t][token]
        if isinstance(kind, SDAR):
            total.append(gap / (1 + math.exp(-kind.beta * gap)))
            continue
        keep = sorted(range(VOCABULARY), key=lambda i: -student[row][t][i])[: kind.top_k]
        skew = kind.beta if isinstance(kind, OPSD) else kind.alpha if isinstance(kind, SDPO) else 1.0
        value = divergence(bins(student[row][t], keep), bins(teacher[row][t], keep), skew)
        if isinstance(kind, SDPO):
            value *= min(math.exp(student[row][t][token] - case.old[row, t].item()), kind.is_clip)
        elif kind.token_clip is not None:
            value = min(value, kind.token_clip)
        if isinstance(kind, SDPG) and kind.positives_only and case.advantages[row, t] <= 0:
            value = 0.0
        total.append(value)
    return kind.coef * math.fsum(total) / case.step_tokens


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_losses_equal_a_slow_loop(kind):
    for seed in range(60):
        case = Case(seed, kind.top_k)
        assert case.loss(kind).item() == pytest.approx(slow(kind, case), abs=1e-6, rel=1e-4)


def full_loss(kind: Any, case: Case) -> Tensor:
    """Return the papers' losses on full distributions, with torch's own KL."""
    s, t = case.logits.log_softmax(-1), case.teacher_logits.log_softmax(-1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.kl_div(b, a, reduction="none", log_target=True).sum(-1)

    skew = kind.beta if isinstance(kind, OPSD) else kind.alpha if isinstance(kind, SDPO) else 1.0
    if skew in (0.0, 1.0):
        each = kl(s, t) if skew else kl(t, s)
    else:
        m = torch.logaddexp(s + math.log(1 - skew), t + math.log(skew))
        each = (1 - skew) * kl(s, m) + skew * kl(t, m)
    if isinstance(kind, SDPO):
        each = each * (case.policy.logprobs - case.old).exp().clamp_max(kind.is_clip).detach()
    return kind.coef * each[case.mask & case.privileged[:, None]].sum() / case.step_tokens


@pytest.mark.parametrize("kind", [OPSD(), OPSD(beta=0.0), OPSD(beta=1.0), OPSD(beta=0.1), SDPO(), SDPG()], ids=str)
@pytest.mark.parametrize("top_k", [VOCABULARY, 1000])
def test_value_and_gradient_over_the_full_vocabulary_are_the_papers(kind, top_k):
    kind = replace(kind, top_k_tokens=top_k)
    for seed in range(10):
        case = Case(seed, top_k)
        (ours,) = torch.autograd.grad(case.loss(kind), case.logits, retain_graph=True)
        expected = full_loss(kind, case)
        (theirs,) = torch.autograd.grad(expected, case.logits)
        assert_close(case.loss(kind), expected, atol=1e-6, rtol=1e-4)
        assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", [k for k in KINDS if k.top_k], ids=str)
def test_the_gradient_over_some_tokens_and_a_tail_matches_the_value(kind):
    case = Case(3, kind.top_k, rows=3, width=3, dtype=torch.float64)
    # the importance weight has no gradient: hold its log-prob fixed
    fixed = case.policy.logprobs.detach()

    def value(logits: Tensor) -> Tensor:
        policy = stats(logits, case.ids, case.policy.top_ids, kind.top_k)
        return case.loss(kind, policy=replace(policy, logprobs=fixed))

    assert torch.autograd.gradcheck(value, (case.logits.detach().requires_grad_(),))


def test_the_gate_moves_the_policy_towards_the_teacher():
    """The expected gradient of SDAR on the policy's own samples decreases KL(policy || teacher); without a gate it
    is 0."""
    for seed in range(50):
        g = torch.Generator().manual_seed(seed)
        logits = torch.randn(VOCABULARY, generator=g, dtype=torch.float64, requires_grad=True)
        teacher = torch.randn(VOCABULARY, generator=g, dtype=torch.float64).log_softmax(-1)
        s = logits.log_softmax(-1)
        (down,) = torch.autograd.grad((s.exp() * (s - teacher)).sum(), logits, retain_graph=True)
        for beta in (5.0, 0.0):
            losses = gated_gap(s[None], teacher[None], beta)[0]
            (ours,) = torch.autograd.grad((s.exp().detach() * losses).sum(), logits, retain_graph=True)
            if beta:
                assert (ours * down).sum() > 0
            else:
                assert_close(ours, torch.zeros_like(ours), atol=1e-12, rtol=0)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.integers(1, 5))
def test_any_split_into_micro_batches_gives_the_same_loss_and_gradient(seed, kind, size):
    case = Case(seed, kind.top_k)
    whole = case.loss(kind)
    (gradient,) = torch.autograd.grad(whole, case.logits, retain_graph=True)
    total = torch.stack([case.loss(kind, slice(i, i + size)) for i in range(0, 5, size)]).sum()
    assert_close(total, whole, atol=1e-6, rtol=1e-5)
    assert_close(torch.autograd.grad(total, case.logits)[0], gradient)


@pytest.mark.parametrize("kind", [k for k in KINDS if k.top_k], ids=str)
@pytest.mark.parametrize("sharpness", [1.0, 30.0])
def test_an_agreeing_teacher_gives_exactly_no_loss_and_no_gradient(kind, sharpness):
    for seed in range(20):
        case = Case(seed, kind.top_k)
        logits = (sharpness * case.logits.detach()).requires_grad_()
        policy = stats(logits, case.ids, None, kind.top_k)
        teacher = TokenStats(*(x.detach() for x in vars(policy).values()))
        loss = case.loss(kind, policy=policy, teacher=teacher)
        (gradient,) = torch.autograd.grad(loss, policy.top_logprobs)
        assert loss == 0
        assert (gradient == 0).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows_without_privileged_text_and_masked_tokens_have_no_effect(kind):
    case = Case(2, kind.top_k)
    out = ~(case.mask & case.privileged[:, None])
    loss = case.loss(kind)
    (gradient,) = torch.autograd.grad(loss, case.logits, retain_graph=True)
    assert (gradient[out] == 0).all()
    assert (gradient[~out] != 0).any()

    def junk(x: TokenStats) -> TokenStats:
        logprobs = torch.where(out, -3.0, x.logprobs)
        return replace(x, logprobs=logprobs, top_logprobs=torch.where(out[..., None], 0.0, x.top_logprobs))

    again = case.loss(kind, policy=junk(case.policy), teacher=junk(case.teacher), old=torch.where(out, 90.0, case.old))
    assert torch.equal(again, loss)
    assert torch.equal(torch.autograd.grad(again, case.logits, retain_graph=True)[0], gradient)
    nothing = case.loss(kind, privileged=torch.zeros(5, dtype=torch.bool), step_tokens=0)
    assert nothing == 0
    assert (torch.autograd.grad(nothing, case.logits)[0] == 0).all(), "a rank without tokens has no gradient"


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("low", [-30.0, -200.0, -1e4])
def test_very_unlikely_tokens_give_finite_losses(kind, low):
    """One side gives a token a probability near 0."""
    for side in ("policy", "teacher"):
        logits = torch.zeros(1, 1, VOCABULARY)
        logits[..., :3] = low
        flat = torch.zeros_like(logits)
        mine, theirs = (logits, flat) if side == "policy" else (flat, logits)
        mine.requires_grad_()
        ids = torch.zeros(1, 1, dtype=torch.long)
        top_ids = torch.arange(min(kind.top_k, VOCABULARY))[None, None]
        policy = stats(mine, ids, top_ids, 0)
        case = Case(0, 1)
        loss = kind(
            policy,
            stats(theirs, ids, top_ids, 0),
            policy.logprobs.detach(),
            torch.ones(1, 1, dtype=torch.bool),
            privileged=torch.ones(1, dtype=torch.bool),
            advantages=case.advantages[:1, :1].abs(),
            step_tokens=torch.tensor(1),
        )
        (gradient,) = torch.autograd.grad(loss, mine)
        assert loss.isfinite()
        assert gradient.isfinite().all()


def test_the_clip_removes_the_gradient_of_tokens_with_a_large_loss():
    case = Case(1, 100)
    each = skew_divergence(case.policy.top_logprobs, case.teacher.top_logprobs, 0.5)
    clip = each.median().item()
    (gradient,) = torch.autograd.grad(case.loss(OPSD(token_clip=clip)), case.logits, retain_graph=True)
    (plain,) = torch.autograd.grad(case.loss(OPSD()), case.logits)
    above = each > clip
    assert above.any()
    assert (gradient[above] == 0).all()
    assert torch.equal(gradient[~above], plain[~above])


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (OPSD, {"beta": 1.1}, "OPSD: beta=1.1 must be a number between 0 and 1"),
        (OPSD, {"beta": math.nan}, "OPSD: beta=nan must be"),
        (OPSD, {"top_k_tokens": 0}, "OPSD: top_k_tokens=0 must be a number at least 1"),
        (OPSD, {"token_clip": 0.0}, "OPSD: token_clip=0.0 must be a number at least"),
        (OPSD, {"coef": 0.0}, "OPSD: coef=0 turns distillation off; use model.distillation=null"),
        (SDPO, {"alpha": -0.1}, "SDPO: alpha=-0.1 must be a number between 0 and 1"),
        (SDPO, {"is_clip": 0.5}, "SDPO: is_clip=0.5 must be a number at least 1"),
        (SDPG, {"coef": -1.0}, "SDPG: coef=-1.0 must be a number at least 0"),
        (SDPG, {"coef": math.inf}, "SDPG: coef=inf must be"),
        (SDAR, {"beta": -1.0}, "SDAR: beta=-1.0 must be a number at least 0"),
    ],
)
def test_invalid_options_are_rejected(kind, options, message):
    with pytest.raises(UserError, match=message):
        kind(**options)


def test_a_loss_of_distributions_reports_missing_ones():
    case = Case(0, 3)
    with pytest.raises(UserError, match="SDPG compares full distributions"):
        case.loss(SDPG(), teacher=replace(case.teacher, top_logprobs=None))


# -- the model's top-k with a gradient --------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [1, 4])
def test_top_log_probs_have_the_gradient_of_full_logits(tmp_path, monkeypatch, pieces):
    from gear_lightning.learning import token_stats as room

    model = untrained(GearModule(Sharp(), teacher=TeacherOptions(template=TEMPLATE)), tmp_path).policy
    rows = collate(random_rows(4), step_tokens=1, step_rollouts=1, temperature=0.8)
    vocabulary = model.config.vocab_size
    monkeypatch.setattr(room, "LOGITS", -(-int(rows.action_mask.sum()) // pieces) * vocabulary)
    weight = torch.randn(*rows.tokens.shape, 5, generator=torch.Generator().manual_seed(0))

    def gradients(loss: Tensor) -> Tensor:
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    args = (model, rows.tokens, rows.valid, rows.action_mask)
    found = token_stats(*args, temperature=0.8, top_k=5, top_grad=True)
    plain = token_stats(*args, temperature=0.8, top_k=5)
    assert not plain.top_logprobs.requires_grad
    for name, value in vars(found).items():
        assert torch.equal(value, getattr(plain, name)), name
    ours = gradients((found.top_logprobs * weight).sum() + found.logprobs.sum())
    given = token_stats(*args, temperature=0.8, top_ids=plain.top_ids, top_grad=True)
    assert torch.equal(given.top_logprobs, plain.top_logprobs)
    again = gradients((given.top_logprobs * weight).sum() + given.logprobs.sum())
    logprobs = torch.nn.functional.pad(
        (model(input_ids=rows.tokens).logits / 0.8).log_softmax(-1)[:, :-1], (0, 0, 1, 0)
    )
    top = logprobs.gather(-1, plain.top_ids) * weight
    picked = logprobs.gather(-1, rows.tokens[..., None])[..., 0]
    whole = gradients(top[rows.action_mask].sum() + picked[rows.action_mask].sum())
    assert_close(ours, whole, atol=1e-4, rtol=1e-4)
    assert_close(again, whole, atol=1e-4, rtol=1e-4)


# -- runs -------------------------------------------------------------------------------------------------------------


def alone(distillation: Distillation, teacher: TeacherOptions = FROZEN, **options: Any) -> GearModule:
    """Return a module that trains with distillation only."""
    return module(Uniform(), objective=None, distillation=distillation, teacher=teacher, **options)


def column(run: Path, name: str) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def divergence(model: GearModule, batches: list[RolloutBatch]) -> float:
    """Return the mean KL(teacher || policy) of full distributions over the action tokens of batches."""
    total, count = 0.0, 0
    for batch in batches:
        mask = batch.action_mask
        with torch.no_grad():
            policy = token_stats(model.policy, batch.tokens, batch.valid, mask, top_k=10**6)
        teacher = model.teacher.score(model.policy, batch, mask, policy.top_ids)
        total += skew_divergence(policy.top_logprobs, teacher.top_logprobs, 0.0)[mask].sum().item()
        count += int(mask.sum())
    return total / count


@pytest.mark.parametrize("kind", [OPSD(), OPSD(beta=0.0), SDPO(alpha=1.0), SDPG(coef=1.0)], ids=str)
def test_distillation_alone_moves_the_policy_to_its_frozen_teacher(tmp_path, kind):
    def make() -> GearModule:
        optimizer = lambda p: torch.optim.AdamW(p, lr=3e-4, weight_decay=0.0)  # noqa: E731
        options = {"objective": None, "distillation": kind, "teacher": FROZEN, "optimizer": optimizer}
        return GearModule(Sharp(), Uniform(), **options)

    model, source = make(), data(train_tasks=TalkTasks(), val_tasks=None)
    batches = [s.batch for s in watched(tmp_path, model, source, generation(environment=Talk), max_epochs=20).seen]
    before, after = divergence(untrained(make(), tmp_path), batches), divergence(model, batches)
    assert after < 0.6 * before
    losses = column(tmp_path, "train/distillation")
    assert losses == column(tmp_path, "train/loss")
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert column(tmp_path, "teacher/student_gap")
    with (tmp_path / "metrics.csv").open() as file:
        assert "train/clip_fraction" not in next(csv.reader(file))


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_the_gradient_of_a_run_does_not_depend_on_the_micro_batch(tmp_path, micro_batch_size):
    def weights(size: int) -> Tensor:
        model = alone(OPSD(top_k_tokens=5), optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
        watched(tmp_path / str(size), model, data(micro_batch_size=size), max_epochs=1)
        return torch.cat([p.detach().flatten() for p in model.policy.parameters()])

    assert_close(weights(micro_batch_size), weights(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("credit", [Uniform(), GEAR(), SCGRPO(top_k_tokens=9)], ids=lambda c: type(c).__name__)
def test_a_distillation_adds_its_gradient_to_that_of_the_objective(tmp_path, credit):
    """Checked on the first step, where all runs have the same rollouts."""
    shown = TeacherOptions(template=TEMPLATE)
    sgd = {"optimizer": lambda p: torch.optim.SGD(p, lr=1.0), "teacher": shown}

    def moved(name: str, model: GearModule) -> Tensor:
        first, last = watched(tmp_path / name, model, max_epochs=1).weights
        return torch.cat([(b - a).flatten() for a, b in zip(first, last, strict=True)])

    kind = OPSD(coef=200.0, top_k_tokens=5)
    both = moved("both", module(credit, distillation=kind, **sgd))
    objective = moved("objective", module(credit, **sgd))
    distilled = moved("distilled", alone(kind, **sgd))
    assert distilled.norm() > 0.01 * objective.norm() > 0
    assert_close(both, objective + distilled, atol=1e-5, rtol=1e-3)
    total = column(tmp_path / "both", "train/loss")[0]
    parts = column(tmp_path / "objective", "train/loss")[0] + column(tmp_path / "both", "train/distillation")[0]
    assert total == pytest.approx(parts, abs=1e-6)


@pytest.mark.parametrize("kind", [SDPO(), SDPG(positives_only=True), SDAR()], ids=str)
def test_grpo_with_each_distillation_trains(tmp_path, kind):
    seen = watched(tmp_path, module(Uniform(), distillation=kind)).seen
    assert all(s.outputs["loss"].isfinite() for s in seen)
    assert any(x != 0 for x in column(tmp_path, "train/distillation"))
    assert "train/clip_fraction" in (tmp_path / "metrics.csv").read_text()


def test_rollouts_with_a_dropped_reference_are_not_distilled(tmp_path):
    told = TeacherOptions("frozen", template=TEMPLATE, max_prompt=1)
    path = watched(tmp_path, alone(OPSD(), told, optimizer=lambda p: torch.optim.SGD(p, lr=1.0)), max_epochs=2)
    assert not any(s.batch.privileged.any() for s in path.seen)
    assert column(tmp_path, "train/distillation") == [0, 0]
    for a, b in zip(path.weights[0], path.weights[-1], strict=True):
        assert torch.equal(a, b)


def test_later_inner_epochs_use_the_top_tokens_of_the_first_scoring(tmp_path, monkeypatch):
    kind, score, asked = OPSD(coef=1.0, top_k_tokens=4), Teacher.score, []

    def counted(self, policy, batch, *args):
        asked.append(batch.inner_epoch)
        return score(self, policy, batch, *args)

    monkeypatch.setattr(Teacher, "score", counted)
    watch = watched(tmp_path, alone(kind), data(inner_epochs=3), max_epochs=2)
    assert asked == [0] * 2 * 2, "the teacher scored again"
    assert len(watch.weights) == 1 + 2 * 3
    by_rows: dict[Any, list] = {}
    for s in watch.seen:
        by_rows.setdefault((s.steps - s.batch.inner_epoch, tuple(s.batch.index.tolist())), []).append(s)
    assert len(by_rows) == 2 * 2
    other, scored = 0, untrained(alone(kind), tmp_path / "other")
    for first, *later in by_rows.values():
        assert [s.batch.inner_epoch for s in (first, *later)] == [0, 1, 2]
        for s in later:
            policy, teacher = s.outputs["policy"], s.outputs["teacher"]
            for name, value in vars(first.outputs["teacher"]).items():
                assert torch.equal(value, getattr(teacher, name)), name
            assert torch.equal(policy.top_ids, first.outputs["policy"].top_ids)
            assert torch.equal(policy.top_ids, teacher.top_ids)
            # the loss is that of the weights of that step on those tokens
            with torch.no_grad():
                for mine, then in zip(scored.policy.parameters(), watch.weights[s.steps], strict=True):
                    mine.copy_(then)
            args = (scored.policy, s.batch.tokens, s.batch.valid, s.batch.action_mask)
            assert_close(token_stats(*args, top_ids=teacher.top_ids).top_logprobs, policy.top_logprobs.detach())
            other += int((token_stats(*args, top_k=4).top_ids != policy.top_ids).sum())
            expected = skew_divergence(policy.top_logprobs, teacher.top_logprobs, 0.5)[s.batch.action_mask].sum()
            assert_close(s.outputs["loss"], expected.detach() / s.batch.step_tokens)
    assert other, "the most likely tokens never changed, so the test proves nothing"


@pytest.mark.parametrize(("inner_epochs", "batch_idx"), [(1, 1), (2, 3), (2, 5)])
def test_a_checkpoint_within_an_iteration_resumes_exactly(tmp_path, inner_epochs, batch_idx):
    class SaveAndStop(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, idx):
            if trainer.current_epoch == 1 and idx == batch_idx:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")
                raise KeyboardInterrupt

    def fit(name: str, *callbacks: L.Callback, **options: Any) -> GearModule:
        torch.manual_seed(0)
        model = alone(SDPO(top_k_tokens=4), TeacherOptions(template=TEMPLATE))
        tasks = data(micro_batch_size=2, inner_epochs=inner_epochs)
        trainer(tmp_path / name, generation(), *callbacks, max_epochs=3).fit(model, datamodule=tasks, **options)
        return model

    whole = fit("whole")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit("parts", SaveAndStop())
    resumed = fit("parts", ckpt_path=tmp_path / "mid.ckpt", weights_only=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_run_without_reward_spread_continues_with_distillation(tmp_path):
    class NoSpread(AnyCall):
        def step(self, message):
            return replace(super().step(message), reward=0.0)

    for model in (module(Uniform()), module(Uniform(), distillation=OPSD(), teacher=FROZEN)):
        run = trainer(tmp_path, generation(environment=NoSpread), Health(1, 2), max_epochs=4)
        if model.distillation is None:
            with pytest.raises(UserError, match="no group had any spread"):
                run.fit(model, datamodule=data())
        else:
            run.fit(model, datamodule=data())
            assert run.global_step == 4


# -- rejected options -------------------------------------------------------------------------------------------------


def test_a_module_without_a_loss_is_rejected():
    with pytest.raises(UserError, match=r"model\.objective and model\.distillation are both null"):
        module(Uniform(), objective=None)


def test_credit_without_an_objective_is_rejected():
    with pytest.raises(UserError, match=r"model.credit=GEAR does nothing without.*configs/credit/grpo.yaml"):
        module(GEAR(), objective=None, distillation=OPSD())
    module(GEAR(), objective=ClippedSurrogate(), distillation=OPSD())


def test_a_task_without_a_reference_is_rejected_if_only_distillation_needs_it(tmp_path):
    class Bare(LookupChainTasks):
        def __getitem__(self, index):
            return replace(super().__getitem__(index), reference=None)

    with pytest.raises(UserError, match=r"and OPSD needs one.*add one, or use.*shows=peer or model.distillation=null"):
        watched(tmp_path, alone(OPSD()), data(train_tasks=Bare(2)))
