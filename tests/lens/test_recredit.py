"""Credit recomputed from records: equal to that of training, compared with other rules, rejected if impossible."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from command_line import FIT
from credit_pages import add, fake_rollout, fake_tensors, page_data, unpack
from safetensors.torch import load_file, save_file
from tiny_runs import WORDS, AnyCall, data, generation, trainer

from gear_lightning.batch import CALL, REASONING
from gear_lightning.commands.recredit import recredit_command
from gear_lightning.credit import GEAR, RLSD, SCGRPO, CreditAssigner, Placebo, TokenOnly, Turn, Uniform
from gear_lightning.credit.base import spread_credit
from gear_lightning.environments.base import Step, tool_result
from gear_lightning.errors import UserError
from gear_lightning.generation.budgets import Budgets
from gear_lightning.generation.chat import ChatOptions
from gear_lightning.lens.difference import (
    auc,
    compare,
    first_wrong,
    largest_changes,
    rank_correlation,
    ranks,
    summary,
    total_variation,
)
from gear_lightning.lens.recredit import CREDIT_KEYS, recorded_credit, recredit, stands_in, told
from gear_lightning.models import FromScratch
from gear_lightning.module import GearModule
from gear_lightning.runs.records import Record, read_records
from gear_lightning.teacher import TeacherOptions

SYMMETRIC = {"sign_rule": "symmetric"}
RULES = {
    "gear": GEAR(),
    "gear-segments": GEAR(anchor_floor=0.0, anchor_level=0.7, entropy="teacher", entropy_quantile=0.9, mix_decay=5),
    "gear-reverse-kl": GEAR(divergence="reverse_kl", anchor_floor=0.0, exclude_tail=2, **SYMMETRIC),
    "token-jsd": TokenOnly(divergence="jsd", divergence_top_k=7, normalise="geometric", **SYMMETRIC),
    "rlsd": RLSD(),
    "turn": Turn(kappa=5.0),
    "placebo": Placebo(anchor_floor=0.0, kappa=3.0),
    "sc-grpo": SCGRPO(),
    "uniform": Uniform(),
    "rlsd-actions": RLSD(where="actions"),
    "kl-answer": GEAR(divergence="forward_kl", anchor_floor=0.0, where="answer", **SYMMETRIC),
}
THINKING = ["e1", "e2"]  # marks of reasoning of the runs above whose rule has a scope


class Going(AnyCall):
    """Three turns; the environment labels every second turn's first word as wrong."""

    turns = 0

    def step(self, message):
        reward, words = super().step(message).reward, message.get("content", "").split()
        self.turns += 1
        told = [{"text": words[0], "right": self.turns % 2 == 1, "occurrence": 0}] if words else []
        return Step([tool_result("look", "e1")], reward=reward, done=self.turns == 3, info={"decisions": told})


