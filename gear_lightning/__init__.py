"""Post-train LLM agents with GEAR (granularity-adaptive advantage reweighting) on PyTorch Lightning."""

__version__ = "0.1.0"
