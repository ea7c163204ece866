"""Studies: their plans, that runs are executed once and survive a kill, and that the numbers are correct."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkout import ROOT
from deadlines import seconds, until

from gear_lightning.commands.study import study_command
from gear_lightning.errors import UserError
from gear_lightning.recipes.rule_options import caveat, caveat_of_run
from gear_lightning.runs.files import hold
from gear_lightning.study.plan import Study
from gear_lightning.study.report import arm_table, draw, label, tables
from gear_lightning.study.results import Curves, analyse, collect
from gear_lightning.study.runner import _digests, carry_out, is_done, least_used, start_context, visible_gpus
from gear_lightning.study.statistics import ratio_of_means
from gear_lightning.study.tables import markdown

LR = "model.optimizer.init_args.lr"
QUICK = {
    "trainer.max_epochs": 2,
    "trainer.check_val_every_n_epoch": 1,
    "data.tasks_per_iteration": 2,
    "data.group_size": 2,
    "data.val_limit": 8,
    "warm_start.steps": 2,
    "warm_start.batch_size": 2,
    "model.policy.init_args.hidden_size": 32,
    "model.policy.init_args.layers": 1,
    "noise_floor.tokens": 0,
}


def plan(out: Path, **options) -> Study:
    options = {
        "recipe": [str(ROOT / "configs/quickstart.yaml")],
        "arms": {
            "GRPO": {"config": str(ROOT / "configs/credit/grpo.yaml")},
            "GEAR": {"config": str(ROOT / "configs/credit/gear.yaml"), "model.credit.init_args.kappa": 2.0},
        },
        "grid": {LR: [0.0003, 0.001]},
        "options": QUICK,
        "per_seed": {"data.seed": "{seed}", "warm_start.demonstrations.init_args.seed": "{block}"},
        "seeds": 2,
        "blocks": 2,
        "out": str(out),
        **options,
    }
    return Study(**options)


def test_every_arm_is_crossed_with_every_point_and_seed(tmp_path):
    study = plan(tmp_path, seeds=3)
    runs = study.runs
    assert len(runs) == len({run.folder for run in runs}) == 2 * 2 * 3
    assert [run.block for run in runs] == [0] * 4 + [1] * 4 + [0] * 4
    run = next(run for run in runs if (run.arm, run.point, run.seed) == ("GEAR", (0.001,), 2))
    assert run.folder == tmp_path / "runs" / "GEAR" / "0.001" / "seed_02"
    assert run.arguments[:3] == [
        "fit",
        f"--config={ROOT / 'configs/quickstart.yaml'}",
        f"--config={ROOT / 'configs/credit/gear.yaml'}",
    ]
    for option in ("--data.seed=2", "--warm_start.demonstrations.init_args.seed=0", f"--{LR}=0.001"):
        assert option in run.arguments
    assert "--model.credit.init_args.kappa=2.0" in run.arguments
    assert run.arguments[-1] == f"--trainer.default_root_dir={run.folder}"
    streams = {r.seed: [o for o in r.options if "seed" in o] for r in runs}
    for run in runs:  # options for tasks and sampling depend on the seed, not on the arm
        assert [o for o in run.options if "seed" in o] == streams[run.seed]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"seeds": 0}, "seeds=0 must be at least 1"),
        ({"baseline": "PPO"}, "baseline=PPO is not one of the arms: GRPO, GEAR"),
        ({"ceiling": "Oracle"}, "ceiling=Oracle is not one of the arms"),
        ({"ceiling": "GRPO"}, "ceiling=GRPO is the baseline"),
        (
            {"options": {"config": "configs/credit/gear.yaml"}},
            "options: config would stack a file on top of the arms' files",
        ),
        ({"arms": {"GRPO": {}, "../x": {}}}, "'../x' cannot name a folder"),
        ({"grid": {LR: []}}, "grid: .*lr has no values"),
        ({"recipe": ["configs/none.yaml"]}, "configs/none.yaml: no such file"),
        ({"arms": {"GRPO": {"config": ["no.yaml"]}}}, "no.yaml: no such file"),
        ({"per_seed": {"data.seed": "{seed}{number}"}}, "may contain only {seed} and {block}"),
        ({"per_seed": {"data.seed": "1"}}, "all seeds would give the same run"),
        ({"grid": {LR: [1e-3, 0.001]}}, "has the same value twice"),
        ({"options": {"trainer": {"max_epochs": 5}}}, "options: trainer is a mapping; write options as in"),
        ({"threshold": float("nan")}, "threshold=nan must be a number"),
        ({"collapse": -3.0}, "collapse=-3.0 must lie between 0 and 1"),
        ({"arms": {}}, "needs a recipe and arms"),
        ({"arms": {"GRPO": {}, "Sure": {"data.seed": 7}}}, "arms: Sure: data.seed is set by per_seed, for all runs"),
        ({"arms": {"GRPO": {}, "Fast": {LR: 1.0}}}, "arms: Fast: .*lr is set by grid"),
        ({"options": {LR: 1.0}}, "options: .*lr is set by grid"),
        ({"grid": {"data.seed": [1, 2]}}, "per_seed and grid both set data.seed"),
    ],
)
def test_invalid_plans_are_rejected(tmp_path, options, error):
    with pytest.raises(UserError, match=error):
        plan(tmp_path, **options)


# numbers --------------------------------------------------------------------------------------------------------------


def by_hand(tmp_path, values: dict[str, list[list[list[float]]]], **options) -> tuple[Curves, dict]:
    """Return the results of curves [points, seeds, steps] at steps 0, 10, 20."""
    points, seeds = len(next(iter(values.values()))), len(next(iter(values.values()))[0])
    options = {"grid": {LR: [0.1 * (p + 1) for p in range(points)]}, "seeds": seeds, **options}
    study = plan(tmp_path, arms={arm: {} for arm in values}, **options)
    curves = Curves(
        list(values), study.points, list(range(seeds)), np.array([0.0, 10, 20]), np.array(list(values.values()))
    )
    return curves, analyse(study, curves)


def test_means_differences_and_headroom_by_hand(tmp_path):
    # trapezoid means over 0..20 of (a, b, c): (a/2 + b + c/2) / 2
    values = {
        "GRPO": [[[0.2, 0.4, 0.4], [0.2, 0.5, 0.6]]],  # (.1 + .4 + .2)/2 = .35 and (.1 + .5 + .3)/2 = .45
        "GEAR": [[[0.2, 0.5, 0.6], [0.2, 0.6, 0.8]]],  # .45 and (.1 + .6 + .4)/2 = .55
        "Oracle": [[[0.2, 0.7, 0.8], [0.2, 0.8, 1.0]]],  # (.1 + .7 + .4)/2 = .6 and (.1 + .8 + .5)/2 = .7
    }
    _, results = by_hand(tmp_path, values, ceiling="Oracle", threshold=0.6)
    assert results["arms"]["GRPO"]["mean"]["iqm"] == pytest.approx(0.4)
    assert results["paired"]["GEAR"]["all"]["mean"] == pytest.approx(0.1)
    assert results["paired"]["Oracle"]["all"]["mean"] == pytest.approx(0.25)
    assert results["headroom"]["all"]["there"]
    assert results["headroom"]["all"]["shares"]["GEAR"] == pytest.approx(0.4)
    # both seeds gain 0.1 of 0.25: an interval without width
    assert results["headroom"]["all"]["intervals"]["GEAR"] == pytest.approx((0.4, 0.4))
    table = arm_table(results)
    head, body = table.columns, table.rows
    shares = [row[head.index("share of the headroom")] for row in body]
    assert shares == ["", "40% [40%, 40%]", "100%"]
    assert results["headroom"]["best"] == results["headroom"]["all"]  # there is one point
    assert results["arms"]["GEAR"]["to_threshold"] == 10.0  # the lower of 20 and 10
    assert results["arms"]["GRPO"]["to_threshold"] == 20.0  # the lower of 20 and never
    assert results["arms"]["GRPO"]["reached"] == 0.5
    assert by_hand(tmp_path, values, threshold=0.7)[1]["arms"]["GRPO"]["to_threshold"] is None
    assert results["paired"]["GEAR"]["all"]["test"] == {"wins": 2, "losses": 0, "ties": 0, "p": 0.5}
    assert results["paired"]["GEAR"]["all"]["holm"] == 1.0  # 0.5, for two arms
    json.dumps(results, allow_nan=False)


def test_a_share_has_fiellers_interval_over_paired_seeds(tmp_path):
    """Reference: the ratio of the gains' means, from curves whose mean is half of their middle value."""
    rng = np.random.default_rng(0)
    middle = {arm: rng.normal(mean, 0.05, 6) for arm, mean in (("GRPO", 0.2), ("GEAR", 0.5), ("Oracle", 0.7))}
    values = {arm: [[[0.0, x, 0.0] for x in xs]] for arm, xs in middle.items()}
    _, results = by_hand(tmp_path, values, ceiling="Oracle")
    expected = ratio_of_means(middle["GEAR"] - middle["GRPO"], middle["Oracle"] - middle["GRPO"])
    told = results["headroom"]["all"]
    assert told["shares"]["GEAR"] == pytest.approx(expected.ratio)
    assert told["intervals"]["GEAR"] == pytest.approx(expected.interval)
    assert told["gain"] == pytest.approx(results["paired"]["Oracle"]["all"]["mean"])
    assert told["low"] == pytest.approx(results["paired"]["Oracle"]["all"]["low"])