class Brief(FromScratch):
    """A policy with random weights that often ends its turn."""

    def model(self):
        model = super().model()
        with torch.no_grad():
            model.lm_head.weight[self.tokenizer().eos_token_id] *= 30
        return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a function: name of `RULES` -> run directory with the rule in config.yaml. Each is trained once."""
    done: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in done:
            folder, rule = tmp_path_factory.mktemp(name), RULES[name]
            torch.manual_seed(0)
            generate = generation(environment=Going, budgets=Budgets(turns=4, tokens=60, turn_tokens=20, context=120))
            policy = Brief(WORDS, hidden_size=32, layers=2, heads=2, max_length=256)
            teacher = TeacherOptions(template=" <ref> {reference}")
            chat = ChatOptions() if rule.where == "all" else ChatOptions(thinking=THINKING)
            model = GearModule(
                policy, rule, teacher=teacher, chat=chat, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3)
            )
            trainer(folder, generate).fit(model, datamodule=data(micro_batch_size=3))
            spec = {"class_path": f"gear_lightning.credit.{type(rule).__name__}", "init_args": dict(vars(rule))}
            (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"credit": spec}}))
            done[name] = folder
        return done[name]

    return make


def arguments(rule: CreditAssigner, flag: str = "--credit") -> list[str]:
    given = [f"{flag}.{key}={value}" for key, value in vars(rule).items() if value is not None]
    return [flag, type(rule).__name__, *given]


# -- equal to training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(RULES))
def test_the_runs_own_rule_gives_the_recorded_credit(trained, name):
    rule, segments, widest, turns = RULES[name], 0, 0.0, 0
    for record in read_records(trained(name)):
        again = recredit(record, rule, divergence=stands_in(rule, rule))
        for key in CREDIT_KEYS:
            torch.testing.assert_close(getattr(again, key), record.tensors[key], rtol=0, atol=1e-6, msg=key)
        segments += int((record.tensors["anchor"] >= 0).sum())
        widest = max(widest, float((record.tensors["weights"] - 1).abs().max()))
        turns = max(turns, int(record.tensors["turn_ids"].max()) + 1)
    # a rule without effect would prove nothing
    assert turns == 3
    assert widest > 0.05 or name == "uniform"
    assert segments or name not in ("gear-segments", "gear-reverse-kl", "turn")


@pytest.mark.parametrize("name", ["rlsd-actions", "kl-answer"])
def test_a_run_with_a_scope_weighs_only_its_tokens(trained, name):
    moved = {0: 0, REASONING: 0, CALL: 0}
    for record in read_records(trained(name)):
        t = record.tensors
        assert not t["parts"][~t["action_mask"]].any()
        for part in moved:
            tokens = t["action_mask"] & (t["parts"] == part)
            assert tokens.any()
            moved[part] += int((t["weights"][tokens] != 1).sum())
            if part == REASONING:
                assert torch.equal(t["token_advantages"][tokens], t["base_advantages"][tokens])
    assert [part for part, count in moved.items() if count] == ([CALL] if name == "rlsd-actions" else [0, CALL])


def test_records_of_earlier_versions_have_no_parts(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained("rlsd"), folder)
    for path in (folder / "rollouts").glob("*.safetensors"):
        tensors = load_file(path)
        del tensors["parts"]
        save_file(tensors, path)
    for old, new in zip(read_records(folder), read_records(trained("rlsd")), strict=True):
        assert torch.equal(old.tensors["parts"], torch.zeros_like(old.tensors["tokens"]))
        assert torch.equal(recredit(old, RLSD()).weights, recredit(new, RLSD()).weights)
    for where, name in (("answer", "reasoning"), ("actions", "tool calls")):
        with pytest.raises(UserError, match=f"RLSD.where='{where}'. weighs .* {name}, .* Leave out where={where}"):
            recredit_command([str(folder), "--credit", "RLSD", f"--credit.where={where}"])


def test_a_scope_is_recomputed_from_wider_records(trained, tmp_path, capsys):
    out = tmp_path / "found.json"
    run = str(trained("kl-answer"))
    assert recredit_command([run, "--credit", "RLSD", "--credit.where=actions", "--json", str(out)]) == 0
    assert "RLSD(where='actions')" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["check"]["differ"] == 0
    assert found["overall"]["changed"] > 0
    wide = GEAR(divergence="forward_kl", **SYMMETRIC)
    narrow = GEAR(divergence="forward_kl", where="actions", **SYMMETRIC)
    assert stands_in(narrow, RULES["kl-answer"])
    with pytest.raises(UserError, match=r"a divergence only for where=answer, .*; with where=answer it can"):
        stands_in(wide, RULES["kl-answer"])


def test_the_command_reports_that_the_runs_own_rule_gives_the_recorded_credit(trained, tmp_path, capsys):
    for name in ("gear-segments", "gear-reverse-kl", "sc-grpo", "token-jsd"):
        out = tmp_path / f"{name}.json"
        assert recredit_command([str(trained(name)), *arguments(RULES[name]), "--json", str(out)]) == 0
        text = capsys.readouterr().out
        assert "recomputed, gives the recorded weights" in text
        assert "no token's advantage differs" in text
        found = json.loads(out.read_text())
        assert found["check"]["tokens"] == found["overall"]["tokens"] > 0
        assert found["check"]["largest"] < 1e-6
        assert found["overall"]["changed"] == 0
        assert found["overall"]["rank_correlation"] in (None, pytest.approx(1))
        assert found["overall"]["moved"] == pytest.approx(0, abs=1e-6)
        anchors = found["overall"]["anchors"]
        assert (anchors["only_here"], anchors["only_there"]) == (0, 0)


def test_recomputed_credit_equals_training_with_the_other_rule(trained):
    """The first iteration's rollouts do not depend on the rule: the same weights, seeds and tasks."""
    rlsd, gear = (next(read_records(trained(name), [0])) for name in ("rlsd", "gear-segments"))
    assert torch.equal(rlsd.tensors["tokens"], gear.tensors["tokens"])
    again = recredit(gear, RULES["rlsd"])
    for key in CREDIT_KEYS:
        torch.testing.assert_close(getattr(again, key), rlsd.tensors[key], rtol=0, atol=1e-6, msg=key)
    back = recredit(rlsd, RULES["gear-segments"])
    torch.testing.assert_close(back.weights, gear.tensors["weights"], rtol=0, atol=1e-6)
    assert torch.equal(back.anchor, gear.tensors["anchor"])


def test_turn_advantages_and_rollouts_without_privileged_text(run):
    base = torch.tensor([[0.0] * 2 + [-0.5] * 4 + [0.0] * 2 + [1.0] * 3 + [0.0] * 2])
    add(run, fake_rollout(), base_advantages=base)
    credit = recredit(next(read_records(run)), RLSD())
    # log p_S - log p_T = place / 8 >= 0.25: exp(0.25) = 1.28 is clipped to 1.2 where A < 0, exp(-1) = 0.37 to 0.8
    # where A > 0; halfway to 1 is 1.1 and 0.9
    weights = torch.tensor([[1.0] * 2 + [1.1] * 4 + [1.0] * 2 + [0.9] * 3 + [1.0] * 2])
    torch.testing.assert_close(credit.weights, weights)
    torch.testing.assert_close(credit.token_advantages, weights * base)
    add(run, fake_rollout(), base_advantages=base, privileged=torch.zeros(1, dtype=torch.bool))
    assert (recredit(next(read_records(run)), RLSD()).weights == 1).all()


