"""Budgets under the import path of earlier versions; see `gear_lightning.generation.budgets`."""

from .generation.budgets import Budgets

__all__ = ["Budgets"]
