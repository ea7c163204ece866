"""Benchmarks that need hardware which is often missing run on a CPU in a small form."""

import json
import os
import subprocess
import sys

import pytest
from checkout import ROOT
from deadlines import seconds

pytestmark = pytest.mark.timeout(seconds(600))


def gpu_script(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        ["bash", "benchmarks/gpu.sh", *options],
        cwd=ROOT, env=environment, timeout=seconds(540), capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_the_measurements_for_a_gpu_run_in_small(tmp_path):
    out = tmp_path / "gpu.json"
    done = gpu_script("--tiny", "--seconds", str(seconds(500)), "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())["results"]
    assert found["tiny cached"]["tokens_per_s"] > 0
    assert found["tiny step"]["rollout_s"] > 0
    assert found["tiny step"]["update_s"] > 0
    assert {line.split("  ")[0] for line in done.stdout.splitlines()[1:]} == found.keys()


def test_a_part_without_time_is_reported(tmp_path):
    out = tmp_path / "gpu.json"
    done = gpu_script("--tiny", "--seconds", "0", "--out", str(out))
    assert done.returncode == 1
    assert json.loads(out.read_text())["results"]["tiny step"] == {"failed": "not run: no time was left"}


def test_a_machine_without_a_gpu_is_a_one_line_error():
    done = gpu_script()
    assert done.returncode == 1
    assert done.stderr.strip().endswith("gpu.sh: there is no GPU; --tiny tests the script on a CPU")
