"""`gear-lightning compare`, on runs of `fit` and on run directories written by hand."""

import csv
import json
import re
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from checkout import ROOT

from gear_lightning.commands.compare import compare_command
from gear_lightning.errors import UserError
from gear_lightning.runs.records import FORMAT
from gear_lightning.study.figure import _spread
from gear_lightning.study.numbers import contrasts, measure, summarise
from gear_lightning.study.runs import make_arms, read_run

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

CONFIG = """\
seed_everything: {seed}
trainer: {{default_root_dir: {path}, max_epochs: 20}}
model:
  credit: {{class_path: gear_lightning.credit.{credit}, init_args: {{{arguments}}}}}
  optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: {lr}}}}}
data:
  seed: {seed}
  inner_epochs: 1
  train_tasks: {{class_path: my.Tasks, init_args: {{hops: 4, seed: {seed}}}}}
  val_tasks: {{class_path: my.Tasks, init_args: {{hops: {hops}, seed: {val_seed}}}}}
"""


def run(path: Path, success: list[float], *, every: int = 10, seed: int = 0, credit: str = "GEAR", **options) -> Path:
    """Write a run directory: success at 0, every, 2 every, ...; 8 rollouts, 100 tokens, 2 seconds per iteration."""
    path.mkdir(parents=True)
    filled = {"path": path, "seed": seed, "credit": credit, "lr": 0.001, "hops": 4, "val_seed": 0, **options}
    filled.setdefault("arguments", "kappa: 1.0" if credit == "GEAR" else "")
    (path / "config.yaml").write_text(CONFIG.format(**filled))
    lines = ["step,epoch,perf/rollouts,perf/sampled_tokens,perf/seconds,train/loss,val/success"]
    for step in range(every * (len(success) - 1) + 1):
        cost = f"{8 * step},{100 * step},{2.0 * step},0.5" if step else ",,,"
        lines.append(f"{step},,{cost},{success[step // every] if step % every == 0 else ''}")
    (path / "metrics.csv").write_text("\n".join(lines) + "\n")
    return path


def numbers(*paths: Path, metric: str = "val/success", over: str = "iterations", groups=None):
    runs = [read_run(path) for path in paths]
    arms = make_arms(runs, groups or {})
    return arms, measure(runs, metric, over, 0.8)


@pytest.fixture(scope="session")
def fits(tmp_path_factory, quick, request) -> Path:
    """Return two seeds of GEAR and of GRPO, two iterations each; the last run was stopped after one, and resumed."""
    folder, root = tmp_path_factory.mktemp("fits"), ROOT
    tiny = "--warm_start null --model.policy.hidden_size 32 --model.policy.layers 1 --data.val_limit 8 "
    tiny += "--data.tasks_per_iteration 2 --data.group_size 4 --data.eval_batch_size 8 --noise_floor.tokens 16 "
    tiny += "--trainer.check_val_every_n_epoch 1 --credit_map.every_n_iterations 1000 --samples.print_table false"
    for rule in ("gear", "grpo"):
        for seed in (1, 2):
            for epochs in (1, 2) if (rule, seed) == ("grpo", 2) else (2,):
                options = ["--config", "configs/quickstart.yaml", "--config", f"configs/credit/{rule}.yaml"]
                options += [*tiny.split(), "--seed_everything", str(seed), "--data.seed", str(seed), "--ckpt_path=last"]
                options += ["--trainer.max_epochs", str(epochs), "--trainer.default_root_dir"]
                command = [quick.executable, "-m", "gear_lightning", "fit", *options, str(folder / f"{rule}_{seed}")]
                done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_runs_of_two_rules_and_seeds_are_compared(fits, capsys):
    paths = [str(fits / name) for name in ("grpo_1", "grpo_2", "gear_1", "gear_2")]
    assert compare_command([*paths, "--metric", "val/response_tokens", "--out", str(fits / "out.csv")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"Uniform +2 +2 ", said), said
    assert re.search(r"GEAR +2 +2 ", said)
    assert re.search(r"arm +model.credit.class_path\s+Uniform +Uniform\s+GEAR +GEAR", said)
    with (fits / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["seed"]) for row in rows] == [(a, s) for a in ("Uniform", "GEAR") for s in "12"]
    with (fits / "gear_2" / "metrics.csv").open() as file:
        curve = [float(row["val/response_tokens"]) for row in csv.DictReader(file)]
    assert len(curve) == 3
    assert float(rows[3]["final"]) == curve[2]
    # trapezoid over iterations 0, 1, 2
    assert float(rows[3]["mean_over_curve"]) == pytest.approx((curve[0] / 2 + curve[1] + curve[2] / 2) / 2)