def test_a_run_of_the_command_line_is_recomputed_from_its_config_file(command, tmp_path):
    folder = tmp_path / "run"
    options = ["--model.credit.divergence=reverse_kl", "--model.credit.sign_rule=symmetric"]
    options += ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=5", "--first_evaluation.enabled=false"]
    assert command(*FIT, *options, "--trainer.default_root_dir", folder)[0] == 0
    status, out, _ = command("recredit", folder, "--credit", folder / "config.yaml", "--html")
    assert status == 0
    assert "divergence='reverse_kl', sign_rule='symmetric'), recomputed, gives the recorded weights" in out
    assert page_data((folder / "recredit.html").read_text())["rollouts"]
    status, out, _ = command("recredit", folder, "--credit", "configs/credit/rlsd.yaml", "--credit.clip", "0.1")
    assert status == 0
    assert out.startswith("here:  RLSD(clip=0.1)\nthere: the recorded credit\n")


# -- missing data in records ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rule", "message"),
    [
        ("gear", "SCGRPO", "compares full distributions (forward_kl on 100 tokens), and the records have only log-"),
        ("gear", SYMMETRIC | {"divergence": "jsd"}, "Train with it, or use a rule on sampled tokens: GEAR with"),
        ("sc-grpo", SYMMETRIC | {"divergence": "jsd"}, "only the forward_kl on 100 tokens (the run's rule is SCGRPO)"),
        ("token-jsd", SYMMETRIC | {"divergence": "jsd"}, "(jsd on 100 tokens), and the records have only the jsd on 7"),
        ("gear-reverse-kl", SYMMETRIC | {"divergence": "reverse_kl"}, "no divergence on the last 2 action tokens"),
        ("gear-reverse-kl", SYMMETRIC | {"divergence": "reverse_kl", "exclude_tail": 2, "exclude_stop": False},
         "no divergence on stop tokens, which GEAR(divergence='reverse_kl', sign_rule='symmetric', exclude_stop=False"),
        ("uniform", "RLSD", "no teacher scored these rollouts (its log-probs are zeros), and RLSD needs one"),
        ("uniform", {"kappa": 2.0}, "--model.credit GEAR --model.credit.mix 0 trains as plain GRPO does"),
    ],
)  # fmt: skip
def test_rules_that_need_missing_data_are_rejected(trained, name, rule, message):
    given = ["--credit", rule] if isinstance(rule, str) else ["--credit", "GEAR"]
    given += [] if isinstance(rule, str) else [f"--credit.{key}={value}" for key, value in rule.items()]
    with pytest.raises(UserError) as error:
        recredit_command([str(trained(name)), *given])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("file", "method"),
    [("mt_grpo", "data.advantage=MTGRPO"), ("gigpo", "data.advantage=GiGPO"), ("sdar", "model.distillation=SDAR")],
)
def test_a_file_without_a_credit_rule_is_rejected(trained, file, method, repository, monkeypatch):
    monkeypatch.chdir(repository)
    path = f"configs/credit/{file}.yaml"
    with pytest.raises(UserError, match=f"--credit {path}: its method is {method}, with the credit of GRPO"):
        recredit_command([str(trained("gear")), "--credit", path])


def test_the_recorded_divergence_replaces_only_the_same_divergence(trained):
    own = GEAR(divergence="forward_kl", exclude_stop=False, **SYMMETRIC)
    assert stands_in(SCGRPO(), own)  # it counts all tokens, as in the run
    assert stands_in(GEAR(divergence="forward_kl", kappa=0.5, exclude_tail=3, **SYMMETRIC), own)
    assert not stands_in(GEAR(), own)
    assert not stands_in(Uniform(), None)
    for other in (GEAR(divergence="forward_kl", **SYMMETRIC), None, GEAR(), SCGRPO(top_k_tokens=99), Uniform()):
        with pytest.raises(UserError, match="SCGRPO"):
            stands_in(SCGRPO(), other, "no file")
    # GEAR's weights from SC-GRPO's record equal those of a run that measured forward_kl itself
    record = next(read_records(trained("sc-grpo"), [0]))
    rule = GEAR(divergence="forward_kl", anchor_floor=0.0, **SYMMETRIC)
    found = recredit(record, rule, divergence=stands_in(rule, SCGRPO()))
    kept = record.tensors["action_mask"] & ~record.tensors["stop_mask"]
    assert torch.equal(found.divergence[kept], record.tensors["divergence"][kept])
    assert not found.divergence[~kept].any()
    assert (found.weights != 1).any()
    with pytest.raises(UserError, match="compares full distributions, and these rollouts have none"):
        recredit(record, rule)


