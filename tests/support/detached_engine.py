"""An engine with weights of its own, in this process: rollouts can be sampled while the policy is updated."""

import copy
from typing import Any

from gear_lightning.generation import CachedEngine


class Detached(CachedEngine):
    """Samples with a copy of the policy."""

    detached = True

    def fork(self) -> "Detached":
        return Detached()

    def begin(self, model: Any, sampling: Any, stop_ids: set[int]) -> None:
        super().begin(copy.deepcopy(model), sampling, stop_ids)
