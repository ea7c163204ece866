"""Post-train LLM agents with GEAR (granularity-adaptive advantage reweighting) on PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gear_lightning.callbacks.generation import GenerationCallback

    from .credit import GEAR
    from .data import RolloutDataModule
    from .module import GearModule

__version__ = "0.1.0"
__all__ = ["GEAR", "GearModule", "GenerationCallback", "RolloutDataModule", "__version__"]

_HOMES = {
    "GEAR": "credit",
    "GearModule": "module",
    "GenerationCallback": "callbacks.generation",
    "RolloutDataModule": "data",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Import a public class when it is first asked for: the command line starts without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