def test_the_divergence_of_an_unknown_rule_replaces_no_other(trained, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(trained("sc-grpo"), folder)
    (folder / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"of an unknown rule \(.*config\.yaml: No such file"):
        recredit_command([str(folder), "--credit", "SCGRPO"])
    assert recredit_command([str(folder), "--credit", "RLSD"]) == 0
    assert "check: not possible, the run's own rule is not known" in capsys.readouterr().out


def test_a_rule_that_differs_from_config_yaml_is_reported(trained, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(trained("turn"), folder)
    (folder / "config.yaml").write_text("model: {credit: {class_path: gear_lightning.credit.RLSD, init_args: {}}}")
    assert recredit_command([str(folder), "--credit", "Uniform"]) == 0
    assert "RLSD, recomputed, gives other weights than recorded on" in capsys.readouterr().out


class Decided(CreditAssigner):
    """A user's own rule: weight 2 for right decisions, 0 for wrong ones, with its own segments."""

    needs_teacher = False
    needs_decisions = True

    def __call__(self, evidence):
        assert evidence.teacher is None
        return spread_credit(evidence, 1.0 + evidence.decisions, by_teacher=False)


def test_a_users_rule_by_import_path_with_decisions(trained, run, tmp_path, capsys):
    own = f"{__name__}.Decided"
    assert recredit_command([str(trained("uniform")), "--credit", own, "--json", str(tmp_path / "x.json")]) == 0
    record = next(read_records(trained("uniform"), [0]))
    wanted = torch.where(record.tensors["action_mask"], 1 + record.tensors["decisions"], 1).float()
    assert torch.equal(recredit(record, Decided()).weights, wanted)
    found = json.loads((tmp_path / "x.json").read_text())["overall"]["decisions"]
    assert found["wrong"] > 0
    assert found["right"] > 0
    assert found["auc"] == {"here": None, "there": None}  # neither measures a divergence
    assert found["blame"]["here"] == 0 < found["blame"]["there"]
    assert "decisions that the environment marks as wrong and right" in capsys.readouterr().out
    add(run, fake_rollout())
    with pytest.raises(UserError, match=r"Decided needs to know which decisions were right, but .* has recorded none"):
        recredit_command([str(run), "--credit", own])
    assert recredit_command([str(run), "--credit", "RLSD"]) == 0
    assert "decisions" not in capsys.readouterr().out


@dataclass(frozen=True)
class Unmade(CreditAssigner):
    """Raises in its constructor."""

    def __post_init__(self):
        raise RuntimeError("no such table")

    def __call__(self, evidence): ...


class Raises(CreditAssigner):
    """Raises when it is called."""

    def __call__(self, evidence):
        return {}["no such key"]


class Nothing(CreditAssigner):
    """Returns None."""

    def __call__(self, evidence): ...


class Narrow(CreditAssigner):
    """Omits the last token."""

    def __call__(self, evidence):
        found = spread_credit(evidence, torch.ones(evidence.action_mask.shape))
        return replace(found, weights=found.weights[:, 1:])


@dataclass(frozen=True)
class Odd(CreditAssigner):
    """One weight, of the sampled token 8 in every rollout, is not finite."""

    weight: float = float("nan")

    def __call__(self, evidence):
        weights = torch.ones(evidence.action_mask.shape)
        weights[:, 8] = self.weight
        weights[:, 0] = torch.nan  # of a prompt token, which does not count
        return spread_credit(evidence, weights)


@pytest.mark.parametrize("weight", ["nan", "inf"])
def test_non_finite_credit_is_rejected(run, weight, tmp_path):
    add(run, fake_rollout(rollout=4), iteration=6)
    out = tmp_path / "x.json"
    for rule in (["--credit", f"{__name__}.Odd", f"--credit.weight=.{weight}"],
                 ["--credit", "RLSD", "--against", f"{__name__}.Odd", f"--against.weight=.{weight}"]):  # fmt: skip
        with pytest.raises(UserError) as error:
            recredit_command([str(run), *rule, "--json", str(out), "--html"])
        wanted = "gives rollout 4 of task doors/1 of iteration 6, rank 0 weights that are not finite: "
        assert f"{wanted}{weight} on token 8, the first of 1" in str(error.value)
        assert str(error.value).startswith("Odd(weight=")
    assert not out.exists()
    assert not (run / "recredit.html").exists()


# -- figures ----------------------------------------------------------------------------------------------------------


def test_rank_correlation_variation_and_auc_by_hand():
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]
    # 1 - 6 (0 + 1 + 1) / (3 (9 - 1)) = 0.5
    assert rank_correlation(torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 30, 20])) == pytest.approx(0.5)
    assert rank_correlation(torch.tensor([1.0, 2]), torch.ones(2)) is None
    # (|1/4 - 2/4| + |1/4 - 1/4| + |2/4 - 1/4|) / 2 = 1/4
    assert total_variation(torch.tensor([1.0, 1, 2]), torch.tensor([4.0, 2, 2])) == pytest.approx(0.25)
    assert total_variation(torch.tensor([1.0, 0]), torch.tensor([0.0, 1])) == 1
    assert total_variation(torch.zeros(2), torch.ones(2)) is None
    # three of the four pairs are in order and one is tied: 3.5 / 4
    assert auc(torch.tensor([2.0, 1]), torch.tensor([1.0, 0])) == pytest.approx(0.875)
    assert auc(torch.zeros(2), torch.zeros(3)) is None
    assert auc(torch.ones(2), torch.zeros(0)) is None
    assert first_wrong(torch.tensor([0, 1, -1, -1, 0, -1])).tolist() == [False, False, True, True, False, False]
    assert not first_wrong(torch.tensor([0, 1])).any()


