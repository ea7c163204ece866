"""Decoder and logits of a causal language model, for training and for sampling.

Both compute logits from hidden states, because only some tokens need them. What a model's own forward does between its
decoder and its logits is therefore repeated here: the output head, a scale and a soft-cap from its configuration.
`learning.token_stats.check_head` compares the result with the model's own logits.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, Muse: logits * value
DIVISOR = "logits_scaling"  # Granite: logits / value
MULTIPLIES = "hyperclovax"  # model types that multiply by `DIVISOR` begin with this
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma; RecurrentGemma; xLSTM


@dataclass(frozen=True)
class LogitTransform:
    """What a model does with the output of its head: ``cap * tanh(scale * x / cap)``, without a cap ``scale * x``."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the transformed logits, in float32 if anything changes."""
        if self.scale != 1:
            logits = logits.float() * self.scale
        if self.cap is not None:
            logits = self.cap * (logits.float() / self.cap).tanh()
        return logits

    def __str__(self) -> str:
        cap = "" if self.cap is None else f", soft cap {self.cap:g}"
        return f"scale {self.scale:g}{cap}"


def logit_transform(config: Any) -> LogitTransform:
    """Return the transformation that a model's configuration describes."""
    text, scale = config.get_text_config(), 1.0

    def number(name: str) -> float | None:
        value = getattr(text, name, None)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    for name in FACTORS:
        if (factor := number(name)) is not None:
            scale *= factor
    if divisor := number(DIVISOR):
        multiplies = str(getattr(text, "model_type", "")).startswith(MULTIPLIES)
        scale = scale * divisor if multiplies else scale / divisor
    cap = next((cap for name in CAPS if (cap := number(name))), None)
    return LogitTransform(scale, cap)


def decoder(model: Any) -> Any:
    """Return the part of a causal language model that computes the hidden states."""
    found = model.get_decoder()
    # Llama 4 of transformers 5.23 returns itself, because the prefix in its class names a part that it does not have
    return found.model if hasattr(found, "lm_head") else found


def tokenizer_ids(tokenizer: Any) -> int:
    """Return the number of ids of a tokenizer: its highest id + 1."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def keep_to_tokenizer(model: Any, tokenizer: Any) -> Any:
    """Exclude the ids beyond the tokenizer from the model's distribution from now on, and return the model.

    Vocabularies are padded to round sizes. Engines, trainer and teacher all compute log-probs of the ids of the
    tokenizer alone. If only the engine excluded the others, it would sample from another distribution than the one
    whose gradient is taken, by a factor that no ratio of log-probs shows.
    """
    model.tokenizer_ids = tokenizer_ids(tokenizer)
    return model


def output_logits(model: Any, hidden: Tensor) -> Tensor:
    """Return the logits [..., ids] of hidden states [..., hidden]: of all ids, or see `keep_to_tokenizer`."""
    logits = model.get_output_embeddings()(hidden)
    known = getattr(model, "tokenizer_ids", logits.shape[-1])
    # slicing only if needed: its backward pass fills a tensor as large as the logits
    return logit_transform(model.config)(logits if known >= logits.shape[-1] else logits[..., :known])
