"""Maximum length of a row: the model's positions, and the length above which its rotary frequencies change."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from every_rule import Talk, TalkTasks, watched
from model_families import Family
from tiny_runs import data, generation

from gear_lightning.credit import GEAR, Uniform
from gear_lightning.environments.base import Task
from gear_lightning.errors import UserError
from gear_lightning.generation.budgets import Budgets
from gear_lightning.generation.cached_engine import CachedEngine
from gear_lightning.generation.engine import Sampling, TurnRequest
from gear_lightning.generation.generate_engine import GenerateEngine
from gear_lightning.learning.positions import longest_row
from gear_lightning.models import FromScratch
from gear_lightning.module import GearModule
from gear_lightning.probes.noise_floor import measure
from gear_lightning.recipes.refusals import refusals, skeleton_of
from gear_lightning.teacher import TeacherOptions, privileged_prompt

TEMPLATE = " <ref> {reference}"
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [8.0] * 8}


def rope(**parameters: Any) -> tuple:
    return (("rope_parameters", {"rope_theta": 1e4, **parameters}),)


LIMITS = {
    "llama": (Family(kind="llama"), 256),
    "gpt2": (Family(kind="gpt2"), 256),
    "mpt": (Family(kind="mpt"), 256),
    "bloom": (Family(kind="bloom"), None),
    "linear": (Family(kind="llama", options=rope(rope_type="linear", factor=4.0)), 256),
    "yarn": (
        Family(kind="llama", options=rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)),
        256,
    ),
    "dynamic": (Family(kind="llama", options=rope(rope_type="dynamic", factor=4.0)), 256),
    "longrope": (Family(kind="llama", options=rope(**LONGROPE, original_max_position_embeddings=64)), 64),
    "phi3": (
        Family(kind="phi3", options=(("original_max_position_embeddings", 64), ("rope_parameters", LONGROPE))),
        64,
    ),
    "layers": (
        Family(
            kind="gemma3",
            options=(
                (
                    "rope_parameters",
                    {
                        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                        "full_attention": {**LONGROPE, "original_max_position_embeddings": 32},
                    },
                ),
            ),
        ),
        32,
    ),
}
PHI = LIMITS["phi3"][0]


@pytest.mark.parametrize("kind", LIMITS)
def test_the_longest_row_follows_from_the_configuration(kind):
    policy, tokens = LIMITS[kind]
    found = longest_row(policy.config(), "Model")
    assert (found and found.tokens) == tokens


def reasons(policy: Any, budgets: Budgets, credit: Any = Uniform(), **teacher: Any) -> list[str]:
    """Return the reasons why ``fit`` and ``doctor`` reject the recipe."""
    module = GearModule(policy, credit, teacher=TeacherOptions(template=TEMPLATE, **teacher))
    options = {"strategy": "auto", "precision": "32-true", "gradient_clip_algorithm": None}
    options |= {"accumulate_grad_batches": 1, "check_val_every_n_epoch": 1, "max_epochs": 1, "callbacks": None}
    options["limit_val_batches"] = None
    generate = generation(budgets=budgets, engine=GenerateEngine())
    return list(refusals(module, data(), generate, options, 1, skeleton_of(policy)))


@pytest.mark.parametrize("kind", ["longrope", "phi3", "dynamic", "layers"])
def test_a_context_above_the_frequency_change_is_rejected_and_a_shorter_one_works(kind):
    policy, tokens = LIMITS[kind]
    assert not reasons(policy, Budgets(tokens=8, context=tokens))
    (reason,) = reasons(policy, Budgets(tokens=8, context=tokens + 1))
    wanted = f"generation.budgets.context={tokens + 1} is more than {tokens if kind != 'dynamic' else f'the {tokens}'}"
    assert reason.startswith(wanted)
    assert f"set it to {tokens} or less" in reason


def overlong(run: Path) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row["teacher/overlong"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "phi3"])
def test_rollouts_whose_teacher_view_is_too_long_have_no_teacher(tmp_path, kind):
    """The context equals the model's positions: with the reference, some rollouts are too long and some are not."""
    places = {"gpt2": "n_positions", "llama": "max_position_embeddings", "phi3": "original_max_position_embeddings"}
    options = (*(PHI.options if kind == "phi3" else ()), (places[kind], 64))
    policy = Family(kind=kind, options=tuple(dict(options).items()))
    model = GearModule(policy, GEAR(), teacher=TeacherOptions("live", template=TEMPLATE))
    generate = generation(environment=Talk, budgets=Budgets(4, 80, 24, 64))
    tasks = data(train_tasks=TalkTasks(turns=4, longest=10), val_tasks=None, group_size=6)
    seen = watched(tmp_path, model, tasks, generate, max_epochs=2).seen
    lengths, dropped = [], 0
    for s in seen:
        full = s.batch.valid.sum(-1) + 4  # " <ref> e1 e2 e3" is four words
        assert torch.equal(s.batch.privileged, full <= 64)
        assert s.batch.teacher_valid.sum(-1).max() <= 64
        lengths += full.tolist()
        dropped += int((full > 64).sum())
        assert (s.outputs["credit"].weights[~s.batch.privileged] == 1).all()
    assert 0 < dropped < len(lengths)
    assert sum(overlong(tmp_path)) == dropped


