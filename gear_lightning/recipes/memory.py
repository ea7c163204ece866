"""Estimate the bytes that training needs on each GPU under each strategy, from the model's shape.

The formulas follow the tensors that this package's code keeps in memory. They apply to decoders built like Llama and
Qwen3 (RMS norms, rotary positions, attention that never stores a score matrix). Lengths are the longest that the recipe
allows: an estimate is an upper bound for shorter rollouts. The CUDA context (about 0.5 GiB) and fragmentation are not
included.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..distributed.strategy_rules import check_replicas
from ..errors import UserError
from ..learning.token_stats import LOGITS
from .model_shape import ModelShape

Strategy = Literal["ddp", "fsdp", "zero1", "zero2", "zero3", "zero3_offload"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
SHARDED = ("fsdp", "zero3", "zero3_offload")  # strategies that shard the weights over the GPUs
PRECISIONS = {  # bytes of a stored weight, and of a value in computations of layers
    "32-true": (4, 4), "bf16-mixed": (4, 2), "16-mixed": (4, 2), "bf16-true": (2, 2), "16-true": (2, 2),
}  # fmt: skip
ALIASES = {"None": "32-true", "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_live_parameters: the number of parameters that ZeRO-3 keeps gathered
DRAW_BYTES = 24  # per logit in generation.engine.draw: float32 logits and log-probs, float64 probabilities and sum


@dataclass(frozen=True)
class Load:
    """The work of one GPU.

    Args:
        rows: rollouts in a micro-batch.
        length: tokens of a row, including the prompt.
        sampled: tokens of a row that are scored.
        teacher_length: tokens of a row in the teacher's view; 0 without a teacher.
        micro_batches: micro-batches of one optimizer step.
        rollouts: rows that are generated together.
        prefill: tokens in one prefill forward.
        served: whether servers sample, so that this GPU holds no keys and values.
    """

    rows: int
    length: int
    sampled: int
    teacher_length: int
    micro_batches: int
    rollouts: int
    prefill: int
    served: bool = False


@dataclass(frozen=True)
class Setup:
    """How the recipe trains.

    Args:
        precision: ``trainer.precision``.
        state_bytes: bytes of optimizer state per trainable parameter: 8 for Adam on float32, and adapters are always
            float32.
        float32_state_bytes: the same for float32 parameters, which DeepSpeed's optimizer always uses.
        foreach: whether the optimizer processes all parameters at once, which needs a copy of them (on GPUs, unless
            fused).
        teacher_parameters: number of parameters that the teacher stores itself; 0 for a live teacher or none.
        averaged: whether the teacher is a moving average; a float32 average is kept in addition to low-precision
            weights.
        parked: whether the teacher is in CPU memory while it does not score.
        activation_checkpointing: whether layers are recomputed in backward.
        generation: how to sample with sharded weights: ``gather`` a full copy, or ``stream`` layer by layer.
        generation_bytes: bytes per weight of the copy for sampling. None: as gathered by the strategy.
        replicas: number of copies of the weights over all GPUs (FSDP2's hybrid sharding).
        reshard: whether FSDP2 frees a layer's gathered weights after its forward.
        bucket: elements of a DeepSpeed reduce bucket (``bucket_size``).
        bucket_view: whether DDP's gradients are views of its buckets (``gradient_as_bucket_view``); if not, they are
            stored twice.
        offload_optimizer: whether DeepSpeed keeps gradients, its partition and the optimizer state in CPU memory.
        head_float32: whether the output head computes in float32 if the layers do not (``model.head_precision``).
        saves_frozen: whether checkpoints also hold frozen weights, because these are not available elsewhere.
    """

    precision: str = "32-true"
    state_bytes: float = 8.0
    float32_state_bytes: float = 8.0
    foreach: bool = True
    teacher_parameters: int = 0
    averaged: bool = True
    parked: bool = False
    activation_checkpointing: bool = False
    generation: Literal["gather", "stream"] = "gather"
    generation_bytes: int | None = None
    replicas: int = 1
    reshard: bool = True
    bucket: int = 50_000_000
    bucket_view: bool = True
    offload_optimizer: bool = False
    head_float32: bool = False
    saves_frozen: bool = True


def precision_name(precision: Any) -> str:
    """Return the full name of ``trainer.precision``: ``bf16`` is ``bf16-mixed``.

    Raises:
        UserError: the precision is not supported.
    """
    name = ALIASES.get(str(precision), str(precision))
    if name not in PRECISIONS:
        raise UserError(f"trainer.precision={precision}: doctor supports {', '.join(PRECISIONS)}")
    return name


def element_bytes(precision: Any) -> tuple[int, int]:
    """Return the bytes of a stored weight, and of a value in computations of layers."""
    return PRECISIONS[precision_name(precision)]


def layer_activations(shape: ModelShape, precision: Any) -> int:
    """Return the bytes that autograd keeps of one layer for one token if all its weights are trained.

    These are two norms (input in float32, normalized, output; under autocast the output is cast again for each of five
    matrices), queries, keys, values and output of the attention with its log-sum-exp, and the MLP's inner activations.
    With adapters on all layers it is a few percent less.
    """
    return _layer(shape, *element_bytes(precision))


def _layer(shape: ModelShape, weight: int, compute: int) -> int:
    outputs = 2 if weight == compute else 5
    norms = shape.hidden * (2 * 4 + 2 * weight + outputs * compute) + 2 * 4
    inner, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = (2 * inner + 2 * keys) * compute + shape.heads * 4
    if shape.qk_norm:
        attention += (inner + keys) * (4 + compute) + (shape.heads + shape.kv_heads) * 4
    return norms + attention + (4 if shape.gated else 2) * shape.intermediate * compute


def _passing(shape: ModelShape, weight: int, compute: int) -> int:
    """Return the bytes per token that a layer holds only while it computes: residual, norm and MLP."""
    return shape.hidden * (2 * weight + compute) + 3 * shape.intermediate * compute


def _activations(shape: ModelShape, load: Load, setup: Setup, weight: int, compute: int) -> int:
    """Return the bytes that autograd keeps of the policy's forward, plus the larger of two temporary amounts.

    These are the teacher's forward, and the first layer of a backward pass that accumulates into existing gradients.
    """
    tokens = load.rows * load.length
    per_layer = _layer(shape, weight, compute)
    if setup.activation_checkpointing:
        kept = tokens * (shape.layers * shape.hidden * weight + per_layer)
    else:
        kept = tokens * shape.layers * per_layer
    kept += tokens * shape.hidden * (4 + 2 * weight)  # the last norm
    kept += load.rows * load.sampled * shape.hidden * weight  # input of the head
    passing = max(load.rows * load.teacher_length, tokens if load.micro_batches > 1 else 0)
    return kept + passing * _passing(shape, weight, compute)


def _logits(shape: ModelShape, load: Load, setup: Setup, weight: int, compute: int) -> int:
    """Return the bytes of a chunk of logits in `token_stats`.

    The chunk has float32 logits, log-probs, probabilities and their product. A float32 head with low-precision weights
    first casts the weights, and has a float32 gradient of them.
    """
    wanted = load.rows * load.sampled
    chunk = min(wanted, max(1, LOGITS // shape.vocab))
    copies = 4 * 4 + (compute if compute < 4 and not setup.head_float32 else 0)
    if chunk == wanted and load.teacher_length:  # the policy's log-probs are kept while the teacher's are computed
        copies += 4
    cast = 2 * 4 * shape.vocab * shape.hidden if setup.head_float32 and weight < 4 else 0
    return chunk * shape.vocab * copies + cast


def _kv_cache(shape: ModelShape, load: Load, weight: int, compute: int) -> int:
    """Return the bytes of keys and values of all rows.

    One layer is added twice: once selected for the unfinished rows, and once repeated for all heads. Under autocast,
    rotated keys are float32 and values are low precision.
    """
    columns = -(-load.length // 64) * 64
    layer = load.rollouts * columns * shape.head_dim * (weight + compute)
    repeated = shape.heads if shape.heads > shape.kv_heads else 0
    return layer * (shape.layers * shape.kv_heads + shape.kv_heads + repeated)


def estimate(shape: ModelShape, strategy: Strategy, gpus: int, load: Load, setup: Setup = Setup()) -> dict[str, int]:
    """Return the bytes on each GPU, by component.

    Args:
        shape: sizes of the model.
        strategy: the strategy.
        gpus: number of processes, one per GPU.
        load: the work of one GPU.
        setup: how the recipe trains.

    Returns:
        Always in memory: ``weights``, ``fp32_partition`` (DeepSpeed's own float32 copy of the trainable weights),
        ``optimizer``, ``teacher``, ``teacher_shadow``, ``buckets`` (of the communication). In the update:
        ``gradients`` (ZeRO-3 always allocates them), ``parked_teacher`` while it scores, ``autocast_copy``,
        ``gathered`` layers, ``reduce_buckets``, ``activations``, ``logits``, ``new_gradient`` (before it is added to
        the old one), or instead ``step_scratch`` in the optimizer's step. In the rollout phase: ``generation`` copy of
        weights, ``kv_cache``, ``sampling`` (prefill and sampling of tokens). Then ``update`` and ``rollout``, the sums
        of the two phases, which do not overlap, and ``total``, the larger of them. In CPU memory, not part of any sum:
        ``host``, per GPU; ``loading``, of a process that loads the model; ``saving``, of rank 0 while it writes a
        checkpoint: a copy of it.

    Raises:
        UserError: the strategy or precision is unknown, or the replicas do not divide the number of GPUs.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"strategy={strategy}: there are {', '.join(STRATEGIES)}")
    check_replicas(setup.replicas, gpus)
    weight, compute = element_bytes(setup.precision)
    mixed = weight > compute  # autocast
    zero, sharded = strategy.startswith("zero"), strategy in SHARDED
    offload = zero and (setup.offload_optimizer or strategy == "zero3_offload")
    over = (gpus // setup.replicas if strategy == "fsdp" else gpus) if sharded else 1
    states_over = 1 if strategy == "ddp" else over if sharded else gpus
    trained, frozen = shape.trainable, shape.parameters - shape.trainable
    kind = 4 if shape.adapted else weight  # bytes of a trained weight: adapters are float32
    # FSDP2 gathers in bfloat16, and a whole layer computes in it; with autocast alone, values between matrices are
    # float32
    flow = compute if strategy == "fsdp" and setup.precision == "bf16-mixed" else weight
    kept = {
        "weights": (frozen * weight + trained * kind) // over,
        "fp32_partition": trained * 4 // gpus if zero else 0,
        "optimizer": int(trained * (setup.float32_state_bytes if zero else setup.state_bytes)) // states_over,
        "teacher": setup.teacher_parameters * kind // over,
        "teacher_shadow": setup.teacher_parameters * 4 // over if setup.averaged and kind < 4 else 0,
    }
    # summed in float32 over several micro-batches and over the ranks of ddp, then rounded to the weights' precision
    summed = 4 if zero or load.micro_batches > 1 or (strategy == "ddp" and gpus > 1) else kind
    gradients = trained * summed // (gpus if strategy == "zero2" else over)
    rounded = 0 if zero else gradients - trained * kind // over
    saved = trained * kind + (frozen * weight if setup.saves_frozen else 0)
    saved += setup.teacher_parameters * kind + kept["optimizer"] * states_over + kept["teacher_shadow"] * over
    moved = ["teacher", "teacher_shadow"] if setup.parked else []
    parked = kept["teacher"] if setup.parked else 0
    if offload:
        moved += [
            "fp32_partition",
            "optimizer",
            *(("weights", "teacher", "teacher_shadow") if strategy == "zero3_offload" else ()),
        ]
    host = sum(kept[name] for name in set(moved))
    kept |= dict.fromkeys(moved, 0)
    if offload and strategy != "zero1":
        host, gradients = host + gradients, 0
    buckets = 0
    # DDP has no buckets for low-precision weights, whose gradients are reduced in float32
    bucketed = strategy == "ddp" and gpus > 1 and kind == 4
    if bucketed and not setup.bucket_view:
        buckets = trained * kind
    elif zero:  # sent in float32; ZeRO-1 and 2 fill one bucket while the other is sent
        buckets = setup.bucket * 4 * (1 if sharded else 2)
    # also in memory during rollouts: DDP's gradients are in its buckets, and ZeRO-3 keeps its gradients allocated
    standing = sum(kept.values()) + (gradients + buckets if zero and sharded else 0)
    standing += gradients if bucketed else 0
    growing = sum(kept.values()) + gradients + buckets - standing

    chunks = load.rows * load.sampled * shape.vocab > LOGITS
    update = {
        "parked_teacher": parked,
        # DeepSpeed's own linear layer keeps no copy
        "autocast_copy": _casts(shape, setup, compute) if mixed and flow == weight and not (zero and sharded) else 0,
        "gathered": _gathered(shape, strategy, setup, weight, flow),
        "activations": _activations(shape, load, setup, flow, compute),
        "logits": _logits(shape, load, setup, flow, compute),
        "new_gradient": min(shape.largest, trained) * kind if load.micro_batches > 1 or chunks else 0,
    }
    size = 4 if zero else kind
    scratch = trained * 4 // gpus if zero else 0  # DeepSpeed concatenates the gradients
    if offload:
        scratch = 0
    elif setup.foreach and setup.state_bytes:
        scratch += trained * size // states_over
    else:  # DeepSpeed's optimizer has one parameter
        scratch += 2 * (trained * size // gpus if zero else min(shape.largest, trained) * kind // over)
    # there are no gradients in the first forward of an iteration; they are allocated while activations are freed
    first = sum(update.values()) + (growing if load.micro_batches > 1 else 0)
    last_layer = load.rows * load.length * _layer(shape, flow, compute) + update["gathered"]
    rollout = _rollout(shape, strategy, load, setup, flow)
    sums = {
        "update": standing + max(first, growing + max(scratch - rounded, last_layer)),
        "rollout": standing + sum(rollout.values()),
    }
    return {
        **kept, "gradients": gradients, "buckets": buckets, **update, "step_scratch": scratch, **rollout, **sums,
        "total": max(sums.values()), "host": host, "loading": 4 * shape.parameters,
        "saving": saved,
    }  # fmt: skip


def _casts(shape: ModelShape, setup: Setup, compute: int) -> int:
    """Return the bytes of low-precision copies of weights under autocast.

    The copy of a trained weight is kept until the end of the pass, so sharding does not make it smaller. The copy of a
    frozen weight is kept as long as backward needs it.
    """
    if setup.activation_checkpointing and shape.adapted:
        return compute * shape.trainable
    if setup.head_float32:
        return compute * (shape.parameters - shape.root)
    return compute * (shape.parameters - (0 if shape.tied else shape.embedding))


def _gathered(shape: ModelShape, strategy: Strategy, setup: Setup, weight: int, flow: int) -> int:
    """Return the bytes of gathered weights of sharded layers in the update.

    FSDP2 holds embedding and head from forward to backward, a layer and the next one, and gradients of the same size
    (and those of a layer in float32, to reduce them); or, while the teacher scores, its embedding and head in addition
    to the policy's. ZeRO-3 keeps up to `LIVE_PARAMETERS` and prefetches as many, twice for the teacher's.
    """
    if strategy == "fsdp":
        share, some = shape.trainable / shape.parameters, shape.root + 2 * shape.layer
        whole = some if setup.reshard else shape.parameters
        reduced = 4 * shape.layer if flow < 4 else 0
        return int(flow * whole + max(share * (flow * some + reduced), flow * shape.root))
    if strategy not in SHARDED:
        return 0
    held, teacher = (min(n, LIVE_PARAMETERS) for n in (shape.parameters, setup.teacher_parameters))
    return weight * (held + max(held, 2 * teacher))


def _rollout(shape: ModelShape, strategy: Strategy, load: Load, setup: Setup, flow: int) -> dict[str, int]:
    """Return the bytes of sampling: a copy of the weights, the KV cache and the forwards.

    The copy is nothing, the autocast copy of the policy's own weights, a gathered copy, or a few gathered layers.
    """
    weight, compute = element_bytes(setup.precision)
    sharded, wanted = strategy in SHARDED, setup.generation_bytes or flow
    frozen = sharded or shape.trainable < shape.parameters  # then the cast of a weight is freed after its use
    if sharded and setup.generation == "stream":
        wanted, copy = flow, flow * (shape.root + 2 * shape.layer)
    else:
        copy = shape.parameters * wanted if sharded or wanted != weight else 0
    if wanted > compute and weight > compute:
        copy += compute * shape.largest if frozen or copy else _casts(shape, setup, compute)
    values = min(wanted, compute) if weight > compute else wanted
    return {
        "generation": copy,
        "kv_cache": 0 if load.served else _kv_cache(shape, load, wanted, values),
        "sampling": 0
        if load.served
        else max(
            min(load.prefill, load.rollouts * load.length) * _passing(shape, wanted, values),
            load.rollouts * shape.vocab * DRAW_BYTES,
        ),
    }