def test_figures_match_naive_loops():
    torch.manual_seed(0)
    for _ in range(50):
        a, b = (torch.randint(0, 5, (9,)).float() for _ in range(2))
        x, y = ([sum(o < v for o in z) + (sum(o == v for o in z) + 1) / 2 for v in z] for z in (a.tolist(), b.tolist()))
        assert ranks(a).tolist() == x
        wanted = torch.corrcoef(torch.tensor([x, y], dtype=torch.double))[0, 1]
        found = rank_correlation(a, b)
        assert found == pytest.approx(float(wanted)) if wanted.isfinite() else found is None
        pairs = [(i > j) + (i == j) / 2 for i in a.tolist() for j in b.tolist()]
        assert auc(a, b) == pytest.approx(sum(pairs) / len(pairs))


def credits(record: Record, **there: torch.Tensor):
    """Return the recorded credit and another one."""
    return recorded_credit(record), recorded_credit(replace(record, tensors={**record.tensors, **there}))


def test_the_figures_of_one_rollout_by_hand(run):
    # ppAAAAooBBB: 7 action tokens 2-5 and 8-10, weights 1 .5 1.75 1.75 1 1 1, one segment of tokens 4 and 5, A = -0.5
    decisions = torch.tensor([[0, 0, 1, 0, -1, -1, 0, 0, -1, 0, 0, 0, 0]])
    add(run, fake_rollout(), decisions=decisions)
    record = next(read_records(run))
    anchor = torch.where(torch.arange(13) == 8, 8, -1)[None]
    anchor[0, 4] = 4
    t = fake_tensors()
    there = {"weights": torch.ones(1, 13), "token_advantages": torch.where(t["action_mask"], -0.5, 0.0),
             "divergence": -t["divergence"], "anchor": anchor}  # fmt: skip
    found = summary(compare(record, *credits(record, **there)))
    assert (found["rollouts"], found["tokens"]) == (1, 7)
    assert found["changed"] == pytest.approx(3 / 7)
    assert found["rank_correlation"] is None  # all weights there are 1
    # here 1 .5 1.75 1.75 1 1 1 of 8, there 1 of 7: |1/8 - 1/7| x 4 + |1/16 - 1/7| + 2 |7/32 - 1/7| = 2 x 0.151786
    assert found["moved"] == pytest.approx(0.151786, abs=1e-6)
    assert found["anchors"] == {"shared": 1, "only_here": 0, "only_there": 1}
    assert found["segments_per_rollout"] == {"here": 1, "there": 2}
    assert found["in_segments"] == {"here": pytest.approx(2 / 7), "there": pytest.approx(2 / 7)}
    # fifths of 7 tokens, floor(5 i / 7): 0 0 1 2 2 3 4
    assert found["weight_by_fifth"]["here"] == pytest.approx([0.75, 1.75, 1.375, 1, 1])
    assert found["weight_by_fifth"]["there"] == [1] * 5
    # divergence is 1/16 per place: wrong at 4, 5, 8, right at 2, so all pairs are in order here and none there
    assert found["decisions"]["auc"] == {"here": 1, "there": 0}
    assert (found["decisions"]["wrong"], found["decisions"]["right"]) == (3, 1)
    # the first wrong decision is tokens 4 and 5: 3.5 of 8, and 2 of 7
    assert found["decisions"]["blame"] == {"here": pytest.approx(3.5 / 8), "there": pytest.approx(2 / 7)}
    assert found["decisions"]["praise"] == {"here": None, "there": None}
    first, second, third = largest_changes(record, *credits(record, **there))
    assert (first.token, first.size, first.weights, first.advantages) == (4, 0.375, (1.75, 1), (-0.875, -0.5))
    assert (first.before, first.id, first.after) == ([10, 11, 12, 13], 14, [15, 16, 17, 18, 19, 20])
    assert (second.token, third.token, third.size) == (5, 3, 0.25)