def test_the_report_names_what_the_arms_rules_lack(tmp_path):
    same = [[[0.2, 0.4, 0.4], [0.2, 0.5, 0.6]]]
    _, results = by_hand(tmp_path, {"GRPO": same, "EGRSD": same})
    assert "in the style of" not in markdown(tables(results))
    told = caveat("gear_lightning.credit.token_rules.EGRSD")
    assert "EGRSD is in the style of its paper, and lacks the paper's formula" in told
    assert told in markdown(tables({**results, "caveats": [told]}))
    assert caveat("gear_lightning.credit.GEAR") == caveat("my_rules.EGRSD") == caveat(None) == ""
    for text, expected in (("gear_lightning.credit.TurnSight", "and lacks the comparison with the group"), ("x.Y", "")):
        (tmp_path / "config.yaml").write_text(f"model: {{credit: {{class_path: {text}}}}}\n")
        assert expected in caveat_of_run(tmp_path)
    assert caveat_of_run(tmp_path / "nowhere") == ""


def test_no_headroom_gives_no_shares(tmp_path):
    same = [[[0.2, 0.4, 0.4], [0.2, 0.5, 0.6]]]
    worse = [[[0.2, 0.4, 0.5], [0.2, 0.5, 0.4]]]
    _, results = by_hand(tmp_path, {"GRPO": same, "Oracle": worse}, ceiling="Oracle")
    assert not results["headroom"]["all"]["there"]
    assert results["headroom"]["all"]["shares"] == results["headroom"]["all"]["intervals"] == {"Oracle": None}
    table = arm_table(results)
    head, body = table.columns, table.rows
    assert body[1][head.index("share of the headroom")] == "headroom not certain"


