"""Engines under the import path that configurations of earlier runs name; see `gear_lightning.generation`."""

from .generation import CachedEngine, GenerateEngine
from .generation.engine import GenerationEngine

__all__ = ["CachedEngine", "GenerateEngine", "GenerationEngine"]