def test_rollouts_and_iterations_are_pooled(run, tmp_path, capsys):
    for iteration, rank in ((0, 0), (0, 1), (4, 0)):
        add(run, fake_rollout(), iteration=iteration, rank=rank)
    out = tmp_path / "out.json"
    assert recredit_command([str(run), "--credit", "Uniform", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [(row["iteration"], row["rollouts"], row["tokens"]) for row in found["iterations"]] == [
        (0, 2, 14),
        (4, 1, 7),
    ]
    assert (found["overall"]["rollouts"], found["overall"]["tokens"]) == (3, 21)
    assert found["overall"]["changed"] == pytest.approx(3 / 7)
    assert found["overall"]["in_segments"] == {"here": 0, "there": pytest.approx(2 / 7)}
    assert found["overall"]["anchors"]["only_there"] == 3
    assert len(found["changes"]) == 9
    assert {c["page"] for c in found["changes"]} == {"i0.r0.0", "i0.r1.0", "i4.r0.0"}
    assert [c["text"].strip() for c in found["changes"][:6]] == ["red", "door"] * 3
    text = capsys.readouterr().out
    assert "-0.875 (1.75) -> -0.500 (1.00)   task: look please open▸ red◂ door it is locked I quit" in text
    assert "i0.r1.0: task doors/1, rollout 0, iteration 0, rank 1, token 4" in text
    for asked, iterations in (("4", [4]), ("1-7", [4]), ("0-4", [0, 4])):
        assert recredit_command([str(run), "--credit=Uniform", "--iterations", asked, "--json", str(out)]) == 0
        assert [row["iteration"] for row in json.loads(out.read_text())["iterations"]] == iterations


def test_two_rules_against_each_other(trained, tmp_path):
    folder, out = trained("gear-segments"), tmp_path / "out.json"
    recredit_command([str(folder), *arguments(RLSD()), *arguments(Turn(kappa=2.0), "--against"), "--json", str(out)])
    found = json.loads(out.read_text())
    pairs = [
        pair
        for record in read_records(folder)
        for pair in compare(record, recredit(record, RLSD()), recredit(record, Turn(kappa=2.0)))
    ]
    assert found["overall"] == json.loads(json.dumps(summary(pairs)))
    assert (found["credit"]["told"], found["against"]["told"]) == ("RLSD", "Turn(kappa=2.0)")
    turns = [rollout["turns"] for record in read_records(folder) for rollout in record.rollouts]
    assert found["overall"]["segments_per_rollout"] == {"here": 0, "there": pytest.approx(sum(turns) / len(turns))}


def test_the_page_shows_the_computed_credit(run, capsys):
    add(run, fake_rollout(row=None, reward=None), fake_rollout())
    record = next(read_records(run))
    credit = recredit(record, TokenOnly())
    assert not torch.equal(credit.weights, record.tensors["weights"])
    assert recredit_command([str(run), "--credit", "TokenOnly", "--html"]) == 0
    left, shown = page_data((run / "recredit.html").read_text())["rollouts"]
    mask = record.tensors["action_mask"]
    recorded, computed = shown["credits"]
    n = int(mask.sum())
    for found, weights in ((recorded, record.tensors["weights"]), (computed, credit.weights)):
        assert unpack(found["w"], n) == (weights[mask] * 1000).round().int().tolist()
    assert unpack(computed["a"], n) == (credit.token_advantages[mask] * 1000).round().int().tolist()
    assert "credits" not in left
    assert not (run / "credit_map.html").exists()


def test_the_page_of_two_rules_shows_them_first(run, browser):
    add(run, fake_rollout(), fake_rollout(rollout=1))
    add(run, fake_rollout(), iteration=1)
    args = [str(run), "--credit", "RLSD", "--html", "--json", str(run / "x.json")]
    assert recredit_command([*args, "--against", "TokenOnly"]) == 0
    place = json.loads((run / "x.json").read_text())["changes"][0]["page"]
    for address in ("", f"#{place}"):
        browser.open((run / "recredit.html").as_uri() + address)
        assert browser.js("data.sets") == ["recorded", "RLSD", "TokenOnly"]
        assert browser.js("[data.sets[state.left], data.sets[state.right]]") == ["TokenOnly", "RLSD"]
        assert browser.js("document.title") == f"Credit of {run.name} by RLSD against TokenOnly"
        assert browser.js("shownSets()") == [2, 1]
    assert browser.js("current.key") == place
    browser.choose("#s-left", "0")
    browser.open(browser.js("location.href"))
    assert browser.js("[data.sets[state.left], data.sets[state.right]]") == ["recorded", "RLSD"]
    assert recredit_command([*args, "--against", "RLSD"]) == 0  # the same rule twice also gives two sets
    assert page_data((run / "recredit.html").read_text())["sets"] == ["recorded", "RLSD", "RLSD (against)"]
    assert recredit_command(args) == 0
    browser.open((run / "recredit.html").as_uri())
    assert browser.js("[data.sets[state.left], data.sets[state.right]]") == ["recorded", "RLSD"]
    assert browser.js("document.title") == f"Credit of {run.name} by RLSD"
    assert browser.errors == []


def test_the_page_keeps_the_newest_rollouts(run):
    for iteration in range(3):
        add(run, *(fake_rollout(rollout=n) for n in range(750)), iteration=iteration)
    assert recredit_command([str(run), "--credit", "RLSD", "--html", str(run / "x.html")]) == 0
    page = page_data((run / "x.html").read_text())
    assert [sum(r["iteration"] == i for r in page["rollouts"]) for i in range(3)] == [0, 250, 750]
    assert page["left_out"] == 1250


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--credit names one rule: CREST, EGRSD, GEAR"),
        (["--credit", "GEAR", "--credit", "RLSD"], "--credit names one rule"),
        (["--credit", "GEER"], "--credit GEER: not a class of gear_lightning.credit; there are CREST, EGRSD, GEAR"),
        (["--credit", "GEAR", "--credit.kapa", "3"], "Option 'kapa' is not accepted"),
        (["--credit", "GEAR", "--credit.kappa", "x"], "Got value: x"),
        (["--credit", "GEAR", "--credit.clip", "-1"], "clip=-1.0 is outside"),
        (["--credit", "GEAR", "--credit.kappa"], "--credit.kappa: the value is missing"),
        (["--credit", "RLSD", "--against.kappa", "1"], "--against names one rule"),
        (["--credit", "collections.OrderedDict"], "not correspond to a subclass of CreditAssigner"),
        (["--credit", "no_such.Rule"], "No module named 'no_such'"),
        (["--credit", "no_such.yaml"], "no_such.yaml: No such file"),
        (["--credit", "configs/strategy/ddp.yaml"], "has no model.credit.class_path"),
        (["--credit", "RLSD", "--iterations", "5"], "has no records of them; it has 1, from 0 to 0"),
        (["--credit", "RLSD", "--iterations", "7-"], "must be one number, or a range"),
        (["--credit", "RLSD", "--html", "nowhere/x.html"], "the folder nowhere does not exist"),
        (["--credit", "RLSD", "--json", "nowhere/x.json"], "the folder nowhere does not exist"),
        (["--credit", "RLSD", "--html", "configs"], "configs is a folder; give a file in it"),
        (["--credit", "RLSD", "--json", "configs"], "configs is a folder; give a file in it"),
        (["--credit", "RLSD", "--json", "/proc/x.json"], "/proc/x.json cannot be written"),
        (["--credit", f"{__name__}.Unmade"], "--credit: RuntimeError: no such table"),
        (["--credit", f"{__name__}.Raises"], "Raises failed on iteration 0, rank 0: KeyError: 'no such key' (at "),
        (["--credit", "RLSD", "--against", f"{__name__}.Raises"], "Raises failed on iteration 0, rank 0: KeyError"),
        (["--credit", f"{__name__}.Nothing"], "Nothing returned NoneType for iteration 0, rank 0, expected a gear_"),
        (
            ["--credit", f"{__name__}.Narrow"],
            "Narrow returned weights [1, 12] for iteration 0, rank 0, expected [1, 13]",
        ),
    ],
)
def test_invalid_arguments_are_reported(run, args, message, repository, monkeypatch):
    monkeypatch.chdir(repository)
    add(run, fake_rollout())
    with pytest.raises(UserError) as error:
        recredit_command([str(run), *args])
    assert message in str(error.value)


