"""``gear-lightning doctor``: estimate a recipe's memory per GPU under each strategy, and report its problems.

It does not run the recipe and allocates nothing: the model is built on the meta device, and `memory.py` computes the
estimates.
"""

import math
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..distributed.strategy_rules import check_replicas
from ..errors import UserError
from ..generation.cached_engine import CachedEngine
from ..generation.vllm_engine import VLLMEngine
from ..learning.head import head_in_float32
from ..module import GearModule
from ..recipes.checks import Machine, look_at_machine, problems
from ..recipes.memory import (
    STRATEGIES,
    Load,
    Setup,
    Strategy,
    element_bytes,
    estimate,
    precision_name,
)
from ..recipes.model_shape import ModelShape, model_shape
from ..recipes.recipe import Recipe, configured_gpus, read_recipe
from ..recipes.refusals import configured_strategy
from ..recipes.serving_memory import Served, block_of
from ..serving.launch import served_dtype
from . import parsers

GIB, MIB = 1 << 30, 1 << 20
ROWS = {  # component -> row name in the table
    "weights": "weights",
    "fp32_partition": "DeepSpeed's float32 weights",
    "optimizer": "optimizer state",
    "teacher": "teacher",
    "teacher_shadow": "teacher's float32 average",
    "gradients": "gradients",
    "buckets": "communication buckets",
    "parked_teacher": "update: parked teacher",
    "autocast_copy": "update: autocast copy",
    "gathered": "update: gathered layers",
    "activations": "update: activations",
    "logits": "update: logits chunk",
    "new_gradient": "update: a new gradient",
    "step_scratch": "step: optimizer's scratch",
    "generation": "rollout: copy of the weights",
    "kv_cache": "rollout: KV cache",
    "sampling": "rollout: prefill, sampling",
    "update": "update phase",
    "rollout": "rollout phase",
    "total": "PEAK",
    "host": "CPU memory: offloaded, parked",
    "loading": "CPU memory: loading",
    "saving": "CPU memory: saving",
}
TIGHT = 0.9  # share of the memory above which the CUDA context and fragmentation may exceed it


def skeleton_of(recipe: Recipe) -> Any:
    """Return the policy as it is trained, with its adapters, on the meta device."""
    return _adapted(recipe, recipe.module.source.skeleton())


def _adapted(recipe: Recipe, model: Any) -> Any:
    if recipe.module.lora is not None:
        recipe.module.lora.adapt(model)
    return model


@dataclass(frozen=True)
class OptimizerNeeds:
    """Bytes of state per parameter, and whether a step processes all parameters at once (``foreach``)."""

    state_bytes: float
    foreach: bool


def optimizer_needs(module: GearModule, dtype: torch.dtype, on_gpu: bool) -> OptimizerNeeds:
    """Measure the needs of the recipe's optimizer with a step on a small parameter.

    Raises:
        UserError: the optimizer cannot be created, or cannot take a step on the CPU.
    """
    parameter = torch.nn.Parameter(torch.zeros(64, 128, dtype=dtype))  # large enough for 8-bit states
    try:
        optimizer = module.optimizer([parameter])
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    except Exception as error:
        raise UserError(f"model.optimizer cannot take a step: {type(error).__name__}: {error}") from error
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    size = sum(t.numel() * t.element_size() for t in tensors if t.numel() > 1)
    asked = optimizer.defaults.get("foreach"), optimizer.defaults.get("fused")
    foreach = "foreach" in optimizer.defaults and not asked[1] and (on_gpu if asked[0] is None else bool(asked[0]))
    return OptimizerNeeds(size / parameter.numel(), foreach)


def load_of(recipe: Recipe, gpus: int) -> Load:
    """Return the load of one of ``gpus`` GPUs, with the longest rollouts that the budgets allow."""
    data, budgets = recipe.data, recipe.generation.budgets
    mine = math.ceil(data.tasks_per_iteration / gpus) * data.group_size
    rows = min(data.micro_batch_size, mine)
    together, prompt = mine, max(1, budgets.context - budgets.tokens)
    if data.val_tasks is not None:
        tasks = data.val_limit if data.val_tasks.size is None else min(data.val_limit, data.val_tasks.size)
        together = max(mine, min(data.eval_batch_size, math.ceil(tasks * data.val_rollouts / gpus)))
    engine = recipe.generation.engine
    prefill = engine.prefill_tokens if isinstance(engine, CachedEngine) else together * budgets.context
    return Load(
        rows=rows,
        length=budgets.context,
        sampled=min(budgets.tokens, budgets.context),
        # assume that the privileged text is as long as the rest; it is usually shorter
        teacher_length=2 * budgets.context if recipe.module.needs_teacher else 0,
        micro_batches=math.ceil(mine / rows) * data.inner_epochs,
        rollouts=together,
        prefill=min(prefill, together * prompt),
        served=isinstance(engine, VLLMEngine),
    )