def test_one_seed_gives_no_statement_about_headroom(tmp_path):
    values = {"GRPO": [[[0.2, 0.4, 0.4]]], "Oracle": [[[0.2, 0.6, 0.8]]]}
    _, results = by_hand(tmp_path, values, ceiling="Oracle")
    assert results["headroom"]["all"]["there"] is None
    table = arm_table(results)
    head, body = table.columns, table.rows
    assert body[1][head.index("share of the headroom")] == "unknown"


def test_seeds_that_share_a_warm_start_are_reported(tmp_path):
    flat = [0.2, 0.2, 0.2]
    values = {"GRPO": [[flat] * 4], "GEAR": [[[0.2, 0.2 + gain, 0.2] for gain in (0.2, 0.0, 0.4, 0.2)]]}
    _, results = by_hand(tmp_path, values, blocks=2)
    # half of the gain at the middle step: 0.1 and 0.2 for the first warm start, 0 and 0.1 for the second
    assert results["blocks"] == {"seeds": [2, 2], "gains": {"GEAR": pytest.approx([0.15, 0.05])}}
    assert "4 seeds begin with 2 sets of weights" in (told := markdown(tables(results)))
    assert "| GEAR | +0.150 | +0.050 |" in told
    assert "begin with the same weights" in markdown(tables(by_hand(tmp_path, values, blocks=1)[1]))
    assert "begin with" not in markdown(tables(by_hand(tmp_path, values, blocks=4)[1]))