def test_a_runs_cost_is_counted_across_a_resume(fits):
    """2 tasks x 4 rollouts, two iterations, also in the run that was stopped after the first."""
    for name in ("gear_1", "grpo_2"):
        curve = read_run(fits / name).curve("val/success", "rollouts")
        assert curve is not None
        assert curve[0].tolist() == [0, 8, 16]
    steps, seconds = read_run(fits / "grpo_2").columns["perf/seconds"]
    assert steps.tolist() == [1, 2]
    assert 0 < seconds[0] < seconds[1]


def test_the_page_is_self_contained_and_written_next_to_the_runs(fits, capsys):
    assert compare_command([str(path) for path in sorted(fits.glob("g*_?"))]) == 0
    page = (fits / "compare.html").read_text()
    assert str(fits / "compare.html") in capsys.readouterr().out
    figure = re.search(r"<svg.*</svg>", page, re.DOTALL)
    assert figure is not None
    panels = [e for e in ET.fromstring(figure[0]).iter() if (e.get("id") or "").startswith("axes_")]
    assert len(panels) == 4, "iterations, rollouts, tokens, seconds"
    assert "currentColor" in figure[0]
    outside = re.findall(r"https?://[^\"' <]+", page)
    assert all(url.startswith("http://www.w3.org/") for url in outside), "only names of XML vocabularies"
    assert "<script" not in page
    assert "default-src 'none'" in page


def test_numbers_of_an_arm(tmp_path):
    arms, what = numbers(
        run(tmp_path / "a", [0.2, 0.6, 0.8], seed=1),  # (0.4 + 0.7) / 2 = 0.55; 0.8 at 20
        run(tmp_path / "b", [0.2, 0.9, 0.4], seed=2),  # (0.55 + 0.65) / 2 = 0.6; 0.8 at 10; 0.4 < 0.45: collapsed
        run(tmp_path / "c", [0.2, 0.2, 0.2], seed=3),  # 0.2; never
    )
    (arm,) = arms
    assert arm.name == "GEAR"
    found = summarise(arm, what)
    assert found.mean == pytest.approx((0.55 + 0.6 + 0.2) / 3)
    assert found.final == pytest.approx(1.4 / 3)  # of three values, none is removed
    assert (found.reached, found.runs_reached) == (20, 2)
    assert found.collapsed == pytest.approx(1 / 3)
    assert found.mean_interval == pytest.approx((0.2, 0.6))


def test_differences_are_paired_by_seed(tmp_path):
    base = [run(tmp_path / f"base{s}", [0.2, 0.2 + s / 10], seed=s, credit="Uniform") for s in (1, 2, 3)]
    ours = [run(tmp_path / f"ours{s}", [0.2, 0.3 + s / 10], seed=s) for s in (3, 2, 4)]  # another order; 4 has no pair
    arms, what = numbers(*base, *ours)
    (found,) = contrasts(arms, what)
    assert found.mean is not None
    assert found.final is not None
    assert (found.mean.pairs, found.mean.mean) == (2, pytest.approx(0.05))
    assert (found.final.mean, found.final.interval) == (pytest.approx(0.1), pytest.approx((0.1, 0.1)))
    assert (found.mean.test.wins, found.mean.holm) == (2, pytest.approx(0.5))  # 2 / 2^2
    # ends of ours 0.6, 0.5, 0.7 against 0.3, 0.4, 0.5: eight of nine are above, one is a tie
    assert found.improvement == pytest.approx(8.5 / 9)


def test_holm_corrects_for_the_number_of_arms(tmp_path):
    paths = [run(tmp_path / f"{c}{s}", [0.1, y], seed=s, credit=c)
             for c, y in (("Uniform", 0.2), ("GEAR", 0.5), ("RLSD", 0.6)) for s in range(6)]  # fmt: skip
    arms, what = numbers(*paths)
    assert [arm.name for arm in arms] == ["Uniform", "GEAR", "RLSD"]
    found = contrasts(arms, what)
    assert [one.mean and one.mean.test.p for one in found] == [pytest.approx(1 / 32)] * 2  # 2 / 2^6
    assert [one.mean and one.mean.holm for one in found] == [pytest.approx(1 / 16)] * 2


