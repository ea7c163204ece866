"""What training needs in bytes on each GPU, under each strategy: plain arithmetic on the model's shape.

The formulas follow what this project's code keeps alive, so they hold for decoders built like Llama and Qwen3 (RMS
norms, rotary positions, attention that never stores a score matrix). Lengths are the longest that the recipe allows: an
estimate is an upper bound for shorter rollouts. The CUDA context (about half a GiB) and fragmentation come on top.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from .errors import UserError
from .token_stats import LOGITS

Strategy = Literal["ddp", "fsdp", "zero1", "zero2", "zero3", "zero3_offload"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
SHARDED = ("fsdp", "zero3", "zero3_offload")  # weights are split over the GPUs
PRECISIONS = {  # bytes of a stored weight, and of the numbers that layers compute with
    "32-true": (4, 4), "bf16-mixed": (4, 2), "16-mixed": (4, 2), "bf16-true": (2, 2), "16-true": (2, 2),
}  # fmt: skip
ALIASES = {"None": "32-true", "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_live_parameters: ZeRO-3 keeps so many parameters gathered
DRAW_BYTES = 24  # per logit in engines.draw: logits and log-probs in float32, probabilities and their sum in float64


@dataclass(frozen=True)
class ModelShape:
    """A decoder's sizes.

    Args:
        parameters: all of them; a tied head counts once.
        trainable: those that the optimizer sees.
        embedding: parameters of the input embedding.
        head: parameters of the output head; 0 where it is tied to the embedding.
        layers: decoder layers.
        layer: parameters of the largest layer.
        largest: elements of the largest single parameter.
        hidden: width of the residual stream.
        intermediate: width of the MLP.
        gated: the MLP has a gate (three matrices in place of two).
        heads: attention heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        qk_norm: queries and keys are normalised (Qwen3).
        vocab: rows of the output head.
    """

    parameters: int
    trainable: int
    embedding: int
    head: int
    layers: int
    layer: int
    largest: int
    hidden: int
    intermediate: int
    gated: bool
    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: bool
    vocab: int

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one parameter."""
        return self.head == 0

    @property
    def root(self) -> int:
        """Parameters outside the layers, without norms."""
        return self.embedding + self.head


@dataclass(frozen=True)
class Load:
    """How much one GPU works on.

    Args:
        rows: rollouts in a micro-batch.
        length: tokens of a row, prompt included.
        sampled: tokens of a row that are scored.
        teacher_length: tokens of a row in the teacher's view; 0 where nothing is scored by a teacher.
        micro_batches: of one optimizer step.
        rollouts: rows that are generated together.
        prefill: tokens in one prefill forward.
    """

    rows: int
    length: int
    sampled: int
    teacher_length: int
    micro_batches: int
    rollouts: int
    prefill: int


@dataclass(frozen=True)
class Setup:
    """How training is done.

    Args:
        precision: as ``trainer.precision``.
        state_bytes: optimizer state per trainable parameter: 8 for Adam on float32.
        foreach: the optimizer works on all parameters at once and needs a copy of them for it (on GPUs, unless fused).
        teacher_parameters: parameters that the teacher keeps for itself; 0 for a live one or none.
        averaged: the teacher is a moving average, which is kept in float32 beside low-precision weights.
        activation_checkpointing: layers are computed again in backward.
        generation: how sharded weights are sampled from: ``gather`` a whole copy, or ``stream`` layer by layer.
        bucket: elements of a DeepSpeed reduce bucket (``reduce_bucket_size``).
        bucket_view: DDP's gradients are views of its buckets (``gradient_as_bucket_view``); else they are kept twice.
    """

    precision: str = "32-true"
    state_bytes: float = 8.0
    foreach: bool = True
    teacher_parameters: int = 0
    averaged: bool = True
    activation_checkpointing: bool = False
    generation: Literal["gather", "stream"] = "gather"
    bucket: int = 200_000_000
    bucket_view: bool = False


def precision_name(precision: Any) -> str:
    """``trainer.precision`` written out: ``bf16`` is ``bf16-mixed``.

    Raises:
        UserError: a precision that this project does not train in.
    """
    name = ALIASES.get(str(precision), str(precision))
    if name not in PRECISIONS:
        raise UserError(f"trainer.precision={precision}: doctor knows {', '.join(PRECISIONS)}")
    return name


def element_bytes(precision: Any) -> tuple[int, int]:
    """Bytes of a stored weight, and of a number that layers compute with."""
    return PRECISIONS[precision_name(precision)]


