"""From messages to sampled tokens: chat templates, budgets, and the engines that sample."""

from .cached_engine import CachedEngine
from .engine import GenerationEngine, Sampling
from .generate_engine import GenerateEngine

__all__ = ["CachedEngine", "GenerateEngine", "GenerationEngine", "Sampling"]
