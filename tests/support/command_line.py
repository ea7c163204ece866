"""Run the command line in this process."""

import logging
import sys

import pytest

from gear_lightning.__main__ import main

SHORT = [
    "--warm_start=null", "--trainer.max_epochs", "2", "--trainer.check_val_every_n_epoch", "1",
    "--model.policy.hidden_size", "32", "--model.policy.layers", "2", "--model.optimizer.lr", "0.01",
    "--data.tasks_per_iteration", "2", "--data.group_size", "4", "--data.micro_batch_size", "4",
    "--data.val_limit", "4", "--data.eval_batch_size", "4",
]  # fmt: skip


FIT = ["fit", "--config", "configs/quickstart.yaml", *SHORT]


@pytest.fixture
def command(repository, monkeypatch, capsys):
    """Runs ``gear-lightning`` in this process, from the root of the checkout; returns (exit status, stdout, stderr)."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.chdir(repository)
        monkeypatch.setattr(sys, "argv", ["gear-lightning", *map(str, args)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(logging, "raiseExceptions", False)  # Lightning's handler holds an earlier test's stderr
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def error_of(command, *args: object) -> str:
    status, _, err = command(*args)
    assert status == 2, err
    assert "Traceback" not in err
    assert "usage:" not in err, "the usage with hundreds of options hides the error"
    return err
