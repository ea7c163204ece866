"""Chat templates, rollout budgets, and the engines that sample tokens."""

from .cached_engine import CachedEngine
from .engine import GenerationEngine, Sampling
from .generate_engine import GenerateEngine

__all__ = ["CachedEngine", "GenerateEngine", "GenerationEngine", "Sampling"]