def test_runs_of_one_seed_count_once(tmp_path):
    """Two learning rates in one group: a seed's value is the mean over both."""
    paths = [run(tmp_path / f"{s}_{lr}", [0.0, s / 10 + lr], seed=s, lr=lr) for s in (1, 2) for lr in (0.1, 0.3)]
    arms, what = numbers(*paths, groups=dict.fromkeys(paths, "both"))
    found = summarise(arms[0], what)
    assert arms[0].name == "both"
    assert arms[0].differs == {"model.optimizer.init_args.lr": "0.1 or 0.3"}
    assert found.mean_interval == pytest.approx((0.15, 0.2))  # halves of 0.1 + 0.2 and 0.2 + 0.2


def test_all_runs_are_measured_over_the_range_of_the_shortest(tmp_path, capsys):
    whole, short = [0.0, 0.4, 0.8], [0.0, 0.4]
    paths = run(tmp_path / "a", whole), run(tmp_path / "b", short, credit="Uniform")
    arms, what = numbers(*paths)
    assert (what.low, what.high) == (0, 10)
    assert [summarise(arm, what).mean for arm in arms] == pytest.approx([0.2, 0.2])
    assert [summarise(arm, what).reached for arm in arms] == [20, np.inf], "`reached` uses the whole run"
    compare_command([*map(str, paths), "--out", str(tmp_path / "x.csv")])
    assert "ends at iteration 10, others continue to 20" in " ".join(capsys.readouterr().out.split())


def test_other_axes_have_other_ranges(tmp_path):
    one = read_run(run(tmp_path / "a", [0.0, 0.4, 0.8]))
    for over, places in {"iterations": [0, 10, 20], "rollouts": [0, 80, 160], "tokens": [0, 1000, 2000]}.items():
        curve = one.curve("val/success", over)
        assert curve is not None
        assert curve[0].tolist() == places
    paths = tmp_path / "a", run(tmp_path / "b", [0.0, 0.4, 0.8], every=5, credit="Uniform")
    arms, what = numbers(*paths, over="seconds")
    assert what.high == 20  # 10 iterations of 2 s
    # the second is at 0.8 after 20 s, the first at 0.4: triangles
    assert [summarise(arm, what).mean for arm in arms] == pytest.approx([0.2, 0.4])


def test_inner_epochs_are_steps_of_one_iteration(tmp_path):
    path = run(tmp_path / "a", [0.0, 0.4])
    text = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(text.replace("inner_epochs: 1", "inner_epochs: 5"))
    curve = read_run(path).curve("val/success", "iterations")
    assert curve is not None
    assert curve[0].tolist() == [0, 2]


# -- arms -------------------------------------------------------------------------------------------------------------


def test_arms_follow_from_the_configs(tmp_path):
    arms, _ = numbers(
        run(tmp_path / "a", [0, 1], seed=1, arguments="kappa: 1.0"),
        run(tmp_path / "b", [0, 1], seed=1, arguments="kappa: 0.5"),
        run(tmp_path / "c", [0, 1], seed=1, credit="Uniform"),
        run(tmp_path / "d", [0, 1], seed=2, arguments="kappa: 0.5"),
    )
    assert [(arm.name, len(arm.runs)) for arm in arms] == [
        ("GEAR, kappa=1", 1),
        ("GEAR, kappa=0.5", 2),
        ("Uniform", 1),
    ]
    assert arms[1].seeds == ("1", "2")


def test_options_that_belong_to_a_class_are_not_shown(tmp_path):
    """GEAR has a kappa and RLSD a clip: only the class distinguishes them."""
    arms, _ = numbers(
        run(tmp_path / "a", [0, 1], arguments="kappa: 1.0, clip: 0.9"),
        run(tmp_path / "b", [0, 1], credit="RLSD", arguments="clip: 0.2"),
    )
    assert [dict(arm.differs) for arm in arms] == [{"model.credit.class_path": n} for n in ("GEAR", "RLSD")]


