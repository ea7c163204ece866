"""What the documents say of the studies is what the committed results say."""

import csv
import json
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
EVIDENCE = ROOT / "docs/evidence"


def results(name: str) -> dict:
    return json.loads((EVIDENCE / name / "results.json").read_text())


@pytest.mark.parametrize("name", sorted(p.name for p in EVIDENCE.iterdir() if p.is_dir()))
def test_results_are_those_of_the_shipped_plan(name):
    plan = yaml.safe_load((ROOT / f"configs/study/{name}.yaml").read_text())
    found = results(name)
    assert list(found["arms"]) == list(plan["arms"])
    assert found["grid"] == list(plan.get("grid", {}))
    assert found["seeds"] == plan["seeds"]
    assert found["left_out"] == found["begin_elsewhere"] == []
    with (EVIDENCE / name / "curves.csv").open() as file:
        lines = len(list(csv.DictReader(file)))
    assert lines == len(found["arms"]) * len(found["points"]) * found["seeds"] * len(found["steps"])


def test_the_readme_and_the_evidence_say_what_the_credit_study_found():
    found, text = results("credit"), (ROOT / "docs/evidence.md").read_text()
    readme = " ".join((ROOT / "README.md").read_text().split())
    wins = sum(point["test"]["wins"] for point in found["paired"]["GEAR"]["points"])
    runs = found["seeds"] * len(found["points"])
    share = f"{100 * found['headroom']['best']['shares']['GEAR']:.0f} %"
    for said in (readme, " ".join(text.split())):
        assert f"{wins} of {runs} paired runs" in said
        assert f"{share} of what an oracle gains" in said
    assert f"+{found['paired']['GEAR']['best']['mean']:.2f} success over the curve" in readme
    for arm, told in found["arms"].items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {arm} |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert int(cells[-1]) == round(told["collapsed"] * runs)
        if arm == "GRPO":
            assert cells[1:-1] == [f"{point['mean']['iqm']:.3f}" for point in told["points"]]
            continue
        assert cells[1:-1] == [
            f"{point['mean']:+.3f} [{point['low']:.3f}, {point['high']:.3f}], "
            f"{point['test']['wins']}:{point['test']['losses']}"
            for point in found["paired"][arm]["points"]
        ]


def test_the_table_of_ablations_is_that_of_its_results():
    found, text = results("ablations"), (ROOT / "docs/evidence.md").read_text().partition("## GEAR's choices")[2]
    for arm, told in found["paired"].items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {arm} |"))
        gain, test = told["all"], told["all"]["test"]
        assert [cell.strip() for cell in row.strip("|").split("|")][2:] == [
            f"{gain['mean']:+.3f} [{gain['low']:.3f}, {gain['high']:.3f}]",
            f"{test['wins']}:{test['losses']}",
            str(round(found["arms"][arm]["collapsed"] * found["seeds"])),
        ]