def served_of(recipe: Recipe, shape: ModelShape, gpus: int, on_gpu: bool) -> Served | None:
    """Return what the servers of a recipe hold; None if it samples in the training processes."""
    engine = recipe.generation.engine
    if not isinstance(engine, VLLMEngine):
        return None
    together = gpus * min(load_of(recipe, gpus).rollouts, engine.requests)
    context = recipe.generation.budgets.context
    dtype = served_dtype(recipe.trainer["precision"], recipe.generation.weights_dtype)
    sizes = shape, dtype, context, together, block_of(on_gpu)
    if engine.start is None:
        return Served(tuple(engine.servers), *sizes)
    count = max(1, len(engine.start.gpus) // engine.start.gpus_per_server)
    return Served(("the run's machine",) * count, *sizes, option="generation.engine.start.kv_gib")


def setup_of(recipe: Recipe, trainable: int, options: dict[str, Any], on_gpu: bool) -> Setup:
    """Return how the recipe trains.

    Args:
        recipe: the recipe.
        trainable: number of parameters that the optimizer updates.
        options: options of the strategy, see `configured_strategy`.
        on_gpu: whether training runs on a GPU.
    """
    module, precision, generation = recipe.module, recipe.trainer["precision"], recipe.generation
    low = module.lora is None and element_bytes(precision)[0] < 4  # adapters are float32
    stored = torch.bfloat16 if low else torch.float32
    needs = optimizer_needs(module, stored, on_gpu)
    teacher = module.teacher_options
    # with adapters, a frozen teacher is the base model without the adapters
    shared = teacher.weights == "live" or (module.lora is not None and teacher.weights == "frozen")
    return Setup(
        precision=precision_name(precision),
        head_float32=head_in_float32(module.head_precision, precision_name(precision)),
        state_bytes=needs.state_bytes,
        float32_state_bytes=optimizer_needs(module, torch.float32, on_gpu).state_bytes,
        foreach=needs.foreach,
        teacher_parameters=0 if shared or not module.needs_teacher else trainable,
        averaged=teacher.weights == "ema",
        parked=teacher.park,
        activation_checkpointing=module.activation_checkpointing,
        generation="stream" if generation.weights == "stream" else "gather",
        generation_bytes=getattr(torch, generation.weights_dtype).itemsize if generation.weights_dtype else None,
        replicas=int(options.get("replicas") or 1),
        reshard=options.get("reshard_after_forward") is not False,
        bucket=int(options.get("bucket_size") or options.get("reduce_bucket_size") or Setup.bucket),
        bucket_view=bool(options.get("gradient_as_bucket_view")),
        offload_optimizer=bool(options.get("offload_optimizer")),
        saves_frozen=module.lora is None
        or recipe.options["warm_start"] is not None
        or module.source.published() is None,
    )


def columns(
    shape: ModelShape, gpus: int, load: Load, setup: Setup, chosen: str | None, available: float | None
) -> dict[Strategy, dict[str, int]]:
    """Return the estimates of all strategies: the recipe's with its options, the others as in configs/strategy.

    Args:
        shape: sizes of the model.
        gpus: number of processes.
        load: load of each process.
        setup: how the recipe trains.
        chosen: the recipe's strategy.
        available: GiB of a GPU; if a gathered copy of the weights does not fit, weights are streamed. None: it fits.
    """
    plain = Setup()
    theirs = {"replicas": plain.replicas, "reshard": plain.reshard, "bucket": plain.bucket}
    theirs |= {"bucket_view": plain.bucket_view, "offload_optimizer": plain.offload_optimizer}
    found = {}
    for strategy in STRATEGIES:
        mine = setup if strategy == chosen else replace(setup, **theirs)
        found[strategy] = estimate(shape, strategy, gpus, load, mine)
        if available is not None and found[strategy]["rollout"] > TIGHT * available * GIB:
            found[strategy] = estimate(shape, strategy, gpus, load, replace(mine, generation="stream"))
    return found


def estimate_of(recipe: Recipe, gpus: int, on_gpu: bool) -> tuple[ModelShape, dict[str, int]]:
    """Return the sizes of the recipe's model, and its memory estimate under the recipe's strategy.

    Raises:
        UserError: its strategy is unknown.
    """
    shape = model_shape(skeleton_of(recipe))
    chosen, options = configured_strategy(recipe.trainer)
    if chosen is None:
        raise UserError(f"trainer.strategy={recipe.trainer['strategy']}: not one of {', '.join(STRATEGIES)}")
    setup = setup_of(recipe, shape.trainable, options, on_gpu)
    return shape, estimate(shape, chosen, gpus, load_of(recipe, gpus), setup)


def _place(recipe: Recipe) -> str:
    return "process" if recipe.trainer["accelerator"] == "cpu" else "GPU"


def _cell(size: int, unit: int) -> str:
    places = 2 if unit == GIB else 1
    least = 10**-places
    return "-" if not size else f"{size / unit:.{places}f}" if size >= least * unit else f"<{least}"


def _verdict(total: int, memory: float | None) -> str:
    if memory is None:
        return ""
    return "no" if total > memory * GIB else "tight" if total > TIGHT * memory * GIB else "fits"


def table(
    shape: ModelShape, gpus: int, load: Load, setup: Setup, memory: float | None, chosen: str | None, place: str,
    auto: bool,
) -> Any:  # fmt: skip
    """Return a table of all strategies, in GiB (MiB if all values are small) per GPU or process.

    Args:
        shape: sizes of the model.
        gpus: number of processes.
        load: load of each process.
        setup: how the recipe trains.
        memory: GiB of a GPU; None if it is not known.
        chosen: the recipe's strategy.
        place: GPU or process.
        auto: whether weights are streamed if a copy does not fit (``generation.weights=auto``).
    """
    from rich.table import Table

    available = memory if auto else None
    found = columns(shape, gpus, load, setup, chosen, available)
    other = replace(setup, activation_checkpointing=not setup.activation_checkpointing)
    switched = {s: n["total"] for s, n in columns(shape, gpus, load, other, chosen, available).items()}
    out = Table(box=None, pad_edge=False, header_style="bold")
    largest = max(*(max(numbers.values()) for numbers in found.values()), *switched.values())
    unit, name = (GIB, "GiB") if largest >= GIB else (MIB, "MiB")
    out.add_column(f"{name} per {place}", no_wrap=True)
    for strategy in STRATEGIES:
        out.add_column(strategy + ("*" if strategy == chosen else ""), justify="right", no_wrap=True)
    for key, name in ROWS.items():
        values = [found[s][key] for s in STRATEGIES]
        if any(values):
            out.add_row(name, *(_cell(v, unit) for v in values), style="bold" if key == "total" else None)
        if key == "total" and memory is not None:
            out.add_row(f"in {memory:g} GiB", *(_verdict(v, memory) for v in values), style="bold")
    with_or_without = "without" if setup.activation_checkpointing else "with"
    out.add_row(f"PEAK {with_or_without} act. checkpointing", *(_cell(v, unit) for v in switched.values()))
    if memory is not None:
        out.add_row(f"in {memory:g} GiB", *(_verdict(v, memory) for v in switched.values()))
    return out


def doctor_command(argv: list[str]) -> int:
    """Run ``gear-lightning doctor --config RECIPE`` and return the exit status.

    Raises:
        UserError: an option or the recipe is invalid.
    """
    options, rest = parsers.doctor().parse_known_args(argv)
    if options.gpus is not None and options.gpus < 1:
        raise UserError(f"--gpus={options.gpus}: must be at least 1")
    if options.gpu_memory is not None and not options.gpu_memory > 0:
        raise UserError(f"--gpu-memory={options.gpu_memory:g}: must be above 0 GiB")
    if not any(a.split("=")[0] in ("--config", "-c") for a in rest):
        raise UserError("--config is missing: gear-lightning doctor --config configs/quickstart.yaml")
    machine = look_at_machine()
    recipe = read_recipe(rest)
    gpus = options.gpus or configured_gpus(recipe.trainer)
    chosen, strategy_options = configured_strategy(recipe.trainer)
    model = recipe.module.source.skeleton()
    found = problems(recipe, machine, model, gpus, chosen)
    on_gpu = recipe.trainer["accelerator"] != "cpu"
    console = _console()
    try:
        shape = model_shape(_adapted(recipe, model))
        setup = setup_of(recipe, shape.trainable, strategy_options, on_gpu)
        check_replicas(setup.replicas, gpus)
    except UserError as error:
        if str(error) not in found:
            raise
        _print_problems(console, found)
        console.print("\nThere are no estimates for this recipe.")
        return 2
    memory = options.gpu_memory or (min(machine.memory_gib) if machine.memory_gib and on_gpu else None)
    _show(console, recipe, machine, model, shape, load_of(recipe, gpus), setup, gpus, memory, chosen, found)
    return 0


def _console() -> Any:
    from rich.console import Console

    plain = not sys.stdout.isatty()
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=plain, width=200 if plain else None)
    console.width = max(console.width, 100)  # width of the table; a narrower terminal wraps it
    return console


