"""Which differences between two runs count as rounding."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tolerance:
    """Limits below which differences count as rounding.

    Args:
        share: relative difference of log-probs, divergences, credit, losses and gradients.
        norm: relative difference of the gradient's norm, where the rounding errors of its elements average out.
        nats: mean difference of log-probs and divergences that counts as rounding, however small they are.
    """

    share: float = 1e-3
    norm: float = 1e-3
    nats: float = 1e-5

    def after(self, drift: float) -> "Tolerance":
        """Return the tolerance for weights that rounding has moved apart by this share of their change (`drifts`)."""
        return replace(self, share=self.share + drift, norm=self.norm + drift)


TOLERANCE = Tolerance()  # float32 and float64: measured differences are 1e-6
LOW_TOLERANCE = Tolerance(share=0.1, norm=5e-3, nats=0.05)  # bfloat16: 2e-3 to 3e-2, norms 1e-4