def test_a_seeds_runs_at_all_points_are_resampled_together(tmp_path):
    """Four copies of a point contain no more information about the seeds than one."""
    point = [[0.2, 0.1 * seed, 0.3] for seed in range(4)]
    widths = []
    for points in (1, 4):
        _, results = by_hand(tmp_path, {"GRPO": [point] * points})
        told = results["arms"]["GRPO"]["mean"]
        widths.append(told["high"] - told["low"])
    assert widths[1] == pytest.approx(widths[0], rel=0.2)


def test_an_arm_without_segments_has_no_auc_for_them(tmp_path):
    same = [[[0.2, 0.4, 0.4], [0.2, 0.5, 0.6]]]
    _, results = by_hand(tmp_path, {"GRPO": same, "TokenOnly": same})
    told = {"divergence": 0.9, "segment": None, "first_wrong": 3, "right": 4}
    assert "| TokenOnly | 15 | 0.900 | - | 3 |" in markdown(tables({**results, "onset": {"TokenOnly": {"15": told}}}))


def test_each_arm_has_its_own_best_point(tmp_path):
    low, high = [[0.2, 0.2, 0.2], [0.2, 0.2, 0.2]], [[0.2, 0.8, 0.8], [0.2, 0.8, 0.8]]
    _, results = by_hand(tmp_path, {"GRPO": [low, high], "GEAR": [high, low]})
    assert results["best_point"] == {"GRPO": 1, "GEAR": 0}
    assert results["headroom"] is None
    top = [[0.2, 1.0, 1.0], [0.2, 1.0, 1.0]]
    _, results = by_hand(tmp_path, {"GRPO": [low, high], "GEAR": [high, low], "Oracle": [low, top]}, ceiling="Oracle")
    assert results["headroom"]["best"]["gain"] == pytest.approx(0.8 - 0.65)
    assert results["headroom"]["best"]["shares"] == {"GEAR": pytest.approx(0.0), "Oracle": pytest.approx(1.0)}
    assert results["paired"]["GEAR"]["best"]["mean"] == pytest.approx(0)
    assert results["paired"]["GEAR"]["all"]["mean"] == pytest.approx(0)
    assert [p["mean"] for p in results["paired"]["GEAR"]["points"]] == pytest.approx([0.45, -0.45])
    assert label(results, 1) == "lr 0.2"
    assert markdown(tables(results)).count("| lr 0.1 |") == 2


def test_collapse_is_relative_to_the_best_value(tmp_path):
    values = {"GRPO": [[[0.2, 0.8, 0.1], [0.2, 0.3, 0.3]]], "GEAR": [[[0.2, 0.3, 0.3], [0.2, 0.3, 0.3]]]}
    _, results = by_hand(tmp_path, values)
    assert (results["arms"]["GRPO"]["collapsed"], results["arms"]["GEAR"]["collapsed"]) == (0.5, 0.0)


