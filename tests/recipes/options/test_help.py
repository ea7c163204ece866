"""``--help`` and what it can be asked for: one screen, sections, options and classes, without heavy imports."""

import json
import os
import subprocess
import sys

import deadlines
import pytest

TAKING_RECIPES = ["fit", "validate", "test", "predict", "teacher-check", "noise-floor"]
HEAVY = ("torch", "lightning", "transformers")
OTHERS = ["doctor", "parity", "slurm", "study", "credit", "recredit", "compare", "export", "status", "recipes", "init"]


@pytest.mark.parametrize("command_name", TAKING_RECIPES)
@pytest.mark.parametrize("asked", [["--help"], ["-h"], ["--config", "quickstart", "--help"]])
def test_help_is_one_screen(command, command_name, asked):
    status, out, err = command(command_name, *asked)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 100
    for wanted in (
        "--config RECIPE",
        "sections",
        "  model ",
        "  data ",
        "  trainer ",
        "--help SECTION",
        "--help CLASS",
    ):
        assert wanted in out


@pytest.mark.parametrize(
    ("topic", "wanted"),
    [
        ("model", ["--model.credit (CreditAssigner, default GEAR)", "--model.teacher.rate (float, default 0.05)"]),
        ("data", ["--data.group_size (int, default 8)", "number of rollouts of each task."]),
        ("trainer", ["--trainer.max_epochs (int | null, default 100)", "Stop training once this number of epochs"]),
        ("generation", ["--generation.budgets.turns (int, default 8)", "Classes: CachedEngine, ColocatedVLLM"]),
        ("model.policy", ["Pretrained", "FromScratch", "hidden_size (int, default 128)"]),
        ("trainer.strategy", ["default auto", "FSDP2", "ZeRO", "DDPStrategy"]),
        ("model.teacher", ["--model.teacher.shows (reference | answer | peer", "default reference)"]),
        ("--model.credit.kappa", ["--model.credit.kappa (float"]),
        ("warm_start", ["--warm_start.steps (int, default 600)"]),
        ("Gear", ["gear_lightning.GEAR", "use it by --model.credit GEAR", "kappa (float"]),
        ("JsonlTasks", ["use it by --data.train_tasks JsonlTasks", "path (str, required)", "the file."]),
        ("CachedEngine", ["prefill_tokens (int, default"]),
        ("AdamW", ["torch.optim.AdamW", "lr (float | Tensor, default 0.001)", "learning rate", "betas"]),
        ("EarlyStopping", ["monitor (str, required)", "quantity to be monitored"]),
        ("TeacherOptions", ["set by --model.teacher.OPTION VALUE", "rate (float, default 0.05)"]),
        ("gear_lightning.credit.Uniform", ["Uniform"]),
        ("Study", ["arms", "seeds (int, default 10)"]),
        ("all", ["--checkpoint.filename", "default iteration={epoch:05d}", "--watchdog.seconds", "--ckpt_path"]),
    ],
)  # fmt: skip
def test_help_of_a_topic(command, topic, wanted):
    status, out, err = command("fit", "--help", topic)
    assert (status, err) == (0, "")
    for text in wanted:
        assert text in out
    long = [line for line in out.splitlines() if len(line) > 100]
    assert not [line for line in long if " " in line.strip()[:60]], "lines of text are wrapped"


def test_several_topics_and_other_commands(command):
    out = command("fit", "--help", "Uniform", "GRPO")[1]
    assert "gear_lightning.credit.Uniform" in out
    assert "gear_lightning.advantage.GRPO" in out
    assert "--generation.budgets.turns" in command("doctor", "--help", "generation.budgets")[1]
    assert "--tasks (int | null, default null)" in command("teacher-check", "--help", "tasks")[1]
    assert "kappa" in command("recredit", "--help", "GEAR")[1]


@pytest.mark.parametrize(
    ("topic", "message"),
    [("Gea", "did you mean GEAR?"), ("trainr", "did you mean trainer?"), ("zzz", "the sections are model, data")],
)
def test_help_of_an_unknown_topic(command, topic, message):
    status, out, err = command("fit", "--help", topic)
    assert (status, out) == (2, "")
    assert message in err


@pytest.mark.parametrize("columns", ["30", "60", "400"])
def test_help_follows_the_width_of_the_terminal(command, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    out = command("fit", "--help")[1] + command("fit", "--help", "data")[1]
    words = max(len(word) for word in out.split())
    assert max(map(len, out.splitlines())) <= max(100 if columns == "400" else int(columns), 40, words + 8)


def test_a_class_of_the_user_is_described_without_importing_it(command, tmp_path, monkeypatch):
    (tmp_path / "own_tasks.py").write_text(
        'raise SystemExit("imported")\n'
        "from gear_lightning.environments.base import TaskSource\n\n\n"
        'class Mine(TaskSource):\n    """My tasks.\n\n    Args:\n        level: how hard.\n    """\n\n'
        "    def __init__(self, level: int = 3): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    status, out, _ = command("fit", "--help", "own_tasks.Mine")
    assert status == 0
    for text in ("My tasks.", "use it by --data.train_tasks", "level (int, default 3)", "how hard."):
        assert text in out


STARTED = """
import sys, json
from gear_lightning.__main__ import main
sys.argv = ["gear-lightning", *json.loads(sys.argv[1])]
try:
    main()
except SystemExit:
    pass
sys.stderr.write(json.dumps([m for m in {heavy!r} if m in sys.modules]))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "--help"], ["fit", "--help", "trainer.strategy"], ["fit", "--help", "AdamW"],
        ["fit", "--config", "no.yaml"], ["fit", "-c", "no.yaml"], ["fit", "--config=no.yaml"],
        ["fit", "--config", "quickstart", "--model.creditt", "3"], ["study", "--config", "no.yaml"],
        ["compare", "no_run", "nor_this"], ["export", "no.ckpt", "out"], ["recredit", "no_run", "--credit", "GEAR"],
        ["doctor", "--config", "no.yaml"], ["slurm", "--config", "quickstart", "--cluster", "no.yaml"],
        *[[name, "--help"] for name in OTHERS],
    ],
    ids=" ".join,
)  # fmt: skip
def test_help_and_errors_import_nothing_heavy(arguments):
    done = subprocess.run(
        [sys.executable, "-c", STARTED.format(heavy=HEAVY), json.dumps(arguments)],
        capture_output=True, text=True, timeout=deadlines.seconds(60), check=True,
        env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip
    assert done.stderr.endswith("[]"), done.stderr
    assert "Traceback" not in done.stderr


def test_help_of_jsonargparse_works(command):
    status, out, _ = command("fit", "--model.credit.help", "GEAR")
    assert status == 0
    assert "--model.credit.init_args.kappa" in out or "kappa" in out
