"""The teacher's weights: equal to the policy at the start, then live, frozen or an average that keeps changing."""

import itertools
import weakref

import pytest
import torch
from every_rule import Sharp, Talk, TalkTasks, random_rows, untrained, watched
from tiny_runs import data, generation, module, source
from torch.utils._python_dispatch import TorchDispatchMode

from gear_lightning.batch import collate
from gear_lightning.credit import CREST, GEAR, PBSD, RLSD, Evidence, Placebo, TokenOnly, Turn, TurnSight, Uniform
from gear_lightning.learning.token_stats import token_stats
from gear_lightning.models import Pretrained
from gear_lightning.module import GearModule
from gear_lightning.runs.records import read_records
from gear_lightning.teacher import Teacher, TeacherOptions

TEMPLATE = " <ref> {reference}"
NO_HINT = TeacherOptions("live", template=TEMPLATE, max_prompt=1)  # every reference is dropped because of its length


def batch_of(rows, temperature=1.0):
    return collate(rows, step_tokens=1, step_rollouts=1, temperature=temperature)


def flat(parameters) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in parameters])


def save_policy(folder, scale=1.0):
    model = source(seed=7).model()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    model.save_pretrained(folder)
    source().tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(params=["built", "directory", "warm start"])
def policy(request, tmp_path):
    """Return a GearModule's policy from each source of weights."""

    def make(**options) -> GearModule:
        if request.param == "directory":
            return GearModule(Pretrained(str(save_policy(tmp_path / "model"))), **options)
        model = GearModule(source(), **options)
        if request.param == "warm start":
            model.initial_weights = save_policy(tmp_path / "warm", scale=1.5)
        return model

    return make


@pytest.mark.parametrize("weights", ["ema", "live", "frozen"])
def test_the_initial_teacher_equals_the_policy_bit_for_bit(policy, weights, tmp_path):
    rule = GEAR("jsd", sign_rule="symmetric", divergence_top_k=8)
    model = policy(credit=rule, teacher=TeacherOptions(weights, template=TEMPLATE))
    for seen in watched(tmp_path, model, data(micro_batch_size=3), max_epochs=1).seen:
        start = untrained(policy(credit=rule, teacher=TeacherOptions(weights, template=TEMPLATE)), tmp_path)
        batch, teacher = seen.batch, seen.outputs["teacher"]
        where = torch.zeros_like(batch.teacher_valid)
        for row, column in batch.action_mask.nonzero().tolist():
            where[row, column + batch.teacher_offset[row]] = True
        same = token_stats(start.policy, batch.teacher_tokens, batch.teacher_valid, where)
        assert torch.equal(teacher.logprobs[batch.action_mask], same.logprobs[where])
        assert torch.equal(teacher.entropy[batch.action_mask], same.entropy[where])
        assert not torch.equal(teacher.logprobs, seen.outputs["policy"].logprobs), "the hint has no effect"


RULES = [
    *(
        GEAR(divergence, sign_rule=sign, segment_end=end, scale=scale)
        for divergence, sign, end, scale in itertools.product(
            ("k1", "k3", "reverse_kl", "forward_kl", "jsd"),
            ("sign_aware", "symmetric", "negatives_only", "reversed_on_correct"),
            ("entropy_high", "window", "none"),
            (None, "none", "zscore"),
        )
        if divergence == "k1" or sign != "sign_aware"
    ),
    *(GEAR(sign_rule=sign, normalise="none") for sign in ("sign_aware", "symmetric", "negatives_only")),
    *(kind(normalise=how) for kind in (GEAR, Turn, TokenOnly, Placebo) for how in ("mean", "geometric", "none")),
    RLSD(),
    CREST(),
    TurnSight(),
    PBSD(),
]


