"""State that an exact resume needs beyond Lightning's own checkpoint, for example state that differs between ranks.

Lightning writes only rank 0's state, and no random state. All state here is plain data and tensors, so that checkpoints
load with ``weights_only=True``.
"""

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the state of Python's, NumPy's and torch's random number generators."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Restore the state that `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def rewind(checkpoint: dict[str, Any], batches: int) -> None:
    """Move a checkpoint's position in the epoch back by ``batches`` micro-batches, to the start of an optimizer step.

    Checkpoints do not hold the gradients of an unfinished accumulation, so its micro-batches are repeated.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for scope in ("current", "total"):
        counts = progress[scope]
        start = counts["ready"] - batches
        counts.update(ready=start, started=start, processed=start, completed=start)
    progress["is_last_batch"] = False


def undo_iteration_start(checkpoint: dict[str, Any]) -> None:
    """Turn a checkpoint written before an iteration's first step was complete into one from before the iteration.

    A resume then repeats all setup at the start of the iteration.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
    for scope in ("current", "total"):
        counts = progress[scope]
        counts.update(ready=counts["processed"], started=counts["processed"], completed=counts["processed"])
