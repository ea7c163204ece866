"""``gear-lightning serve``: start the vLLM server that a recipe's rollouts are sampled with."""

import os
import signal
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..generation.vllm_engine import VLLMEngine, logprobs_mode
from ..recipes.recipe import Recipe, read_recipe
from ..serving.launch import FOLDER, Launch, served_dtype, write_model
from . import parsers

PYTHON = Path(".venv-vllm/bin/python")


def serve_command(argv: list[str]) -> int:
    """Run ``gear-lightning serve --config RECIPE``: replace this process by vLLM's.

    Raises:
        UserError: an option or the recipe is invalid, or vLLM is not installed.
    """
    given, rest = parsers.serve().parse_known_args(argv)
    if not any(a.split("=")[0] in ("--config", "-c") for a in rest):
        raise UserError("--config is missing: gear-lightning serve --config RECIPE")
    python = vllm_python(given.python)
    recipe = read_recipe(rest)
    if not isinstance(recipe.generation.engine, VLLMEngine):
        raise UserError(
            f"the recipe samples with {type(recipe.generation.engine).__name__}; add "
            "--generation.engine gear_lightning.generation.VLLMEngine, here and in fit"
        )
    if recipe.generation.engine.start is not None:
        raise UserError("the run starts its servers itself (generation.engine.start); leave start out to use serve")
    launch = launch_of(recipe, given, python)
    write_model(recipe.module.source.skeleton(), recipe.module.source.tokenizer(), launch.model)
    print(f"vLLM server for {launch.model.parent}: http://{launch.host}:{launch.port}", flush=True)
    command = launch.command()
    if given.keep_serving:
        command[1:3] = [str(FOLDER / "start_vllm.py")]  # in the place of -m MODULE
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})
    os.execve(command[0], command, launch.environment())


def vllm_python(given: Path | None) -> Path:
    """Return the Python of vLLM's environment.

    Raises:
        UserError: there is none.
    """
    python = (given or PYTHON).absolute()
    if not python.exists():
        how = (
            "--python names no file"
            if given
            else "install vLLM in an environment of its own (make vllm), or give --python"
        )
        raise UserError(f"{python}: there is no such Python; {how}")
    return python


def launch_of(recipe: Recipe, given: Any, python: Path) -> Launch:
    """Return the server for a recipe.

    Raises:
        UserError: it cannot give the log-probs that learning needs.
    """
    engine = recipe.generation.engine
    assert isinstance(engine, VLLMEngine)
    cpu = recipe.trainer["accelerator"] == "cpu" or not torch.cuda.is_available()
    return Launch(
        python=python,
        model=Path(recipe.trainer["default_root_dir"] or ".").absolute() / "served_model",
        dtype=served_dtype(recipe.trainer["precision"], recipe.generation.weights_dtype),
        context=recipe.generation.budgets.context,
        logprobs_mode=logprobs_mode(recipe.generation.sampling) or "raw_logprobs",
        transfer=engine.transfer,
        host=given.host,
        port=given.port,
        cpu=cpu,
        kv_gib=given.kv_gib,
        options=given.vllm,
    )