def test_equal_weights_and_no_hint_give_no_divergence_and_weight_one(tmp_path):
    model = untrained(GearModule(Sharp(), teacher=TeacherOptions(template=TEMPLATE)), tmp_path)
    batch = batch_of(random_rows(1, hints=(0,) * 16))
    policy = token_stats(model.policy, batch.tokens, batch.valid, batch.action_mask, top_k=100)
    teacher = model.teacher.score(model.policy, batch, batch.action_mask, policy.top_ids)
    assert torch.equal(teacher.logprobs, policy.logprobs)
    assert torch.equal(teacher.top_logprobs, policy.top_logprobs)
    advantages = batch.advantages
    assert {-1.0, 2.0} <= set(advantages.tolist())
    for rule in RULES:
        credit = rule(Evidence.of(batch, policy, teacher))
        assert (credit.divergence == 0).all(), rule
        assert (credit.weights == 1).all(), rule
        assert torch.equal(credit.token_advantages, torch.where(batch.action_mask, advantages[:, None], 0)), rule
    other = batch_of(random_rows(1, hints=(5,) * 16))
    told = model.teacher.score(model.policy, other, other.action_mask, policy.top_ids)
    for rule in RULES:
        assert (rule(Evidence.of(other, policy, told)).weights != 1).any(), f"{rule} always has weights of 1"


def test_training_with_the_policy_as_teacher_without_a_hint_is_grpo_bit_for_bit(tmp_path):
    runs = [module(GEAR(), teacher=NO_HINT), module(Uniform())]
    for number, model in enumerate(runs):
        watched(tmp_path / str(number), model, max_epochs=3)
    for a, b in zip(*(model.policy.parameters() for model in runs), strict=True):
        assert torch.equal(a, b)
    for record in read_records(tmp_path / "0"):
        assert (record.tensors["weights"] == 1).all()
        assert (record.tensors["advantages"] != 0).any()


@pytest.mark.parametrize(("every", "lr"), [(1, 1e-6), (7, 1e-3)])
def test_the_average_matches_the_closed_form_over_fifty_steps(tmp_path, every, lr):
    rate = 0.05
    options = TeacherOptions("ema", rate, every, template=TEMPLATE)
    model = module(teacher=options, optimizer=lambda p: torch.optim.AdamW(p, lr=lr))
    path = watched(tmp_path, model, data(inner_epochs=10), max_epochs=5).weights
    assert len(path) == 51
    # teacher_k = (1 - r)^k theta_0 + r sum_i (1 - r)^(k - i) theta_i, over the k updates
    updates = path[every::every]
    expected = (1 - rate) ** len(updates) * flat(path[0])
    for i, weights in enumerate(updates, 1):
        expected += rate * (1 - rate) ** (len(updates) - i) * flat(weights)
    error = (flat(model.teacher.model.parameters()) - expected).abs().max()
    moved = (flat(path[0]) - expected).abs().max()
    assert error <= 1e-6
    assert moved > 20 * error, "the teacher hardly changed, so the test proves nothing"


def test_the_average_of_bfloat16_weights_is_float32_and_keeps_changing(tmp_path):
    rate = 1e-3
    model = module(teacher=TeacherOptions("ema", rate, template=TEMPLATE))
    path = watched(tmp_path, model, max_epochs=4, precision="bf16-true").weights
    assert {p.dtype for p in path[0]} == {torch.bfloat16}
    start, expected = flat(path[0]), flat(path[0])
    naive = [p.clone() for p in path[0]]
    for weights in path[1:]:
        expected = (1 - rate) * expected + rate * flat(weights)
        for average, new in zip(naive, weights, strict=True):
            average.lerp_(new, rate)
    average = model.teacher.shadow
    assert {p.dtype for p in average} == {torch.float32}
    assert (flat(average) - expected).abs().max() < 1e-6
    changed = (flat(path[-1]) != start).float().mean()
    moved, stalled = (flat(average) != start).float().mean(), (flat(naive) == start).float().mean()
    assert moved > 0.9 * changed > 0.5
    assert stalled > 0.5, "a bfloat16 average would also follow, so the test proves nothing"
    for scoring, value in zip(model.teacher.model.parameters(), average, strict=True):
        assert scoring.dtype == torch.bfloat16
        assert torch.equal(scoring, value.bfloat16())


