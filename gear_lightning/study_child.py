"""What runs of a study are forked from: a process that has done the imports, which are most of a short run's start."""

import logging
import os
import signal
import sys

for _name in ("torchao", "torch.utils._pytree"):  # where torchao is installed, transformers imports it, with a noise
    logging.getLogger(_name).setLevel(logging.ERROR)

import torch  # noqa: E402
import transformers.models.llama.modeling_llama  # noqa: E402, F401

from . import cli  # noqa: E402, F401
from .__main__ import main  # noqa: E402


def end_with_parent() -> None:
    """Be told to stop when the process that this one was forked from ends, which it does when a study is killed."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def fit(arguments: list[str], log: str) -> None:
    """One run: ``gear-lightning`` with these arguments, its output in a file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the study's to handle
    end_with_parent()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = ["gear-lightning", *arguments]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    main()
