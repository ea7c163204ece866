"""Sizes of a decoder, read from a model that may be without values, for estimates of memory."""

from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..logits import decoder


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder.

    Args:
        parameters: number of all parameters; a tied head counts once.
        trainable: number of parameters that the optimizer updates.
        embedding: parameters of the input embedding.
        head: parameters of the output head; 0 if it is tied to the embedding.
        layers: number of decoder layers.
        layer: parameters of the largest layer.
        largest: elements of the largest single parameter.
        hidden: width of the residual stream.
        intermediate: width of the MLP.
        gated: whether the MLP has a gate (three matrices instead of two).
        heads: number of attention heads.
        kv_heads: number of key and value heads.
        head_dim: width of a head.
        qk_norm: whether queries and keys are normalized (Qwen3).
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

    @property
    def adapted(self) -> bool:
        """Whether adapters are trained on frozen weights."""
        return self.trainable < self.parameters


def model_shape(model: Any) -> ModelShape:
    """Return the sizes of a causal language model, which may be on the meta device (`PolicySource.skeleton`).

    Raises:
        UserError: it has no decoder layers or no output head, or its config has no number of attention heads.
    """
    from torch import nn

    config = model.config.get_text_config()
    body, head = decoder(model), model.get_output_embeddings()
    blocks = next((part for part in body.modules() if isinstance(part, nn.ModuleList) and len(part)), None)
    names = {name.rpartition(".")[2] for name, _ in body.named_modules()}
    heads = getattr(config, "num_attention_heads", None)
    if blocks is None or head is None or heads is None:
        raise UserError(
            f"{type(model).__name__}: not a causal language model with decoder layers, attention heads and output head"
        )
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
        head_dim=_head_width(config) or hidden // heads,
        qk_norm="q_norm" in names,
        vocab=head.weight.shape[0],
    )


def _head_width(config: Any) -> int | None:
    """Return the width of a head that the config gives for all layers; None if there is none."""
    try:
        return getattr(config, "head_dim", None)
    except Exception:  # transformers raises an error of its own if layers differ
        return None
