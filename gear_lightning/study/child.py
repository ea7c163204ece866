"""Process from which the runs of a study are forked: it has done the imports, most of a short run's startup time."""

import contextlib
import io
import logging
import os
import signal
import sys
from typing import Any

for _name in ("torchao", "torch.utils._pytree"):  # transformers imports an installed torchao, which logs warnings
    logging.getLogger(_name).setLevel(logging.ERROR)

import torch  # noqa: E402
import transformers.models.llama.modeling_llama  # noqa: E402, F401

from ..__main__ import main  # noqa: E402
from ..errors import UserError, one_line  # noqa: E402
from ..recipes import cli  # noqa: E402, F401
from ..recipes.recipe import configured_gpus, read_recipe, refused  # noqa: E402
from ..recipes.refusals import skeleton_of  # noqa: E402


def end_with_parent() -> None:
    """Make the kernel send SIGTERM to this process when its parent ends, for example because the study was killed."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def fit(arguments: list[str], log: str) -> None:
    """Run ``gear-lightning`` with these arguments, and write its output to a file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the study handles Ctrl-C
    end_with_parent()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = ["gear-lightning", *arguments]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    main()


def check_recipes(recipes: dict[str, list[str]], told: Any) -> None:
    """Parse and check the arguments of runs, as ``fit`` does, without starting a run.

    Args:
        recipes: name -> arguments of ``fit``.
        told: a connection; it receives the name of the first recipe that cannot run, with the reason, or None.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    for name, arguments in recipes.items():
        if problem := _problem(arguments):
            told.send(f"{name}: {problem}")
            return
    told.send(None)


def _problem(arguments: list[str]) -> str | None:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            recipe = read_recipe(arguments)
            model = skeleton_of(recipe.module.source)
            return next(iter(refused(recipe, model, configured_gpus(recipe.trainer))), None)
    except UserError as error:
        return str(error)
    except SystemExit:  # raised by the parser, which has printed the reason
        before, found, after = said.getvalue().partition("error: ")
        return (after if found else before).strip()
    except Exception as error:
        return one_line(error)  # None: `fit` raises it again, and its log has the traceback