def test_groups_and_names(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    for seed in (0, 1):
        run(tmp_path / f"fast_{seed}", [0, 0.5], seed=seed, lr=0.1 * (seed + 1))
        run(tmp_path / f"slow_{seed}", [0, 0.25], seed=seed, lr=0.01)
    out = ["--out", "x.csv"]
    assert compare_command(["--group", "slow=slow_*", "--group", "fast=fast_?", *out]) == 0
    assert re.search(r"fast +2 +\+0.125 \[\+0.125, \+0.125\] +2/0/0 +0.500", capsys.readouterr().out)
    given = ["slow_0", "slow_1", "fast_0", "fast_1"]
    for line in ([*given, "--names", "S,F0,F1"], ["--names", "S, F0, F1", *given], ["--names=S,F0,F1", *given]):
        assert compare_command([*line, *out]) == 0
        assert re.search(r"\nF1 +1 +\+0.125 ", capsys.readouterr().out), line
    for names in ("S,F", "S,F,F", "S,F,"):
        with pytest.raises(UserError, match=r"give 3 different comma-separated names, for the arms lr=0.01 \(slow_0,"):
            compare_command([*given, "--names", names])
    with pytest.raises(UserError, match="F0: no such directory; --names takes comma-separated names"):
        compare_command(["--names", "S", "F0", "F1", *given])


# -- files ------------------------------------------------------------------------------------------------------------


def test_the_newest_row_of_a_step_counts(tmp_path):
    """Killed at 40, resumed from 20, killed again at 30: the first attempt's row at 40 does not belong to the run."""
    path = run(tmp_path / "a", [0.1, 0.2])
    rows = [(0, 0.1), (20, 0.2), (30, 0.3), (40, 0.4), (20, ""), (30, 0.6), (30, 0.7)]
    (path / "metrics.csv").write_text("step,val/success\n" + "".join(f"{s},{v}\n" for s, v in rows))
    steps, values = read_run(path).columns["val/success"]
    assert steps.tolist() == [0, 20, 30]
    assert values.tolist() == [0.1, 0.2, 0.7]


@pytest.mark.parametrize("cut", [1, 3, 9])
def test_an_incomplete_last_line_is_skipped(tmp_path, cut):
    path = run(tmp_path / "a", [0.1, 0.2, 0.3])
    text = (path / "metrics.csv").read_text()
    (path / "metrics.csv").write_text(text[:-cut])
    assert read_run(path).columns["val/success"][0].tolist() == [0, 10]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "metrics.csv: empty"),
        ("step,val/succ", "metrics.csv: empty|no column"),
        ("step,val/success\n", "no row"),
        ("step,val/success\n0,0.1\n1,0.", "is not a curve"),
        ("step,val/success\n0,0.1\n1\n2,0.3\n", r"metrics.csv:3: 1 cells, but the table has 2"),
        ("step,val/success\n0,0.1\n1,0.\x00\n2,0.3\n", r"metrics.csv:3: .*torn"),
        ("step,val/success\n0,0.1\n0.5,0.2\n", r"metrics.csv:3: step is not a non-negative integer"),
        ("val/success\n0.1\n", "no column named step"),
    ],
)
def test_metrics_that_cannot_be_read_are_reported(tmp_path, text, match):
    good, bad = run(tmp_path / "good", [0, 1]), run(tmp_path / "bad", [0, 1], seed=1)
    (bad / "metrics.csv").write_text(text)
    with pytest.raises(UserError, match=match):
        compare_command([str(good), str(bad)])


def test_runs_that_cannot_be_compared_are_rejected(tmp_path, capsys):
    a, b = str(run(tmp_path / "a", [0, 1])), str(run(tmp_path / "b", [0, 1], seed=1))
    other = str(run(tmp_path / "other", [0, 1], hops=5))
    with pytest.raises(UserError, match="1 run given: give two"):
        compare_command([a])
    with pytest.raises(UserError, match="given twice"):
        compare_command([a, f"{a}/../a"])
    with pytest.raises(UserError, match=r"no config.yaml; is this the run directory"):
        compare_command([a, str(tmp_path)])
    with pytest.raises(UserError, match=r"no metric val/sucess; there are .*train/loss, val/success"):
        compare_command([a, b, "--metric", "val/sucess"])
    with pytest.raises(UserError, match=r"data.val_tasks.init_args.hops is 4 in .*/a and 5 in .*/other"):
        compare_command([a, b, other])
    with pytest.raises(UserError, match=r"different tasks: data\.val_tasks\.init_args\.seed"):
        compare_command([a, str(run(tmp_path / "elsewhere", [0, 1], val_seed=1))])
    assert compare_command([a, b, other, "--allow-different-tasks", "--out", str(tmp_path / "x.csv")]) == 0
    with pytest.raises(UserError, match=r"must end in .html, .png"):
        compare_command([a, b, "--out", "x.pdf"])
    with pytest.raises(UserError, match="no directory matches"):
        compare_command(["--group", f"x={tmp_path}/nothing*"])
    with pytest.raises(UserError, match=r"LABEL=GLOB"):
        compare_command(["--group", "runs/*"])
    with pytest.raises(UserError, match="in two groups, x and y"):
        compare_command(["--group", f"x={tmp_path}/a", "--group", f"y={tmp_path}/?"])


