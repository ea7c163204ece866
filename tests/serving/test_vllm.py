"""Real vLLM servers on this machine's CPUs: training with them, their faults, and what they cannot hide."""

import csv
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from checkout import ROOT
from deadlines import seconds, until

from gear_lightning.runs.records import ledger

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(seconds(1500))]
VLLM = ["--generation.engine", "gear_lightning.generation.VLLMEngine"]
QUICKSTART = [
    "--config", "configs/quickstart.yaml", *VLLM, "--warm_start.steps", "20", "--data.val_limit", "8",
    "--data.tasks_per_iteration", "4",
]  # fmt: skip
SMOLLM2 = [
    "--config", "configs/smollm2_arithmetic.yaml", *VLLM, "--data.val_limit", "4", "--data.tasks_per_iteration", "2",
    "--data.group_size", "4", "--data.micro_batch_size", "4", "--trainer.precision", "32-true",
]  # fmt: skip


class Served:
    """A server for a recipe, in a process group of its own."""

    def __init__(self, recipe: list[str], folder: Path, *options: str, path: str = ""):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.url, self.folder = f"http://127.0.0.1:{self.port}", folder
        self.command = [
            sys.executable, "-m", "gear_lightning", "serve", *recipe, "--trainer.default_root_dir", str(folder),
            "--port", str(self.port), "--kv-gib", "0.5", *options,
        ]  # fmt: skip
        self.path = path
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": self.path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.log = self.folder.parent / f"{self.folder.name}-{self.port}.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        until(self.ready, f"the server to start: {self.log}", limit=300)

    def ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        try:
            return httpx.get(f"{self.url}/health", timeout=seconds(5)).status_code == 200
        except httpx.HTTPError:
            return False

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(seconds(30))

    def fit(self, recipe: list[str], *options: str) -> subprocess.Popen:
        """Start a run with this server."""
        return subprocess.Popen(
            [
                sys.executable, "-m", "gear_lightning", "fit", *recipe, "--trainer.default_root_dir", str(self.folder),
                "--generation.engine.servers", f"[{self.url}]", "--trainer.max_epochs", "3", *options,
            ],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def rows(self) -> list[dict[str, str]]:
        file = self.folder / "metrics.csv"
        rows = list(csv.DictReader(file.open())) if file.exists() else []
        return [row for row in rows if row.get("train/sampler_gap_max")]


@pytest.fixture
def serve(tmp_path):
    made = []

    def start(recipe, *options, path=""):
        made.append(Served(recipe, tmp_path / f"run{len(made)}", *options, path=path))
        return made[-1]

    yield start
    for server in made:
        if server.process.poll() is None:
            server.kill()


def outcome(process: subprocess.Popen) -> tuple[int, str]:
    text, _ = process.communicate(timeout=seconds(600))
    return process.returncode, text


def test_a_run_survives_the_death_of_its_server_and_resumes(serve):
    server = serve(QUICKSTART)
    process = server.fit(QUICKSTART)
    until(lambda: server.rows() or process.poll() is not None, "the first iteration", limit=300)
    server.kill()
    status, text = outcome(process)
    assert status == 2, text
    assert text.count("gear-lightning: error: the vLLM server") == 1, text
    assert "Traceback" not in text
    server.start()
    status, text = outcome(server.fit(QUICKSTART, "--ckpt_path", "last"))
    assert status == 0, text
    rows = server.rows()
    assert len(rows) == 3, "each iteration once"
    assert all(float(row["train/sampler_gap_max"]) <= 1e-3 for row in rows)


@pytest.mark.slow
def test_prompts_that_exceed_a_batch_of_the_server_wait(serve):
    server = serve(QUICKSTART, "--vllm", "--max-num-batched-tokens 128")  # of about 20 tokens, 32 at once
    status, text = outcome(server.fit(QUICKSTART))
    assert status == 0, text
    assert len(server.rows()) == 3


@pytest.mark.slow  # broadcasts are tested with the same model
def test_smollm2_trains_and_its_shared_head_is_renewed(serve):
    server = serve(SMOLLM2)
    status, text = outcome(server.fit(SMOLLM2))
    assert status == 0, text
    rows = server.rows()
    assert len(rows) == 3
    assert all(float(row["train/sampler_gap_max"]) <= 1e-3 for row in rows)


BROADCAST = ["--generation.engine.transfer", "broadcast"]


def test_weights_are_broadcast_to_a_server(serve):
    recipe = [*SMOLLM2, *BROADCAST]
    server = serve(recipe)
    before = set(Path("/dev/shm").glob("gear-weights-*"))
    status, text = outcome(server.fit(recipe))
    assert status == 0, text
    rows = server.rows()
    assert len(rows) == 3
    assert all(float(row["train/sampler_gap_max"]) <= 1e-3 for row in rows)
    assert set(Path("/dev/shm").glob("gear-weights-*")) <= before
    status, text = outcome(server.fit(SMOLLM2))  # with files
    assert status == 2, text
    assert "was started for weights by broadcast" in text


def test_a_server_survives_a_run_that_was_killed_and_samples_ahead_for_it_again(serve):
    recipe = [*QUICKSTART, *BROADCAST, "--generation.ahead", "1", "--model.objective.sampler_cap", "2.0"]
    server = serve(recipe)
    process = server.fit(recipe)
    until(lambda: server.rows() or process.poll() is not None, "the first iteration", limit=300)
    process.kill()
    process.wait(seconds(30))
    status, text = outcome(server.fit(recipe, "--ckpt_path", "last"))
    assert status == 0, text
    rows = server.rows()
    assert len(rows) == 3, "each iteration once"
    assert float(rows[-1]["train/staleness"]) == 1
    assert [(i, group) for i, group, _ in ledger(server.folder)] == [(g // 4, g) for g in range(12)]


OWN = [
    *QUICKSTART, *BROADCAST, "--generation.engine.start.python", str(ROOT / ".venv-vllm/bin/python"),
    "--generation.engine.start.kv_gib", "0.5",
]  # fmt: skip


def servers(folder: Path) -> list[int]:
    """Return the process groups of the servers that runs in a folder have started, as long as they have processes."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = stat.read_text().rsplit(")", 1)[1].split()[:3]
            command = Path(f"/proc/{group}/cmdline").read_text()
        except OSError:
            continue
        if state != "Z" and f"{folder}/vllm/" in command and "guard.py" not in command:
            found.add(int(group))
    return sorted(found)


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow  # in every run of the tests with a stand-in for vLLM
def test_a_run_starts_its_own_server_which_does_not_survive_it(tmp_path):
    command = [
        sys.executable, "-m", "gear_lightning", "fit", *OWN, "--trainer.default_root_dir", str(tmp_path),
        "--trainer.max_epochs", "3",
    ]  # fmt: skip
    metrics = tmp_path / "metrics.csv"

    def start(*options: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*command, *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def rows() -> list[dict[str, str]]:
        found = list(csv.DictReader(metrics.open())) if metrics.exists() else []
        return [row for row in found if row.get("train/sampler_gap_max")]

    process = start()
    until(lambda: rows() or process.poll() is not None, "the first iteration", limit=300)
    (group,) = servers(tmp_path)
    process.kill()
    process.wait(seconds(30))
    until(lambda: not group_lives(group), "the server and its workers end", limit=60)
    status, text = outcome(start("--ckpt_path", "last"))
    assert status == 0, text
    assert len(rows()) == 3, "each iteration once"
    assert all(float(row["train/sampler_gap_max"]) <= 1e-3 for row in rows())
    assert servers(tmp_path) == []


def test_a_head_that_keeps_its_old_weights_is_noticed(serve, tmp_path):
    """vLLM's own reload on CPUs does not renew the packed copy of a shared head, and no checksum shows it."""
    (tmp_path / "forgetful.py").write_text(
        "import gear_vllm\nfrom gear_vllm import GearWorker\ngear_vllm.repack_head = lambda model: None\n"
    )
    server = serve(SMOLLM2, "--vllm", "--worker-extension-cls forgetful.GearWorker", path=str(tmp_path))
    status, text = outcome(server.fit(SMOLLM2))
    assert status == 2, text
    assert "does not compute what the policy computes" in text