def model_shape(model: Any) -> ModelShape:
    """Sizes of a causal language model, which may lie on the meta device (`PolicySource.skeleton`).

    Raises:
        UserError: it has no decoder layers, or its config does not tell its width or heads.
    """
    from torch import nn

    config = model.config.get_text_config()
    body, head = model.get_decoder(), model.get_output_embeddings()
    blocks = next((part for part in body.modules() if isinstance(part, nn.ModuleList) and len(part)), None)
    names = {name.rpartition(".")[2] for name, _ in body.named_modules()}
    heads = getattr(config, "num_attention_heads", None)
    if blocks is None or head is None or heads is None:
        raise UserError(f"{type(model).__name__}: not a causal language model with decoder layers, heads and a head")
    hidden = config.hidden_size
    sizes = [p.numel() for p in model.parameters()]
    return ModelShape(
        parameters=sum(sizes),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        embedding=(embedding := model.get_input_embeddings().weight).numel(),
        head=0 if head.weight is embedding else head.weight.numel(),
        layers=len(blocks),
        layer=max(sum(p.numel() for p in block.parameters()) for block in blocks),
        largest=max(sizes),
        hidden=hidden,
        intermediate=getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden,
        gated=bool(names & {"gate_proj", "gate_up_proj"}),
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        qk_norm="q_norm" in names,
        vocab=head.weight.shape[0],
    )


def layer_activations(shape: ModelShape, precision: Any) -> int:
    """Bytes that autograd keeps of one layer for one token.

    Two norms (input in float32, normalised, output; under autocast the output is cast anew for each of five
    matrices), queries, keys, values and output of the attention with its log-sum-exp, and the MLP's inner numbers.
    """
    weight, compute = element_bytes(precision)
    outputs = 2 if weight == compute else 5
    norms = shape.hidden * (2 * 4 + 2 * weight + outputs * compute) + 2 * 4
    inner, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = (2 * inner + 2 * keys) * compute + shape.heads * 4
    if shape.qk_norm:
        attention += (inner + keys) * (4 + compute) + (shape.heads + shape.kv_heads) * 4
    return norms + attention + (4 if shape.gated else 2) * shape.intermediate * compute


def _passing(shape: ModelShape, precision: Any) -> int:
    """Bytes for one token that a layer holds while it works and nobody keeps: residual, norm and MLP."""
    weight, compute = element_bytes(precision)
    return shape.hidden * (2 * weight + compute) + 3 * shape.intermediate * compute


def _activations(shape: ModelShape, load: Load, setup: Setup) -> int:
    """What autograd keeps of the policy's forward, and the larger of what comes on top of it for a while: the teacher's
    forward, and the first layer of a backward that finds gradients there."""
    weight, _ = element_bytes(setup.precision)
    tokens = load.rows * load.length
    per_layer = layer_activations(shape, setup.precision)
    if setup.activation_checkpointing:
        kept = tokens * (shape.layers * shape.hidden * weight + per_layer)
    else:
        kept = tokens * shape.layers * per_layer
    kept += tokens * shape.hidden * (4 + 2 * weight)  # the last norm
    kept += load.rows * load.sampled * shape.hidden * weight  # what the head sees
    passing = max(load.rows * load.teacher_length, tokens if load.micro_batches > 1 else 0)
    return kept + passing * _passing(shape, setup.precision)


