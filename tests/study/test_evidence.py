"""The documents' statements about the studies agree with the committed results."""

import csv
import json

import numpy as np
import pytest
import yaml
from checkout import ROOT

from gear_lightning.study.report import tables
from gear_lightning.study.statistics import mean_over_curve, paired_difference
from gear_lightning.study.tables import markdown

EVIDENCE = ROOT / "docs/evidence"


def results(name: str) -> dict:
    return json.loads((EVIDENCE / name / "results.json").read_text())


@pytest.mark.parametrize("name", sorted(p.parent.name for p in EVIDENCE.glob("*/results.json")))
def test_results_belong_to_the_committed_plan(name):
    plan = yaml.safe_load((ROOT / f"configs/study/{name}.yaml").read_text())
    found = results(name)
    assert list(found["arms"]) == list(plan["arms"])
    assert found["grid"] == list(plan.get("grid", {}))
    assert found["seeds"] == plan["seeds"]
    assert found["left_out"] == found["begin_elsewhere"] == []
    with (EVIDENCE / name / "curves.csv").open() as file:
        lines = len(list(csv.DictReader(file)))
    assert lines == len(found["arms"]) * len(found["points"]) * found["seeds"] * len(found["steps"])


def gain(told: dict) -> str:
    return f"{told['mean']:+.3f} [{told['low']:.3f}, {told['high']:.3f}]"


@pytest.mark.parametrize(("name", "heading"), [("reading", "## Does it matter"), ("credit", "## The first study")])
def test_the_tables_of_arms_agree_with_the_results(name, heading):
    found, text = results(name), (ROOT / "docs/evidence.md").read_text().partition(heading)[2]
    runs = found["seeds"] * len(found["points"])
    for arm, told in found["arms"].items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {arm} |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")][1:]
        assert int(cells.pop()) == round(told["collapsed"] * runs)
        if arm == "GRPO":
            shown = [f"{point['mean']['iqm']:.3f}" for point in [*told["points"], told]]
        else:
            paired = found["paired"][arm]
            shown = [
                f"{gain(point)}, {point['test']['wins']}:{point['test']['losses']}"
                for point in [*paired["points"], paired["all"]]
            ]
        assert cells == shown[: len(cells)]
        assert len(cells) >= len(found["points"])


