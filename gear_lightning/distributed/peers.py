"""What the processes of a job tell one another outside of collectives: short texts under names, kept by rank 0.

Works while a process waits in a collective, and after another has died.
"""

import weakref
from datetime import timedelta
from typing import Any

import lightning as L
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

WAIT = timedelta(seconds=60)


class Peers:
    """The store. All ranks must make it at the same place; afterwards any thread may use it.

    A process that cannot reach rank 0 any more hears nothing; it never raises.
    """

    def __init__(self, trainer: L.Trainer):
        strategy: Any = trainer.strategy
        host = strategy.cluster_environment.main_address
        options: dict[str, Any] = {"world_size": None, "wait_for_workers": False, "timeout": WAIT}
        self._store: Any = None
        if trainer.global_rank == 0:
            self._store = TCPStore(host, 0, is_master=True, **options)
        port = strategy.broadcast(None if self._store is None else self._store.port)
        if trainer.global_rank:
            self._store = TCPStore(host, port, is_master=False, **options)

    @property
    def reachable(self) -> bool:
        """Whether rank 0 has answered so far."""
        return self._store is not None

    def tell(self, name: str, text: str) -> None:
        """Say something under a name, in place of what was said before."""
        if self._store is not None:
            try:
                self._store.set(name, text)
            except Exception:  # the process that keeps the store is gone
                self._store = None

    def hear(self, *names: str) -> dict[str, str]:
        """What has been said under these names; what nobody has said yet is left out."""
        if self._store is None:
            return {}
        try:
            said = [name for name in names if self._store.check([name])]
            return {name: text.decode() for name, text in zip(said, self._store.multi_get(said), strict=True)}
        except Exception:
            self._store = None
            return {}


_made: "weakref.WeakKeyDictionary[Any, Peers]" = weakref.WeakKeyDictionary()


def peers_of(trainer: L.Trainer) -> Peers | None:
    """The store of a Trainer's processes, made at the first call; None for a single process. All ranks must call it."""
    if trainer.world_size == 1:
        return None
    if trainer.strategy not in _made:
        _made[trainer.strategy] = Peers(trainer)
    return _made[trainer.strategy]