# runs -----------------------------------------------------------------------------------------------------------------


def command(python: str, config: Path, *more: str) -> list[str]:
    return [python, "-m", "gear_lightning", "study", "--config", str(config), *more]


@pytest.fixture(scope="module")
def carried(quick, tmp_path_factory):
    """Return a study that was killed in the middle and then resumed."""
    from dataclasses import asdict

    from gear_lightning.runs.files import replace_text

    folder = tmp_path_factory.mktemp("study")
    study = plan(folder / "out", jobs=2)
    replace_text(folder / "study.json", json.dumps(asdict(study)))
    env = {**os.environ, "GEAR_LIGHTNING_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(
        command(quick.executable, folder / "study.json"), env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    for line in first.stdout:
        if line.startswith("[2/8]"):
            break
    first.send_signal(signal.SIGINT)
    told = first.stdout.read()
    first.wait(seconds(120))
    kept = {run.folder: (run.folder / "metrics.csv").stat().st_mtime for run in study.runs if is_done(run)}
    second = subprocess.run(
        command(quick.executable, folder / "study.json"), env=env, cwd=ROOT, capture_output=True, text=True
    )
    return study, first.returncode, told, kept, second


def test_a_stopped_study_resumes(carried):
    study, status, told, kept, second = carried
    assert status == 130
    assert f"stopped; {len(kept)} of 8 runs are done" in told
    assert 2 <= len(kept) < 8
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"8 runs, {len(kept)} of them done" in second.stdout
    for folder, time_written in kept.items():
        assert (folder / "metrics.csv").stat().st_mtime == time_written, "a finished run was repeated"
    assert all(is_done(run) for run in study.runs)
    out = Path(study.out)
    assert {p.name for p in out.iterdir()} >= {
        "study.json", "results.json", "curves.csv", "report.md", "curves.png", "differences.png"
    }  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    assert (results["seeds"], len(results["points"])) == (2, 2)
    assert len((out / "curves.csv").read_text().splitlines()) == 1 + 8 * len(results["steps"])


def test_runs_of_a_seed_have_the_same_beginning_and_differ_only_in_credit(carried):
    study, *_ = carried
    curves = collect(study, study.runs)
    assert curves.values.shape == (2, 2, 2, 3)
    assert (curves.values[..., 0] == curves.values[:1, :1, :, 0]).all(), "warm starts or validation tasks differ"
    firsts = {}
    for run in study.runs:
        record = json.loads((run.folder / "rollouts/iter_000000.rank_0.jsonl").read_text().splitlines()[0])
        firsts.setdefault(run.seed, set()).add(json.dumps(record["messages"]))
    assert all(len(told) == 1 for told in firsts.values()), "the first rollouts of a seed are not the same"
    assert len(set.union(*firsts.values())) == 2, "the seeds do not differ"


def test_another_study_cannot_use_the_folder(carried):
    study, *_ = carried
    other = replace(study, options={**QUICK, "trainer.max_epochs": 3})
    with pytest.raises(
        UserError, match=r"was run with --trainer.max_epochs=2, but this study has --trainer.max_epochs=3"
    ):
        [is_done(run) for run in other.runs]


def test_a_failed_arm_is_omitted_and_one_with_another_beginning_is_named(carried):
    study, *_ = carried
    with_third = replace(study, arms={**study.arms, "Third": {}})
    curves = collect(with_third, study.runs)
    assert curves.arms == ["GRPO", "GEAR"]
    assert analyse(with_third, curves)["left_out"] == ["Third"]
    with pytest.raises(UserError, match="nothing can be paired"):
        collect(study, [run for run in study.runs if run.arm == "GEAR"])
    assert analyse(study, curves)["begin_elsewhere"] == []
    other = Curves(curves.arms, curves.points, curves.seeds, curves.steps, curves.values.copy())
    other.values[1, 0, 0, 0] += 0.5
    assert analyse(study, other)["begin_elsewhere"] == ["GEAR"]


def test_a_template_with_braces_is_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    file, template = tmp_path / "study.yaml", "\n\n{reference}"
    told = {"recipe": ["configs/quickstart.yaml"], "arms": {"GRPO": {}, "GEAR": {"model.teacher.template": template}}}
    told["options"] = {"trainer.max_epochs": 2, "model.optimizer.init_args.lr": 3.0e-4}
    file.write_text(json.dumps({**told, "seeds": 1}))
    assert study_command(["--config", str(file), "--plan"]) == 0
    said = shlex.split(capsys.readouterr().out)
    assert f"--model.teacher.template={template}" in said
    assert {"--trainer.max_epochs=2", f"--{LR}=0.0003"} <= set(said)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"model.credit.init_args.kapa": 2.0}, r"(?s)^GEAR 0\.0003: .*kapa"),
        ({"model.credit": "Geer"}, r"(?s)^GEAR 0\.0003: .*Geer"),
        ({"model.credit.init_args.kappa": -1.0}, r"(?s)^GEAR 0\.0003: .*kappa"),
        ({"model.objective": None}, r"(?s)^GEAR 0\.0003: "),
        ({"warm_start.stepps": 2}, r"(?s)^GEAR 0\.0003: .*stepps"),
    ],
)
def test_an_invalid_arm_is_reported_before_the_first_run(tmp_path, options, told):
    arms = {"GRPO": {"config": str(ROOT / "configs/credit/grpo.yaml")}, "GEAR": options}
    study = plan(tmp_path / "out", arms=arms)
    with pytest.raises(UserError, match=told) as error:
        carry_out(study.runs, 2, lambda run: None)
    assert len(str(error.value)) < 1000
    assert not Path(study.out, "runs").exists()


