"""torchmetrics that Lightning does not include."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat


class Quantile(Metric):
    """Quantile of all values since the last reset, over all processes: exact, independent of micro-batches.

    Args:
        q: quantile, between 0 and 1.
    """

    full_state_update = False
    values: list[Tensor]

    def __init__(self, q: float):
        super().__init__()
        self.q = q
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, values: Tensor) -> None:
        """Add values of any shape."""
        self.values.append(values.detach().float().flatten())

    def compute(self) -> Tensor:
        """Return the quantile (linear interpolation); 0 if there are no values."""
        # the state is a list of tensors before the processes are joined, one tensor after
        seen = dim_zero_cat(self.values) if len(self.values) else torch.empty(0, device=self.device)
        if not seen.numel():
            return torch.zeros((), device=self.device)
        ordered = seen.sort().values
        place = self.q * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        below, above = ordered[low], ordered[high]
        return torch.where(below == above, below, torch.lerp(below, above, place - low))  # also of infinities


class ExpertLoad(Metric):
    """Load of the most used expert relative to an even load, mean over layers, over all tokens since the last reset and
    all processes. 1 is even; the number of experts divided by those per token is the maximum."""

    full_state_update = False
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", default=torch.zeros(0), dist_reduce_fx="sum")

    def update(self, counts: Tensor) -> None:
        """Add the numbers of tokens [layers, experts] that were sent to each expert."""
        self.counts = counts if not self.counts.numel() else self.counts + counts

    def compute(self) -> Tensor:
        """Return the load; 1 without any tokens."""
        if not self.counts.numel():
            return torch.ones((), device=self.device)
        total = self.counts.sum(-1)
        load = self.counts.amax(-1) * self.counts.shape[-1] / total.clamp_min(1)
        return torch.where(total > 0, load, 1).mean()