def gains(name: str) -> dict[str, dict[str, np.ndarray]]:
    """Return arm -> gain over GRPO of each seed over ``all`` points of the grid, and at the ``best`` of each arm."""
    with (EVIDENCE / name / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    curves: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    for row in rows:
        arm, *point, seed, step, value = row.values()
        curves.setdefault((arm, str(point), int(seed)), []).append((float(step), float(value)))
    means = {key: mean_over_curve(*map(np.array, zip(*curve, strict=True))) for key, curve in curves.items()}
    arms, points, seeds = (sorted({key[i] for key in means}) for i in range(3))
    scores = {arm: np.array([[means[arm, point, seed] for seed in seeds] for point in points]) for arm in arms}
    best = {arm: s[s.mean(1).argmax()] for arm, s in scores.items()}
    return {arm: {"all": (s - scores["GRPO"]).mean(0), "best": best[arm] - best["GRPO"]} for arm, s in scores.items()}


@pytest.mark.parametrize("name", ["reading", "credit"])
def test_the_intervals_of_shares_agree_with_the_curves(name):
    """At each end Student's test of gain - share x the oracle's gain has p = 0.05."""
    from scipy.stats import ttest_1samp

    found = gains(name)
    for which, headroom in results(name)["headroom"].items():
        oracle = found["Oracle"][which]
        for arm, interval in headroom["intervals"].items():
            mine = found[arm][which]
            assert headroom["shares"][arm] == pytest.approx(mine.mean() / oracle.mean(), abs=1e-4)
            assert interval[0] <= headroom["shares"][arm] <= interval[1]
            for end in interval if arm != "Oracle" else ():
                assert ttest_1samp(mine - end * oracle, 0).pvalue == pytest.approx(0.05, abs=1e-4)


def test_the_reports_contain_the_intervals_of_shares():
    for name in ("reading", "credit", "map"):
        assert (EVIDENCE / name / "report.md").read_text() == markdown(tables(results(name)))


def test_the_readme_and_the_evidence_agree_with_the_main_study():
    found = results("reading")
    ours, everything = found["paired"]["GEAR"]["all"], found["headroom"]["all"]["shares"]["GEAR"]
    readme, text = (" ".join((ROOT / name).read_text().split()) for name in ("README.md", "docs/evidence.md"))
    for said in (readme, text):
        assert f"{ours['test']['wins']} of {found['seeds']} paired seeds" in said
        assert f"p = {ours['holm']:.3f} after Holm's correction" in said
    low, high = (100 * end for end in found["headroom"]["all"]["intervals"]["GEAR"])
    share = 100 * found["headroom"]["best"]["shares"]["GEAR"]
    low_best, high_best = (100 * end for end in found["headroom"]["best"]["intervals"]["GEAR"])
    assert f"{100 * everything:.0f} % of the gain of an oracle that knows the first wrong decision" in readme
    assert f"(95 % interval {low:.0f}-{high:.0f} %; with each at its best learning rate, {share:.0f} %, " in readme
    assert f", {share:.0f} %, {low_best:.0f}-{high_best:.0f} %)" in readme
    assert f"{100 * everything:.0f} % ({low:.0f}-{high:.0f} %) of the gain of an oracle that knows the first" in text
    assert f"and {share:.0f} % ({low_best:.0f}-{high_best:.0f} %) with each at its best" in text
    other = [found["headroom"][which] for which in ("all", "best")]
    ours_and_theirs = [
        f"{100 * h['shares'][arm]:.0f} % [{100 * h['intervals'][arm][0]:.0f}, {100 * h['intervals'][arm][1]:.0f}]"
        for arm in ("GEAR", "TokenOnly")
        for h in other
    ]
    assert f"It gains {ours_and_theirs[0]} of the oracle's headroom over all learning rates, and" in text
    assert f"and {ours_and_theirs[1]} with each arm at its best one" in text
    assert f"TokenOnly gains {ours_and_theirs[2]} and {ours_and_theirs[3]}." in text
    assert f"+{ours['mean']:.2f} success over the curve" in readme
    assert f"+{ours['mean']:.3f} success over the curve" in text
    other, placebo = (found["paired"][arm]["all"] for arm in ("reference of another task", "Placebo"))
    assert other["high"] < 0, "worse than GRPO"
    assert placebo["low"] < 0 < placebo["high"], "no effect"
    onset = text.partition("## Does the divergence find")[2]
    told = found["onset"]["GEAR"]
    for name, shown in (("divergence", "divergence"), ("segment", "segments")):
        assert f"| {shown} | " + " | ".join(f"{told[i][name]:.2f}" for i in ("0", "15", "30")) + " |" in onset
    assert "| tokens of first wrong decisions | " + " | ".join(str(told[i]["first_wrong"]) for i in told) in onset


@pytest.mark.parametrize(
    ("name", "heading"), [("ablations", "## GEAR's choices"), ("reading_ablations", "### Repeated with")]
)
def test_the_tables_of_ablations_agree_with_the_results(name, heading):
    found, text = results(name), (ROOT / "docs/evidence.md").read_text().partition(heading)[2]
    for arm, told in found["paired"].items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {arm} |"))
        test = told["all"]["test"]
        assert [cell.strip() for cell in row.strip("|").split("|")][2:] == [
            gain(told["all"]),
            f"{test['wins']}:{test['losses']}",
            str(round(found["arms"][arm]["collapsed"] * found["seeds"])),
        ]


def test_the_table_of_teachers_agrees_with_the_checks():
    text = (ROOT / "docs/evidence.md").read_text().partition("### Check your teacher")[2]
    told = {p.stem: json.loads(p.read_text()) for p in (EVIDENCE / "teacher_check").glob("*.json")}
    columns = [[told["first_study"]], [told["main_study"]], [told[f"smollm2_seed_{seed}"] for seed in range(3)]]
    for what, name in (
        ("size of the divergence (mean, absolute), nats", "size"),
        ("AUC of the first wrong decision", "first_wrong"),
        ("AUC of the last token of failed rollouts", "last"),
        ("AUC of the mean of failed rollouts", "mean"),
    ):
        row = next(line for line in text.splitlines() if line.startswith(f"| {what} |"))
        cells = [
            "not known"
            if checks[0]["own"][name] is None
            else ", ".join(f"{check['own'][name]:.2f} / {check['other'][name]:.2f}" for check in checks)
            for checks in columns
        ]
        assert [cell.strip() for cell in row.strip("|").split("|")][1:] == cells
    shared = [", ".join(f"{check['shared']:.2f}" for check in checks) for checks in columns]
    assert "| rank correlation of the two | " + " | ".join(shared) + " |" in text


def test_the_map_agrees_with_its_results():
    found, text = results("map"), (ROOT / "docs/evidence.md").read_text().partition("## Where credit can matter")[2]
    oracle, runs = found["paired"]["Oracle"], 3 * found["seeds"]
    told = dict(zip(map(tuple, found["points"]), range(len(found["points"])), strict=True))
    for thought, turns in ((0, "short"), (2, "long")):
        for tasks in (2, 8):
            row = next(line for line in text.splitlines() if line.startswith(f"| {turns} | {tasks} |"))
            places = [told[thought, tasks, lr] for lr in (1.5e-4, 3e-4, 6e-4)]
            collapsed = [
                str(round(sum(found["arms"][arm]["points"][p]["collapsed"] for p in places) / 3 * runs))
                for arm in ("GRPO", "Oracle")
            ]
            cells = [cell.strip() for cell in row.strip("|").split("|")][2:]
            assert cells == [*(gain(oracle["points"][p]) for p in places), *collapsed]
    assert gain(oracle["all"]) in text
    assert (oracle["all"]["test"]["wins"], oracle["all"]["test"]["losses"]) == (3, 0)
    assert all(point["mean"] > 0 for point in oracle["points"])
    assert sum(point["low"] > 0 for point in oracle["points"]) == 3


def test_statements_about_templates_agree_with_the_measurements():
    text = (ROOT / "docs/evidence.md").read_text().partition("### Shorter teacher templates")[2]
    found = results("smollm2_template")
    ours = found["paired"]["bare sum"]["all"]
    assert gain(ours) + " over the curve" in " ".join(text.split())
    with (EVIDENCE / "smollm2_template/curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    ends = {
        (arm, step): sum(values) / len(values)
        for arm in found["arms"]
        for step in ("0", "25")
        if (values := [float(r["val/success"]) for r in rows if (r["arm"], r["step"]) == (arm, step)])
    }
    said = f"{ends['GRPO', '0']:.2f} to {ends['bare sum', '25']:.2f} for GEAR and to {ends['GRPO', '25']:.2f} for GRPO"
    assert said in " ".join(text.split())
    shown = [line for line in text.splitlines() if line.startswith("|")][2:7]
    for line, name in zip(shown, ["seed_0", *(f"template_{i}" for i in range(1, 5))], strict=True):
        told = json.loads((EVIDENCE / f"teacher_check/smollm2_{name}.json").read_text())
        cells = [f"{told['own'][key]:.2f} / {told['other'][key]:.2f}" for key in ("size", "last", "mean")]
        assert [cell.strip() for cell in line.strip("|").split("|")][1:] == [*cells, f"{told['shared']:.2f}"]


def test_the_maps_gains_at_best_rates_use_the_declared_mean():
    text = " ".join((ROOT / "docs/evidence.md").read_text().partition("## Where credit can matter")[2].split())
    with (EVIDENCE / "map/curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    curves: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for row in rows:
        *key, step, value = row.values()
        curves.setdefault(tuple(key), []).append((float(step), float(value)))
    means = {key: mean_over_curve(*map(np.array, zip(*curve, strict=True))) for key, curve in curves.items()}
    shown = []
    for thought, tasks in (("0", "2"), ("0", "8"), ("2", "2"), ("2", "8")):
        best = {
            arm: max(
                (
                    [means[arm, thought, tasks, lr, str(seed)] for seed in range(3)]
                    for lr in ("0.00015", "0.0003", "0.0006")
                ),
                key=sum,
            )
            for arm in ("GRPO", "Oracle")
        }
        shown.append(paired_difference(np.array(best["Oracle"]), np.array(best["GRPO"])))
    for told, tasks in zip(shown[:2], (2, 8), strict=True):
        low, high = told.interval
        assert f"{told.mean:+.3f} [{low:.3f}, {high:.3f}] with {tasks}" in text
    assert f"{shown[2].mean:+.3f} and {shown[3].mean:+.3f} after long ones" in text
