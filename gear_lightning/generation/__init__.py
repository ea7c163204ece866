"""Chat templates, rollout budgets, and the engines that sample tokens."""

from .cached_engine import CachedEngine
from .engine import GenerationEngine, Sampling
from .generate_engine import GenerateEngine
from .vllm_colocated import ColocatedVLLM
from .vllm_engine import VLLMEngine

__all__ = ["CachedEngine", "ColocatedVLLM", "GenerateEngine", "GenerationEngine", "Sampling", "VLLMEngine"]
