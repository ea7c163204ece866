"""Credit assigners: compute an advantage for each token from the advantage of its rollout."""

from .base import CreditAssigner, Evidence, RoundingNoise, Uniform, mixing
from .gear_rule import GEAR, Placebo, TokenOnly, Turn
from .oracle import Oracle
from .token_rules import CREST, EGRSD, GTPO, RLSD, SCGRPO
from .turn_rules import PBSD, TurnSight

__all__ = [
    "CREST",
    "EGRSD",
    "GEAR",
    "GTPO",
    "PBSD",
    "RLSD",
    "SCGRPO",
    "CreditAssigner",
    "Evidence",
    "Oracle",
    "Placebo",
    "RoundingNoise",
    "TokenOnly",
    "Turn",
    "TurnSight",
    "Uniform",
    "mixing",
]