def test_a_frozen_teacher_never_changes_and_a_live_one_is_the_policy_itself(tmp_path):
    rows = batch_of(random_rows(2, hints=(0, 0, 0)))
    for weights in ("frozen", "live"):
        model = module(teacher=TeacherOptions(weights, template=TEMPLATE))
        path = watched(tmp_path / weights, model).weights
        teacher = model.teacher.score(model.policy, rows, rows.action_mask)
        policy = token_stats(model.policy, rows.tokens, rows.valid, rows.action_mask)
        assert not torch.equal(flat(path[0]), flat(path[-1]))
        assert torch.equal(teacher.logprobs, policy.logprobs) == (weights == "live")
        if weights == "frozen":
            assert torch.equal(flat(model.teacher.parameters()), flat(path[0]))
        else:
            assert not list(model.teacher.parameters()), "a second copy of the weights"


def test_the_teacher_stays_in_evaluation_mode(tmp_path):
    model = module()
    watched(tmp_path, model, max_epochs=1)
    model.train()
    assert model.policy.training
    assert not any(part.training for part in model.teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.teacher.parameters())


def test_statistics_at_the_policys_positions_are_the_teachers(tmp_path):
    model = untrained(GearModule(Sharp(), teacher=TeacherOptions(template=TEMPLATE)), tmp_path)
    with torch.no_grad():
        for p in model.teacher.model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    rows = random_rows(3, hints=(0, 60, 1, 17))
    batch = batch_of(rows, temperature=0.7)
    policy = token_stats(model.policy, batch.tokens, batch.valid, batch.action_mask, top_k=4)
    stats = model.teacher.score(model.policy, batch, batch.action_mask, policy.top_ids)
    assert not stats.logprobs[~batch.action_mask].any()
    for i, row in enumerate(rows):
        ids = row.teacher_prompt + row.tokens[row.prompt_length :]
        logprobs = model.teacher.model(input_ids=torch.tensor([ids])).logits[0].div(0.7).log_softmax(-1)
        for t in (t for t, sampled in enumerate(row.action_mask) if sampled):
            there = len(row.teacher_prompt) + t - row.prompt_length
            before = logprobs[there - 1]  # the distribution that token t is sampled from
            torch.testing.assert_close(stats.logprobs[i, t], before[row.tokens[t]], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(stats.entropy[i, t], -(before.exp() * before).sum(), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(stats.top_logprobs[i, t], before[policy.top_ids[i, t]], atol=1e-4, rtol=1e-4)


def test_a_rollout_without_its_reference_has_weight_one_with_any_teacher(tmp_path):
    options = TeacherOptions("ema", template=TEMPLATE, max_prompt=1)
    model = GearModule(Sharp(), teacher=options, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    generate = generation(environment=Talk)
    seen = watched(tmp_path, model, data(train_tasks=TalkTasks(), val_tasks=None), generate, max_epochs=3).seen
    assert {s.steps for s in seen} == {0, 1, 2}
    for s in seen:
        assert (s.outputs["credit"].weights == 1).all(), f"after {s.steps} steps"


class Visits(TorchDispatchMode):
    """Simulates a device: counts copies to and from ``meta``, which need no values."""

    def __init__(self):
        self.brought: list[weakref.ref] = []  # copies on the other device
        self.most = self.back = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            source, device = args[0], torch.device(kwargs.get("device", args[0].device))
            assert not (source.is_meta and device.type == "cpu"), "a part of the policy is copied to the CPU"
            if device.type == "meta" and not source.is_meta:
                made = torch.empty_like(source, device="meta", dtype=kwargs.get("dtype", source.dtype))
                self.brought.append(weakref.ref(made))
                self.most = max(self.most, sum(alive() is not None for alive in self.brought))
                return made
        if func is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            self.back += 1
            return args[0]
        return func(*args, **kwargs)


@pytest.mark.parametrize("low_precision", [False, True])
def test_a_parked_average_is_copied_to_the_device_tensor_by_tensor_and_only_if_due(low_precision):
    policy = source().model().to(torch.bfloat16 if low_precision else torch.float32)
    teacher = Teacher(policy, TeacherOptions(every=2, template=TEMPLATE), low_precision=low_precision)
    teacher.park()
    policy.to("meta")
    tensors = len(list(policy.parameters()))
    with Visits() as visits:
        teacher.update(policy, 1)
        assert not visits.brought
        teacher.update(policy, 2)
    assert len(visits.brought) == tensors
    assert visits.most <= 2, "the whole model was copied at once"
    assert visits.back == tensors * (2 if low_precision else 1)  # the float32 average, and the copy that scores
