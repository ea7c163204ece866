"""A key-value store on rank 0, through which the processes of a job exchange short texts outside of collectives.

It works while a process waits in a collective, and after another process has ended.
"""

import weakref
from datetime import timedelta
from typing import Any

import lightning as L
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

WAIT = timedelta(seconds=60)


class Peers:
    """The store. All ranks must create it together; afterwards any thread may use it.

    It never raises: if rank 0 is no longer reachable, `read` returns nothing.
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
        """Whether rank 0 has answered every request so far."""
        return self._store is not None

    def post(self, name: str, text: str) -> None:
        """Set the text under a name. It replaces the earlier text."""
        if self._store is not None:
            try:
                self._store.set(name, text)
            except Exception:  # the process that holds the store has ended
                self._store = None

    def read(self, *names: str) -> dict[str, str]:
        """Return the texts under these names, without names that are not set yet."""
        if self._store is None:
            return {}
        try:
            found = [name for name in names if self._store.check([name])]
            return {name: text.decode() for name, text in zip(found, self._store.multi_get(found), strict=True)}
        except Exception:
            self._store = None
            return {}


_made: "weakref.WeakKeyDictionary[Any, Peers]" = weakref.WeakKeyDictionary()


def peers_of(trainer: L.Trainer) -> Peers | None:
    """Return the store of a Trainer's processes, or None for a single process. All ranks must call it.

    The first call creates the store.
    """
    if trainer.world_size == 1:
        return None
    if trainer.strategy not in _made:
        _made[trainer.strategy] = Peers(trainer)
    return _made[trainer.strategy]
