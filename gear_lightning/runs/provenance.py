"""The version of the code that wrote a file: the package's version, and the commit if it is known."""

import json
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@cache
def code_version() -> dict[str, str | None]:
    """Return ``version`` and ``commit`` of this package.

    The commit is that of the checkout from which the package is imported, with ``+changes`` if its files were changed,
    or that of a pip install from a repository (``direct_url.json``, PEP 610). It is None if neither is known.
    """
    from .. import __version__

    return {"version": __version__, "commit": _of_checkout() or _of_install()}


def _of_checkout() -> str | None:
    if not (ROOT / ".git").exists():  # a repository in a parent folder is another project
        return None
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return None
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "gear_lightning", "callbacks")
    return commit + "+changes" if changed else commit


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _of_install() -> str | None:
    try:
        origin = json.loads(distribution("gear_lightning").read_text("direct_url.json") or "{}")
        commit = origin.get("vcs_info", {}).get("commit_id")
    except (PackageNotFoundError, ValueError, AttributeError):
        return None
    return commit if isinstance(commit, str) else None