def _print_problems(console: Any, found: list[str]) -> None:
    console.print("\nProblems and advice:" if found else "\nNo problems found.")
    for problem in found:
        console.print(f"- {problem}")


def _show(
    console: Any, recipe: Recipe, machine: Machine, model: Any, shape: ModelShape, load: Load, setup: Setup, gpus: int,
    memory: float | None, chosen: Strategy | None, found: list[str],
) -> None:  # fmt: skip
    place = _place(recipe)
    served = served_of(recipe, shape, gpus, place == "GPU")
    auto = recipe.generation.weights == "auto" and served is None  # servers get whole weights
    some = "" if shape.trainable == shape.parameters else f", {shape.trainable / 1e6:,.1f}M of them trained"
    teacher = recipe.module.teacher_options.weights if recipe.module.needs_teacher else "none"
    plural = "" if gpus == 1 else "es" if place == "process" else "s"
    console.print(
        f"model      {type(model).__name__}, {shape.parameters / 1e6:,.1f}M parameters{some}, {shape.layers} layers, "
        f"width {shape.hidden}, vocabulary {shape.vocab}\n"
        f"training   {gpus} {place}{plural}, {setup.precision}, optimizer state {setup.state_bytes:g} bytes per "
        f"parameter, teacher {teacher}, activation checkpointing {'on' if setup.activation_checkpointing else 'off'}\n"
        f"on each    {load.micro_batches} micro-batch{'es' * (load.micro_batches > 1)} of {load.rows} x "
        f"{load.length} tokens, {load.rollouts} rollouts generated together"
    )
    console.print("versions   " + ", ".join(f"{name} {v or 'none'}" for name, v in machine.versions.items()))
    console.print("GPUs here  " + (", ".join(machine.gpus) or "none") + "\n")
    console.print(table(shape, gpus, load, setup, memory, chosen, place, auto))
    streamed = memory is not None and auto
    console.print(
        "\nRollout and update alternate. Lengths are the longest that generation.budgets allows."
        + ("" if place == "process" else " The CUDA context (about 0.5 GiB)\nand fragmentation are not included.")
        + (
            f" *: the recipe's strategy, {chosen}, with its options; the others as in configs/strategy."
            if chosen
            else ""
        )
        + "\nCPU memory: offloaded or parked, for each GPU; loading the model, on rank 0 (ddp, zero1, zero2: on"
        "\nevery process); saving a checkpoint, on rank 0."
        + (" If a full copy of sharded weights does not fit, rollouts stream them." if streamed else "")
        + ("" if memory or place == "process" else " To see whether it fits, give --gpu-memory GIB.")
    )
    own = None if chosen is None else columns(shape, gpus, load, setup, chosen, memory if auto else None)[chosen]
    if served is not None:
        console.print(
            "\n" + served.describe(f"{gpus} {place}{plural}", place, memory, None if own is None else own["total"])
        )
    if memory is not None and own is not None and own["total"] > memory * GIB:
        found.append(f"the recipe's strategy, {chosen}, needs more than {memory:g} GiB per {place}")
    _print_problems(console, found)
