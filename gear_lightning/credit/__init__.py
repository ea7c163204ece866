"""Credit assigners: from the advantage of a rollout to an advantage for each of its tokens."""

from .base import CreditAssigner, Evidence, Uniform, mixing
from .gear_rule import GEAR, Placebo, TokenOnly, Turn
from .token_rules import RLSD, SCGRPO

__all__ = [
    "GEAR",
    "RLSD",
    "SCGRPO",
    "CreditAssigner",
    "Evidence",
    "Placebo",
    "TokenOnly",
    "Turn",
    "Uniform",
    "mixing",
]
