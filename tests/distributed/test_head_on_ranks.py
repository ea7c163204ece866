"""A float32 head on a low-precision model gives the same log-probs in training and sampling under every strategy."""

import math
from pathlib import Path
from typing import Any

import pytest
from short_runs import train


def low(run: Path, name: str, precision: str, head: str | None) -> dict[str, Any]:
    return train(run, name, precision=precision, model={"head_precision": head})["metrics"]


@pytest.mark.parametrize(
    ("name", "precision", "head"),
    [
        *((name, "bf16-mixed", None) for name in ("ddp", "fsdp", "zero2", "zero3")),
        *((name, "bf16-true", "float32") for name in ("fsdp", "zero3")),
    ],
)
def test_log_probs_of_sampler_and_trainer_agree(pair, tmp_path, name, precision, head):
    first, second = pair.run(low, tmp_path, name, precision, head)
    assert first == second
    assert math.isfinite(first["train/loss"])
    assert first["train/sampler_gap_p95"] < 0.1, "logits reach 50: without a float32 head their error is 0.1"
