"""A step that vLLM 0.32 on CPUs leaves out when it reloads weights. It runs in vLLM's processes."""

from typing import Any


def repack_head(model: Any) -> None:
    """Pack the output head again. vLLM 0.32 on CPUs computes with a packed copy, and a reload does not renew that of a
    head that shares the embedding's weight."""
    head = getattr(getattr(model, "language_model", model), "lm_head", None)
    if head is not None and getattr(head, "cpu_linear", None) is not None:
        head.quant_method.process_weights_after_loading(head)
