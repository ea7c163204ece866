"""The longest row that a model can score, from its configuration."""

from dataclasses import dataclass
from typing import Any

LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")  # keys of the number of positions


@dataclass(frozen=True)
class Longest:
    """Longest row that a model scores independently of the other rows of a micro-batch.

    Attributes:
        tokens: length of the row.
        why: what limits it, worded to follow "is more than".
    """

    tokens: int
    why: str


def longest_row(config: Any, name: str) -> Longest | None:
    """Return the longest row of a model; None if there is no limit.

    Args:
        config: of a Hugging Face model.
        name: of the model, for messages.
    """
    text = config.get_text_config()
    positions = next((n for key in LENGTHS if isinstance(n := getattr(text, key, None), int) and n > 0), None)
    found = [] if positions is None else [Longest(positions, f"the {positions} positions of {name}")]
    for kind, length in _rope_changes(text, positions):
        found.append(
            Longest(
                length,
                f"{length} tokens, above which the rotary frequencies of {name} (rope_type {kind}) depend on the "
                "longest row of a micro-batch",
            )
        )
    return min(found, key=lambda limit: limit.tokens, default=None)


def _rope_changes(text: Any, positions: int | None) -> list[tuple[str, int]]:
    """Return the kinds of rotary embeddings whose frequencies depend on the length, and the length from which they do.

    See ``dynamic_rope_update`` of transformers.
    """
    given = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    layers = [p for p in given.values() if isinstance(p, dict)] or [given]  # one for each kind of layer, or one for all
    found = []
    for parameters in layers:
        kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
        original = parameters.get("original_max_position_embeddings")
        original = original or getattr(text, "original_max_position_embeddings", None) or positions
        if kind == "longrope" and original:
            found.append((kind, int(original)))
        elif "dynamic" in kind and positions:
            found.append((kind, positions))
    return found
