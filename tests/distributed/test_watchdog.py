"""A job whose processes wait for each other forever ends, with a report of the state of each."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from deadlines import seconds, until
from quickstart_runs import DEADLINE, command_line

TWO = ("--trainer.devices", "2", "--progress.every_seconds", "1000")


def alive(word: str) -> list[str]:
    """Return the command lines that contain the word, of processes that are not zombies."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # the process has ended
            continue
        if word in command and state != "Z":
            found.append(command)
    return found


def finish(command, environment, repository) -> tuple[int, str]:
    """Run the command, and return its exit status and stderr."""
    done = subprocess.run(
        command, cwd=repository, env=environment, timeout=DEADLINE, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


def watching(limit: float) -> list[str]:
    """Return the option of a watchdog whose limit is longer than any step that is not stuck."""
    return ["--watchdog.seconds", f"{seconds(limit):g}"]


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow), "zero3"])
def test_a_process_that_blocks_the_interpreter_ends_the_job(tmp_path, repository, strategy):
    options = ["--config", f"configs/strategy/{strategy}.yaml", *TWO, *watching(12)]
    options += ["--generation.environment", "failing_ranks.Endless", "--first_evaluation.enabled", "false"]
    status, said = finish(*command_line(tmp_path, *options), repository)
    assert status != 0
    report = (tmp_path / "crash" / "rank_0.txt").read_text()
    assert "no process has made progress for" in report
    assert "rank 1: " in report
    assert "in step" in said, "the stack of the process that blocks the interpreter is missing"
    assert "failing_ranks.py" in said


def test_a_single_process_is_watched_too(tmp_path, repository):
    command, environment = command_line(tmp_path, *watching(12), "--generation.environment", "failing_ranks.Endless")
    status, said = finish(command, {**environment, "WORLD_SIZE_ONE": "1"}, repository)
    assert status != 0
    assert "failing_ranks.py" in said


def test_a_slow_process_is_not_stuck(tmp_path, repository):
    options = [*TWO, "--trainer.strategy", "ddp", *watching(6), "--trainer.max_epochs", "1", "--data.group_size", "8"]
    options += ["--generation.environment", "failing_ranks.Slow", "--first_evaluation.enabled", "false"]
    command, environment = command_line(tmp_path, *options, "--trainer.check_val_every_n_epoch", "9")
    pause, slept = seconds(6) / 3, tmp_path / "slept"
    status, said = finish(command, {**environment, "PAUSE": str(pause), "SLEPT": str(slept)}, repository)
    assert status == 0, said[-2000:]
    assert len(slept.read_text()) * pause > 2 * seconds(6), "too few slow steps for a valid test"


def ranks(tmp_path, repository, *options: str, second: tuple[str, ...]) -> list[tuple[int, str]]:
    """Start two processes like a cluster does, the second with other options; return exit statuses and stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    running = []
    for rank in range(2):
        command, environment = command_line(tmp_path, *options, *(second if rank else ()))
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
        running.append(
            subprocess.Popen(
                command, cwd=repository, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
            )
        )
    ended = []
    for process in running:
        said = process.communicate(timeout=DEADLINE)[1]
        ended.append((process.returncode, said))
    return ended


@pytest.mark.parametrize(
    ("options", "second", "key"),
    [
        pytest.param(
            ("--trainer.strategy", "ddp"),
            ("--data.micro_batch_size", "4"),
            "data.micro_batch_size is 4 there and 2",
            marks=pytest.mark.slow,
        ),
        (("--trainer.strategy", "ddp"), ("--config", "configs/strategy/fsdp.yaml"), "trainer.strategy"),
        (("--config", "configs/strategy/zero3.yaml"), ("--model.optimizer.lr", "0.5"), "model.optimizer.init_args.lr"),
    ],
)
def test_all_ranks_name_the_process_with_another_config(tmp_path, repository, options, second, key):
    for status, said in ranks(tmp_path, repository, *options, *TWO, second=second):
        assert status == 2, said[-2000:]
        assert "rank 1 has another config than rank 0" in said
        assert key in said
        assert "Traceback" not in said
    assert not list(tmp_path.glob("rollouts/*")), "the difference must be found before anything is sampled"


def test_a_process_that_exits_ends_the_others(tmp_path, repository):
    options = [*TWO, "--config", "configs/strategy/fsdp.yaml", "--generation.environment", "failing_ranks.Fatal"]
    command, environment = command_line(tmp_path, *options, "--trainer.max_epochs", "1000")
    process = subprocess.Popen(
        command,
        cwd=repository,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert process.wait(timeout=DEADLINE) != 0
    until(lambda: not alive(str(tmp_path)), "the end of all processes")


def test_the_watchdog_does_not_end_a_process_that_catches_the_error(tmp_path):
    """Code that catches the error, such as a notebook, continues."""
    script = """
import sys, threading, time
sys.path.insert(0, "tests/support")
from pathlib import Path
from tiny_runs import data, generation, module, trainer
from gear_lightning.callbacks import watchdog

class Broken(watchdog.L.Callback):
    def on_train_start(self, trainer, pl_module):
        raise RuntimeError("broken")

watchdog.GRACE, limit = 1.0, float(sys.argv[2])
try:
    trainer(Path(sys.argv[1]), generation(), watchdog.Watchdog(limit), Broken()).fit(module(), datamodule=data())
except RuntimeError:
    time.sleep(2 * (limit + watchdog.GRACE))  # longer than the timers of the watchdog
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]
    print("still here")
"""
    command = [sys.executable, "-c", script, str(tmp_path), str(seconds(2))]
    done = subprocess.run(command, timeout=DEADLINE, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("still here"), done.stderr[-2000:]
