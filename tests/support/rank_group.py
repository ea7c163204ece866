"""Persistent processes that run functions on all ranks of a gloo group, without a start for each function."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

from deadlines import seconds

DEADLINE = seconds(300)  # for one function
LAST_WORD = seconds(3)  # for results of the other ranks after one has failed


class Group:
    """Processes with ranks from 0. They start when the first function runs, and again after a function has failed.

    Args:
        world: number of processes.
    """

    def __init__(self, world: int = 2):
        self.world = world
        self.workers: list[Any] = []

    def run(self, function: Callable, *args: Any, deadline: float = DEADLINE) -> list[Any]:
        """Call a function on all ranks.

        Args:
            function: a function of a module that the processes can import.
            args: its arguments.
            deadline: maximum seconds.

        Returns:
            Its results, in order of rank.

        Raises:
            AssertionError: it raised on a rank, or did not finish in time.
        """
        if not self.workers:
            self._start()
        for _, pipe in self.workers:
            pipe.send((function, args))
        results, failed = [], []
        for rank, (_, pipe) in enumerate(self.workers):
            if not pipe.poll(LAST_WORD if failed else deadline):  # other ranks may wait for one that failed
                failed.append(f"rank {rank}: did not finish within {deadline} s")
                continue
            done, result = pipe.recv()
            (results if done else failed).append(result if done else f"rank {rank}: {result}")
        if failed:
            self.stop()
            raise AssertionError("\n".join(failed))
        return results

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("forkserver")  # the imports are done once
        context.set_forkserver_preload(["gear_lightning.recipes.cli", "deepspeed"])
        for rank in range(self.world):
            mine, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(rank, self.world, port, theirs), daemon=True)
            worker.start()
            theirs.close()
            self.workers.append((worker, mine))
        for _, pipe in self.workers:
            assert pipe.poll(DEADLINE), "a process did not start"
            pipe.recv()

    def stop(self) -> None:
        """End the processes."""
        for worker, pipe in self.workers:
            pipe.close()
            worker.kill()
            worker.join()
        self.workers = []


def _serve(rank: int, world: int, port: int, pipe: Any) -> None:
    place = {"LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "NODE_RANK": 0}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    rank_zero_only.rank = rank  # Lightning has read the rank when it was imported

    torch.set_num_threads(1)
    pipe.send("ready")
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        os.environ.update({name: str(value) for name, value in place.items()})  # a Trainer removes some at its end
        try:
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)


def connect(name: str, precision: Any = "32-true", **options: Any) -> Any:
    """Return the strategy of that name with its process group; for use in a process of a `Group`."""
    import lightning as L

    class Unused(L.LightningModule):
        def configure_model(self) -> None:
            """Lightning checks that this hook exists."""

    strategy = make_strategy(name, **options)
    world = int(os.environ["WORLD_SIZE"])
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(accelerator="cpu", devices=world, strategy=strategy, precision=precision, **quiet)
    strategy._lightning_module = unused = Unused()
    unused.trainer = trainer
    if isinstance(getattr(strategy, "config", None), dict):
        strategy.config["train_micro_batch_size_per_gpu"] = 1  # otherwise read from the data loader
    strategy.setup_environment()
    return strategy


def make_strategy(name: str, **options: Any) -> Any:
    """Return a strategy by its name in configs/strategy."""
    from lightning.pytorch.strategies import DDPStrategy

    from gear_lightning.strategies import FSDP2, ZeRO

    if name == "ddp":
        return DDPStrategy(gradient_as_bucket_view=True, **options)
    if name == "fsdp":
        return FSDP2(**options)
    if name == "zero3_offload":
        return ZeRO(3, offload_optimizer=True, offload_parameters=True, **options)
    return ZeRO(int(name.removeprefix("zero")), **options)