def _logits(shape: ModelShape, load: Load, setup: Setup) -> int:
    """The chunk of logits in `token_stats`: float32 logits, log-probs, probabilities and their product."""
    _, compute = element_bytes(setup.precision)
    wanted = load.rows * load.sampled
    chunk = min(wanted, max(1, LOGITS // shape.vocab))
    copies = 4 * 4 + (compute if compute < 4 else 0)
    if chunk == wanted and load.teacher_length:  # the policy's log-probs are kept while the teacher's are made
        copies += 4
    return chunk * shape.vocab * copies


def _kv_cache(shape: ModelShape, load: Load, setup: Setup) -> int:
    """Keys and values of all rows, and half of them once more: when most conversations are over, `CachedEngine` copies
    the rows of the others.

    Under autocast the keys come out of the rotation in float32, the values in low precision.
    """
    weight, compute = element_bytes(setup.precision)
    columns = -(-load.length // 64) * 64
    row = shape.layers * columns * shape.kv_heads * shape.head_dim * (weight + compute)
    return (load.rollouts + load.rollouts // 2) * row


def estimate(shape: ModelShape, strategy: Strategy, gpus: int, load: Load, setup: Setup = Setup()) -> dict[str, int]:
    """Bytes on each GPU.

    Args:
        shape: the model.
        strategy: how it is spread.
        gpus: processes over which it is spread, one on each GPU.
        load: what one GPU works on.
        setup: how training is done.

    Returns:
        Kept all the time: ``weights``, ``gradients`` (they live until the next backward), ``fp32_partition``
        (DeepSpeed's own copy of the trainable weights, in the precision of the weights), ``optimizer``, ``teacher``,
        ``teacher_shadow``, ``buckets`` (of the communication). In the update: ``autocast_copy``, ``gathered`` layers,
        ``reduce_buckets``, ``activations``, ``logits``, ``new_gradient`` (before it is added to the old), or else
        ``step_scratch`` in the optimizer's step. In the rollout phase: ``generation`` copy of weights, ``kv_cache``,
        ``sampling`` (prefill and the draws). Then ``update`` and ``rollout``, the sums of the two phases, which do not
        overlap, ``total``, the larger of them, and ``host``, in CPU memory for each GPU and part of no sum.

    Raises:
        UserError: no such strategy, or precision.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"strategy={strategy}: there are {', '.join(STRATEGIES)}")
    weight, compute = element_bytes(setup.precision)
    zero, sharded = strategy.startswith("zero"), strategy in SHARDED
    over = gpus if sharded else 1
    trained = shape.trainable
    part = {
        "weights": shape.parameters * weight // over,
        "gradients": trained * weight // (gpus if sharded or strategy == "zero2" else 1),
        "fp32_partition": trained * weight // gpus if zero else 0,
        "optimizer": int(trained * setup.state_bytes) // (1 if strategy == "ddp" else gpus),
        "teacher": setup.teacher_parameters * weight // over,
        "teacher_shadow": setup.teacher_parameters * 4 // over if setup.averaged and weight < 4 else 0,
        "buckets": 0,
    }
    host = 0
    if strategy == "zero3_offload":
        moved = ("weights", "gradients", "fp32_partition", "optimizer", "teacher")
        host = sum(part[name] for name in moved)
        part |= dict.fromkeys(moved, 0)
    if strategy == "ddp" and gpus > 1 and not setup.bucket_view:
        part["buckets"] = trained * weight
    elif zero and sharded:
        part["buckets"] = setup.bucket * weight
    kept = sum(part.values())

    low = weight > compute  # autocast
    # the cast copy of a weight lives until the end of the pass, so that sharding does not make it smaller
    cast = compute * (shape.parameters - (0 if shape.tied else shape.embedding)) if low else 0
    chunks = load.rows * load.sampled * shape.vocab > LOGITS
    added = setup.foreach and setup.state_bytes > 0
    update = {
        "autocast_copy": cast,
        "gathered": _gathered(shape, strategy, weight),
        # ZeRO-1 and 2 fill one bucket while the other is sent, and drop both after backward
        "reduce_buckets": 2 * setup.bucket * weight if zero and not sharded else 0,
        "activations": _activations(shape, load, setup),
        "logits": _logits(shape, load, setup),
        "new_gradient": min(shape.largest, trained) * weight if load.micro_batches > 1 or chunks else 0,
    }
    flat = trained * weight // gpus if zero and strategy != "zero3_offload" else 0  # DeepSpeed joins the gradients
    if strategy == "zero3_offload":
        scratch = 0
    elif added:
        scratch = flat + trained * weight // (1 if strategy == "ddp" else gpus)
    else:
        scratch = flat + 2 * min(shape.largest, trained) * weight
    rollout = {
        "generation": _generation(shape, strategy, setup, cast),
        "kv_cache": _kv_cache(shape, load, setup),
        "sampling": max(
            min(load.prefill, load.rollouts * load.length) * _passing(shape, setup.precision),
            load.rollouts * shape.vocab * DRAW_BYTES,
        ),
    }
    sums = {"update": kept + max(sum(update.values()), scratch), "rollout": kept + sum(rollout.values())}
    return {
        **part, **update, "step_scratch": scratch, **rollout, **sums, "total": max(sums.values()), "host": host,
    }  # fmt: skip


def _gathered(shape: ModelShape, strategy: Strategy, weight: int) -> int:
    """Whole weights of sharded layers in the update.

    FSDP2 holds embedding and head from forward to backward, a layer and the next one, and as much of their gradients;
    or, while the teacher scores, its embedding and head beside the policy's. ZeRO-3 keeps up to `LIVE_PARAMETERS`.
    """
    if strategy == "fsdp":
        pair = 2 * shape.layer
        share = shape.trainable / shape.parameters
        return int(weight * (shape.root + pair + max(share * (shape.root + pair), shape.root)))
    if strategy in SHARDED:
        return weight * min(shape.parameters, LIVE_PARAMETERS)
    return 0


def _generation(shape: ModelShape, strategy: Strategy, setup: Setup, cast: int) -> int:
    """What sampling needs beside the policy: nothing, its autocast copy, a gathered copy, or a few layers of it."""
    weight, compute = element_bytes(setup.precision)
    if strategy not in SHARDED:
        return cast
    if setup.generation == "gather":
        return shape.parameters * compute
    return weight * (shape.root + 2 * shape.layer)