def test_unreadable_records_are_reported(run):
    with pytest.raises(UserError, match="no rollout records"):
        recredit_command([str(run), "--credit", "RLSD"])
    add(run, fake_rollout(row=None))
    with pytest.raises(UserError, match="no rollout of these iterations has credit"):
        recredit_command([str(run), "--credit", "RLSD"])
    add(run, fake_rollout())
    tensors = run / "rollouts" / "iter_000000.rank_0.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"rank_0\.safetensors: cannot be read"):
        recredit_command([str(run), "--credit", "RLSD"])
    add(run, fake_rollout(format=1))
    with pytest.raises(UserError, match="record format 1"):
        recredit_command([str(run), "--credit", "RLSD"])


def test_inconsistent_files_are_reported(run):
    two = {name: x.repeat(2, *[1] * (x.dim() - 1)) for name, x in fake_tensors().items()}
    for iteration in range(2):
        rollouts = [fake_rollout(row=n, rollout=n, policy_version=iteration, group_id=3 * iteration) for n in range(2)]
        versions = {
            name: torch.full((2,), value)
            for name, value in (("policy_version", iteration), ("group_ids", 3 * iteration))
        }
        add(run, *rollouts, fake_rollout(row=None, group_id=9), iteration=iteration, **{**two, **versions})
    assert len(list(read_records(run))) == 2
    lines, tensors = (run / "rollouts" / f"iter_000001.rank_0.{kind}" for kind in ("jsonl", "safetensors"))
    text, content = lines.read_text(), tensors.read_bytes()
    ask = [str(run), "--credit", "RLSD"]
    for kept, message in ((0, r"no line refers to row 0 of .*\(2 of 2 rows have no"), (1, r"row 1 of .*\(1 of 2 rows")):
        lines.write_text("".join(text.splitlines(keepends=True)[:kept]))
        with pytest.raises(UserError, match=rf"iter_000001\.rank_0\.jsonl: .*{message}"):
            recredit_command(ask)
    lines.write_text(text)
    tensors.write_bytes(tensors.with_name("iter_000000.rank_0.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"iter_000001\.rank_0\.safetensors: row 0 has group_id 0, but .*jsonl:1 has 3"):
        recredit_command(ask)
    lines.write_text(text.replace('"group_id": 3', '"group_id": 0'))
    with pytest.raises(UserError, match=r"safetensors: row 0 has policy_version 0, but .*jsonl:1 has 1: these files"):
        recredit_command(ask)
    tensors.write_bytes(content)
    lines.write_text(text.replace('"row": 1', '"row": 7'))
    with pytest.raises(UserError, match=r"jsonl:2: refers to row 7, but .*safetensors has 2 rows"):
        recredit_command(ask)


# -- untrusted files --------------------------------------------------------------------------------------------------


def test_a_runs_config_imports_nothing(run, tmp_path, monkeypatch, capsys):
    mark = tmp_path / "mark"
    source = f"open({str(mark)!r}, 'w')\nfrom gear_lightning.credit import RLSD\nclass Evil(RLSD): pass\n"
    (tmp_path / "evil_rule.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    add(run, fake_rollout())
    config = run / "config.yaml"
    inner = "{class_path: evil_rule.Evil, init_args: {}}"
    for text in (
        f"model: {{credit: {inner}}}",
        f"model: {{credit: {{class_path: gear_lightning.credit.GEAR, init_args: {{kappa: {inner}}}}}}}",
        "model: {credit: {class_path: gear_lightning.credit.evil_rule.Evil}}",
        "model: {credit: {class_path: gear_lightning.credit.base.dataclass, init_args: {}}}",
        "model: {credit: !!python/object/apply:evil_rule.Evil []}",
    ):
        config.write_text(text)
        assert recredit_command([str(run), "--credit", "RLSD"]) == 0
        assert "check: not possible, the run's own rule is not known" in capsys.readouterr().out
        with pytest.raises(UserError, match=r"is in the run directory and names|config\.yaml|kappa"):
            recredit_command([str(run), "--credit", str(config)])
    assert not mark.exists()
    config.write_text(f"model: {{credit: {inner}}}")  # named by the user: imported, and recognized as the run's
    assert recredit_command([str(run), "--credit", "evil_rule.Evil"]) == 0
    assert "the run's own rule, Evil, recomputed" in capsys.readouterr().out
    assert mark.exists()


@pytest.mark.parametrize(
    "options",
    ["[1]", "{1: 2}", "{kappa: x}", "{segment_max: 1000000000000000000000000}", "{sign_rule: evil}", "{kapa: 1}",
     "{anchor_floor: .nan}", "{entropy: 5}", "{divergence: x}", "{clip: '\\e[2J'}"],
)  # fmt: skip
def test_an_invalid_run_config_only_skips_the_check(run, options, capsys):
    add(run, fake_rollout(task_id="\x1b]0;owned\x07"))
    text = f"model: {{credit: {{class_path: gear_lightning.credit.GEAR, init_args: {options}}}}}"
    (run / "config.yaml").write_text(text)
    assert recredit_command([str(run), "--credit", "TokenOnly"]) == 0
    out = capsys.readouterr().out
    assert "check: " in out
    assert "\x1b" not in out
    assert "⟨U+001B⟩]0;owned" in out


@pytest.mark.parametrize(
    "text", ["[" * 10_000, "a: &a [*a]", "\x00", "- 1", "model: 3", "\ud800".encode("utf-8", "replace").decode()]
)
def test_any_unreadable_config_gives_an_unknown_rule(run, text, capsys):
    add(run, fake_rollout())
    (run / "config.yaml").write_text(text)
    assert recredit_command([str(run), "--credit", "RLSD"]) == 0
    shown = capsys.readouterr()
    assert "check: not possible" in shown.out
    assert shown.err.startswith("gear-lightning: warning: the run's own rule is not known, so the recomputation ")
    assert f"({run}/config.yaml: " in shown.err
    assert shown.err.count("\n") == 1


def test_missing_numbers_are_shown(run, tmp_path, capsys):
    weights, anchor = torch.full((1, 13), torch.nan), torch.full((1, 13), 10**12)
    shape = {"weights": weights, "token_advantages": torch.full((1, 13), torch.inf), "anchor": anchor}
    add(run, fake_rollout(), **shape, teacher_logprobs=torch.full((1, 13), torch.nan))
    (run / "config.yaml").write_text("model: {credit: {class_path: gear_lightning.credit.GEAR, init_args: {}}}")
    assert recredit_command([str(run), "--credit", "Uniform", "--html", "--json", str(tmp_path / "x.json")]) == 0
    json.loads((tmp_path / "x.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    told_from = r"RLSD gives .* weights that are not finite: nan on .*\(so are the recorded teacher_logprobs\)"
    with pytest.raises(UserError, match=told_from):
        recredit_command([str(run), "--credit", "RLSD"])


def test_the_text_of_a_rule_shows_options_that_differ_from_the_defaults():
    assert told(GEAR(kappa=2.0, segment_end="turn")) == "GEAR(segment_end='turn', kappa=2.0)"
    assert told(Uniform()) == "Uniform"
    assert told(Decided()) == "Decided"