def test_studies_and_runs_lock_their_folders(carried, monkeypatch):
    study, *_ = carried
    monkeypatch.chdir(ROOT)
    file = Path(study.out).parent / "study.json"
    with hold(Path(study.out) / ".lock", ""), pytest.raises(UserError, match="another study is running there"):
        study_command(["--config", str(file)])
    run = study.runs[0]
    (run.folder / "status.json").rename(run.folder / "aside")
    try:
        with hold(run.folder / ".lock", ""), pytest.raises(UserError, match="a process is still training there"):
            study_command(["--config", str(file)])
    finally:
        (run.folder / "aside").rename(run.folder / "status.json")


def test_a_missing_metric_is_reported_before_further_runs(carried, monkeypatch):
    study, *_ = carried
    monkeypatch.chdir(ROOT)
    file = Path(study.out).parent / "study.json"
    with pytest.raises(UserError, match=r"metric=train/lossy was measured at fewer than two steps .*train/loss"):
        study_command(["--config", str(file), "--metric", "train/lossy", "--seeds", "3"])


def test_runs_end_if_their_study_is_killed(quick, tmp_path):
    from dataclasses import asdict

    study = plan(tmp_path / "out", options={**QUICK, "trainer.max_epochs": 10_000}, seeds=1, jobs=2, blocks=1)
    (tmp_path / "study.json").write_text(json.dumps(asdict(study)))
    env = {**os.environ, "GEAR_LIGHTNING_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(
        command(quick.executable, tmp_path / "study.json"), env=env, cwd=ROOT, stdout=subprocess.DEVNULL
    )
    status = study.runs[0].folder / "status.json"
    until(status.exists, "the start of the first run", limit=300)
    process = json.loads(status.read_text())["process"]
    killed.kill()
    killed.wait()
    until(lambda: not Path(f"/proc/{process}").exists(), "a run outlived its study")