def test_records_of_another_format_are_rejected(tmp_path):
    a, b = run(tmp_path / "a", [0, 1]), run(tmp_path / "b", [0, 1], seed=1)
    for version in (FORMAT, FORMAT - 1):
        (b / "rollouts").mkdir(exist_ok=True)
        (b / "rollouts" / "iter_000000.rank_0.jsonl").write_text(json.dumps({"format": version}) + "\n")
        if version == FORMAT:
            assert compare_command([str(a), str(b), "--out", str(tmp_path / "x.csv")]) == 0
    with pytest.raises(UserError, match=f"record format {FORMAT - 1}, this version reads {FORMAT}"):
        compare_command([str(a), str(b)])


def test_an_invalid_config_is_reported(tmp_path):
    a, b = run(tmp_path / "a", [0, 1]), run(tmp_path / "b", [0, 1])
    for text in ("[1, 2]", "a: [", "a: !!python/object/apply:os.system ['true']"):
        (b / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=r"config\.yaml: "):
            compare_command([str(a), str(b)])


# -- figures ----------------------------------------------------------------------------------------------------------


def test_figures_have_their_file_type_and_are_reproducible(tmp_path):
    paths = [
        str(run(tmp_path / f"{c}{s}", [0, 0.1 * s, 0.9], seed=s, credit=c)) for c in ("GEAR", "RLSD") for s in (1, 2, 3)
    ]
    for name in ("x.png", "x.svg", "x.html"):
        out = tmp_path / name
        content = []
        for _ in range(2):
            assert compare_command([*paths, "--out", str(out)]) == 0
            content.append(out.read_bytes())
        assert content[0] == content[1], name
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert ET.parse(tmp_path / "x.svg").getroot().tag.endswith("svg")


def test_tables_are_written_as_markdown(tmp_path):
    paths = [str(run(tmp_path / f"{c}{s}", [0, 0.5], seed=s, credit=c)) for c in ("GEAR", "RLSD") for s in (1, 2)]
    assert compare_command([*paths, "--names", "a|b,c", "--out", str(tmp_path / "x.md")]) == 0
    text = (tmp_path / "x.md").read_text()
    assert "val/success by arm:\n\n| arm | runs | seeds | mean over the curve |" in text
    assert "| a\\|b | 2 | 2 | 0.250 [0.250, 0.250] |" in text
    assert "| c | 2 | +0.000 [+0.000, +0.000] | 0/0/2 |" in text


def test_names_are_shown_as_text(tmp_path, capsys):
    paths = [str(run(tmp_path / "a", [0, 1])), str(run(tmp_path / "b", [0, 1], credit="RLSD"))]
    hostile = ["<script>$x_{$</script>", "[red]\x1b[31m"]
    out = tmp_path / "x.html"
    assert compare_command([*paths, "--names", ",".join(hostile), "--out", str(out)]) == 0
    assert "<script" not in out.read_text()
    assert "&lt;script&gt;$x_{$" in out.read_text()
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "[red]⟨U+001B⟩" in said


def test_axes_that_were_not_logged_are_omitted_and_reported_on_request(tmp_path):
    paths = [run(tmp_path / name, [0, 1], credit=credit) for name, credit in (("a", "GEAR"), ("b", "RLSD"))]
    for path in paths:
        text = (path / "metrics.csv").read_text().replace("perf/seconds", "time/update_s")
        (path / "metrics.csv").write_text(text)
    out = tmp_path / "x.svg"
    assert compare_command([*map(str, paths), "--out", str(out)]) == 0
    assert len(re.findall(r'id="axes_\d"', out.read_text())) == 4  # three panels, and the empty fourth one
    with pytest.raises(UserError, match="has not logged seconds; compare over iterations"):
        compare_command([*map(str, paths), "--over", "seconds"])


def test_labels_keep_their_order_and_a_distance():
    assert _spread([0.5, 0.54, 0.1], 0.1) == pytest.approx([0.47, 0.57, 0.1]), "both move equally, as little as needed"
    assert _spread([0.0, 0.02], 0.1) == pytest.approx([0.0, 0.1])
    placed = _spread([0.98, 0.99, 1.0], 0.1)
    assert placed == pytest.approx([0.8, 0.9, 1.0])
