"""The cluster shared by all tests of this folder, and the table of their measurements."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkout import ROOT, SUPPORT
from slurm_cluster import Cluster, install

ROWS: list[dict[str, str]] = []


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster of two nodes. Tests are skipped, with the reason, if it cannot be started."""
    before = dict(os.environ)
    if (why := install()) is not None:
        pytest.skip(f"no Slurm cluster here: {why}")
    made = Cluster(Path(tempfile.mkdtemp(prefix="slurm-")))  # munge needs a path that all users can access
    os.environ.update(PYTHONPATH=os.pathsep.join([str(ROOT), str(SUPPORT)]), OMP_WAIT_POLICY="PASSIVE")
    for name in [n for n in os.environ if n.startswith(("SLURM_", "SBATCH_"))]:
        del os.environ[name]
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(made.folder, ignore_errors=True)
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def row() -> Callable[..., None]:
    """Adds a row to the table."""

    def add(what: str, result: str, seconds: float | None = None) -> None:
        ROWS.append({"what": what, "result": result, "seconds": "" if seconds is None else f"{seconds:.1f}"})

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not ROWS:
        return
    widths = [max(len(row[key]) for row in [*ROWS, {k: k for k in ROWS[0]}]) for key in ROWS[0]]
    terminalreporter.section("on the Slurm cluster")
    for row in [{k: k for k in ROWS[0]}, *ROWS]:
        terminalreporter.write_line("  ".join(v.ljust(w) for v, w in zip(row.values(), widths, strict=True)).rstrip())
    file = Path(os.environ.get("SLURM_RESULTS") or Path(str(config.cache.mkdir("slurm"))) / "results.json")
    file.write_text(json.dumps(ROWS, indent=1) + "\n")
    terminalreporter.write_line(f"(also in {file})")