def test_with_overlong_error_the_first_such_rollout_ends_the_run_and_is_named(tmp_path):
    model = GearModule(
        Family(kind="gpt2", options=(("n_positions", 64),)),
        GEAR(),
        teacher=TeacherOptions("live", template=TEMPLATE, overlong="error"),
    )
    generate = generation(environment=Talk, budgets=Budgets(4, 80, 24, 64))
    tasks = data(train_tasks=TalkTasks(turns=4, longest=10), val_tasks=None, group_size=6)
    with pytest.raises(UserError, match=r"task talk-\d+: .*with the \d+ of the response .*64 positions of GPT2LMHead"):
        watched(tmp_path, model, tasks, generate, max_epochs=2)


def test_the_longest_view_fits_the_models_positions():
    chat = GearModule(FromScratch("gear_lightning.environments.lookup_chain.WORDS")).chat_format
    messages = [{"role": "user", "content": "e1 e2"}]
    task = Task("t", messages, reference="e3")
    full, dropped = privileged_prompt(task, messages, chat, TeacherOptions(template=TEMPLATE))
    assert not dropped
    longest = longest_row(Family(kind="gpt2", options=(("n_positions", len(full) + 5),)).config(), "Model")
    assert privileged_prompt(task, messages, chat, TeacherOptions(template=TEMPLATE), longest=longest, response=5) == (
        full,
        False,
    )
    ids, dropped = privileged_prompt(
        task, messages, chat, TeacherOptions(template=TEMPLATE), longest=longest, response=6
    )
    assert (ids, dropped) == (chat.prompt(messages), True)


@pytest.mark.parametrize("overlong", ["drop", "error"])
def test_a_recipe_without_positions_for_a_response_in_the_teachers_view_is_rejected(overlong):
    policy = Family(kind="gpt2", options=(("n_positions", 40),))
    teacher = TeacherOptions("live", template=TEMPLATE, overlong=overlong)
    generate = generation(environment=Talk, budgets=Budgets(4, 80, 24, 40))

    def attach(reference: str, **options: Any) -> None:
        model = GearModule(policy, options.get("credit", GEAR()), teacher=teacher)
        generate.attach(model, data(train_tasks=TalkTasks(longest=5, reference=reference), val_tasks=None))

    attach("e1 e2 e3")
    attach("e1 " * 50, credit=Uniform())
    with pytest.raises(UserError, match=r"task talk-\d+: its privileged prompt has \d+ tokens.* 40 positions of gpt2"):
        attach("e1 " * 50)


def test_the_noise_floor_stays_within_the_positions():
    from every_rule import random_rows

    from gear_lightning.batch import collate

    batch = collate(random_rows(1), step_tokens=1, step_rollouts=1, temperature=1.0)
    columns = batch.tokens.shape[1]
    options = dict(PHI.options) | {"original_max_position_embeddings": columns}
    noise = measure(Family(kind="phi3", options=tuple(options.items())).model().eval(), batch, GEAR())
    assert noise.shape == (batch.size, columns, columns)
    assert noise.divergence.max() < 1e-4


@torch.no_grad()
def test_padding_in_the_cache_takes_no_positions():
    """A conversation near the end of the context continues while another one gets a long observation."""
    positions = 64
    model = Family(kind="gpt2", options=(("n_positions", positions),)).model().eval()

    def play(engine: Any) -> list[list[float]]:
        engine.begin(model, Sampling(), set())
        contexts, told = [[7] * 55, [8, 9]], [[], []]
        for turn, more in enumerate([([], []), ([10], list(range(10, 40)))]):
            for key, ids in enumerate(more):
                contexts[key] = contexts[key] + ids
                engine.submit(TurnRequest(key, contexts[key], 4, (0, key, turn)))
            waiting = 2
            while waiting and (done := engine.poll()):
                waiting -= len(done)
                for said in done:
                    contexts[said.key] = contexts[said.key] + said.ids
                    told[said.key] += said.logprobs
        engine.end()
        assert len(contexts[0]) == positions
        return told

    for ours, theirs in zip(play(CachedEngine()), play(GenerateEngine()), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