def test_closing_the_pipe_of_a_printed_plan_is_not_an_error(quick, tmp_path):
    plan_command = command(quick.executable, ROOT / "configs/study/credit.yaml", "--seeds", "100", "--plan", "true")
    reading = subprocess.Popen(plan_command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert reading.stdout is not None
    assert reading.stderr is not None
    assert reading.stdout.readline().startswith("gear-lightning fit --config=configs/study/lookup_chain.yaml")
    reading.stdout.close()
    assert reading.stderr.read() == ""
    assert reading.wait(seconds(120)) == 141


def test_runs_with_gpus_are_spawned_and_share_the_gpus_evenly(tmp_path, monkeypatch):
    monkeypatch.setenv("GEAR_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("gear_lightning.study.runner.visible_gpus", lambda: ["4", "6"])
    options = {**QUICK, "generation.environment": "tiny_runs.TellsGPU"}
    study = plan(tmp_path / "out", grid={}, seeds=1, blocks=1, options=options)
    assert not carry_out(study.runs, 2, lambda run: None)
    seen = [set(re.findall(r"sees GPU (\w+)\.", (run.folder / "log.txt").read_text())) for run in study.runs]
    assert all(len(gpus) == 1 and gpus <= {"4", "6"} for gpus in seen), seen
    assert start_context([]).get_start_method() == "forkserver"
    assert start_context(["0"]).get_start_method() == "spawn"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6,7")
    for count, names in ((0, []), (2, ["4", "6"])):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        assert visible_gpus() == names
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus() == ["0", "1"]
    assert least_used(["4", "6"], []) == "4"
    assert least_used(["4", "6"], ["4"]) == "6"
    assert least_used(["4", "6"], ["4", "6", "4"]) == "6"
    assert least_used([], []) is None


@pytest.fixture
def copied(carried, tmp_path):
    """Return a finished study that a test may damage, and its file."""
    from dataclasses import asdict

    study = replace(carried[0], out=str(tmp_path / "out"))
    shutil.copytree(carried[0].out, study.out)
    file = tmp_path / "study.json"
    file.write_text(json.dumps(asdict(study)))
    return study, file


def test_a_changed_configuration_file_is_named(carried, copied, tmp_path, monkeypatch):
    study, _ = copied
    recipe = tmp_path / "recipe.yaml"
    text = (ROOT / "configs/quickstart.yaml").read_text()
    run = replace(study.runs[0], options=tuple(o.replace(study.recipe[0], str(recipe)) for o in study.runs[0].options))
    recipe.write_text(text)
    plan = {"options": list(run.options), "files": _digests(run)}
    (run.folder / "run.json").write_text(json.dumps(plan))
    assert is_done(run)
    recipe.write_text(f"# a comment\n{text}")
    assert is_done(run)
    recipe.write_text(text.replace("max_epochs: ", "max_epochs: 1"))
    with pytest.raises(UserError, match=r"was run with another version of .*recipe.yaml"):
        is_done(run)


@pytest.mark.parametrize(("name", "content"), [("status.json", '{"pha'), ("status.json", "[]"), ("run.json", "[1]")])
def test_a_run_with_damaged_files_is_set_aside_and_repeated(copied, name, content, monkeypatch, capsys):
    study, _ = copied
    run, before = study.runs[0], {p.name for p in study.runs[0].folder.iterdir()}
    (run.folder / name).write_text(content)
    assert not is_done(run)
    started = []

    class Ended:
        sentinel, gpu, exitcode = os.open(os.devnull, os.O_RDONLY), None, 3

        def join(self, *_): ...

    monkeypatch.setattr("gear_lightning.study.runner._start", lambda context, run, gpu: started.append(run) or Ended())
    monkeypatch.setattr("gear_lightning.study.runner.wait", lambda active, timeout: active)
    assert carry_out(study.runs, 1, lambda run: None) == [run] == started
    aside = Path(study.out) / "unfinished" / run.folder.parent.relative_to(Path(study.out) / "runs") / "seed_00-1"
    assert {p.name for p in aside.iterdir()} == before
    said = capsys.readouterr().out
    assert f"an earlier attempt did not finish; it was moved to {aside}" in said
    assert f"FAILED (exit status 3): {run.folder / 'log.txt'}" in said


def test_truncated_metrics_are_reported_and_not_read_as_numbers(copied, monkeypatch, capsys):
    study, file = copied
    monkeypatch.chdir(ROOT)
    metrics = study.runs[3].folder / "metrics.csv"
    metrics.write_text(metrics.read_text().rstrip("\n")[:-9])
    (Path(study.out) / "results.json").unlink()
    with pytest.raises(
        UserError, match=rf"{study.runs[3].folder}: val/success was measured at other steps \(2 in total"
    ):
        study_command(["--config", str(file), "--report_only", "true"])
    metrics.write_text(metrics.read_text() + "\n")
    with pytest.raises(UserError, match=rf"{metrics}:\d+: .*torn; remove {study.runs[3].folder} to repeat the run"):
        study_command(["--config", str(file), "--report_only", "true"])
    assert not (Path(study.out) / "results.json").exists()


def test_records_that_cannot_be_read_only_remove_their_table(copied, monkeypatch, capsys):
    study, file = copied
    monkeypatch.chdir(ROOT)
    for record in Path(study.out).glob("runs/GEAR/*/*/rollouts/*.jsonl"):
        record.write_text('{"format": 1}\n')
    assert study_command(["--config", str(file), "--report_only", "true"]) == 0
    assert "The analysis of the first wrong decision is left out: " in capsys.readouterr().out
    assert json.loads((Path(study.out) / "results.json").read_text())["onset"] == {}


def test_an_unfinished_run_is_not_done(carried):
    study, *_ = carried
    broken = study.runs[0].folder
    saved = (broken / "status.json").read_text()
    (broken / "status.json").write_text(saved.replace("finished", "failed"))
    try:
        assert not is_done(study.runs[0])
        assert [run for run in study.runs if not is_done(run)] == [study.runs[0]]
    finally:
        (broken / "status.json").write_text(saved)


def test_the_plan_and_the_report_work_without_runs(carried, tmp_path, capsys, monkeypatch):
    study, *_ = carried
    monkeypatch.chdir(ROOT)
    file = Path(study.out).parent / "study.json"
    assert study_command(["--config", str(file), "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert all(line.startswith("gear-lightning fit --config=") for line in lines)
    assert study_command(["--config", str(file), "--report_only", "--seeds", "1"]) == 0
    assert "1 seed, 2 points" in capsys.readouterr().out
    before = (Path(study.out) / "results.json").read_text()
    assert study_command(["--config", str(file), "--report_only", "--metric", "val/response_tokens"]) == 0
    other = json.loads((Path(study.out) / "val_response_tokens" / "results.json").read_text())
    assert other["metric"] == "val/response_tokens"
    assert (Path(study.out) / "results.json").read_text() == before
    with pytest.raises(UserError, match="no seed of the baseline and another arm has all points"):
        study_command(["--config", str(file), "--report_only", "true", "--out", str(tmp_path / "empty")])
    assert json.loads((Path(study.out).parent / "study.json").read_text())["seeds"] == 2


def test_a_grid_of_several_options_gives_a_map_of_headroom(tmp_path):
    same = [[[0.2, 0.4, 0.4]] * 2] * 4
    more = [[[0.2, 0.4 + 0.1 * p, 0.6]] * 2 for p in range(4)]
    study = plan(tmp_path, arms={"GRPO": {}, "Oracle": {}}, ceiling="Oracle", grid={"a.b": [1, 2], LR: [0.1, 0.2]})
    curves = Curves(["GRPO", "Oracle"], study.points, [0, 1], np.array([0.0, 10, 20]), np.array([same, more]))
    results = analyse(study, curves)
    assert label(results, 2) == "b 2, lr 0.1"
    names = [path.name for path in draw(curves, results, tmp_path)]
    assert names == ["curves.png", "differences.png", "headroom.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
