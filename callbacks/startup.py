"""Check before the first update how the processes were started and which weights they hold."""

import math
import os
import platform
import secrets
import socket
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_info

from gear_lightning import __version__
from gear_lightning.distributed.collective import check_same, gather, run_on_all_ranks
from gear_lightning.distributed.sharding import shape, state_bytes
from gear_lightning.distributed.zero_state import piece_bytes
from gear_lightning.errors import UserError

PACKAGES = ("torch", "lightning", "transformers", "deepspeed")
PATIENCE = 10.0  # seconds for a new file to appear on the other machines: NFS clients cache directories


class StartupCheck(L.Callback):
    """Checks a run with several processes at its start. It does not change training.

    It prints the bytes of weights that each process holds. It raises an error if the processes run different versions,
    do not see the same run directory, or are about to train on the same rollouts, or if a strategy that should shard
    the weights does not.
    """

    def __init__(self) -> None:
        self._looked = self._compared = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.world_size == 1 or self._compared:
            return
        self._compared = True
        check_same(versions(), "other versions", "give all nodes the same environment")
        check_shared(Path(trainer.default_root_dir))

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.world_size == 1:
            return
        models = {"policy": pl_module.policy}
        if pl_module.teacher is not None and pl_module.teacher.model is not None:
            models["teacher"] = pl_module.teacher.model
        strategy: Any = trainer.strategy
        parts = trainer.world_size // getattr(strategy, "replicas", 1) if getattr(strategy, "shards", False) else 1
        report = []
        for name, model in models.items():
            held = gather(state_bytes(model))
            parameters = list(model.parameters())
            whole = sum(shape(p).numel() * p.element_size() for p in parameters)
            report.append(f"{name} {_size(max(held))} of {_size(whole)}")
            if max(held) > sum(_largest_part(p, parts) for p in parameters):
                raise UserError(
                    f"{type(strategy).__name__} should shard the {name} over {parts} processes, but one holds "
                    f"{_size(max(held))} of {_size(whole)}"
                )
        for optimizer in trainer.optimizers:
            if pieces := piece_bytes(optimizer):
                whole = sum(shape(p).numel() * 4 for p in pl_module.policy.parameters() if p.requires_grad)
                held = gather(pieces)
                report.append(f"float32 weights of the optimizer {_size(max(held))} of {_size(whole)}")
                if max(held) > 1.1 * whole / trainer.world_size + (1 << 20):
                    raise UserError(f"ZeRO should shard the optimizer, but one process holds {_size(max(held))}")
        rank_zero_info(f"each of {trainer.world_size} processes holds: {', '.join(report)}")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._looked or trainer.world_size == 1:
            return
        self._looked = True
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        seen: dict[int, int] = {}
        for rank, groups in enumerate(gather([group.group_id for group in data.groups])):
            for group in groups:
                if group in seen:
                    raise UserError(
                        f"ranks {seen[group]} and {rank} both hold the rollouts of group {group}; check that the "
                        "launcher gives every process its own rank"
                    )
                seen[group] = rank


def versions() -> dict[str, str]:
    """Return the versions that must be the same on all ranks."""
    found = {"python": platform.python_version(), "gear_lightning": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def check_shared(folder: Path) -> None:
    """Check that all ranks see a file that rank 0 writes to the run directory. All ranks must call it.

    Raises:
        UserError: a rank does not see the file; names the rank and its machine.
    """
    mine = secrets.token_hex(8)
    token = gather(mine)[0]
    path = folder / f".shared-{token}"
    try:
        run_on_all_ranks(lambda: path.write_text(token) if mine == token else None)
        found = gather((socket.gethostname(), mine == token or _read_soon(path) == token))
    finally:
        if mine == token:
            path.unlink(missing_ok=True)
    blind = [f"rank {rank} on {host}" for rank, (host, saw) in enumerate(found) if not saw]
    if blind:
        raise UserError(
            f"trainer.default_root_dir={folder}: {', '.join(blind)} cannot see a file that rank 0 on {found[0][0]} "
            "wrote there; give a directory on a file system that all nodes share"
        )


def _read_soon(path: Path) -> str | None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            return path.read_text()
        except FileNotFoundError:
            time.sleep(0.1)
        except OSError:
            return None
    return None


def check_launch(trainer: Any) -> None:
    """Compare the number of processes that Slurm or torchrun started with the number that Lightning expects.

    Args:
        trainer: the ``trainer`` section of a recipe.

    Raises:
        UserError: the numbers differ; reports both and what to change.
    """
    environment = TorchElasticEnvironment if TorchElasticEnvironment.detect() else SLURMEnvironment
    plugins = trainer["plugins"] if isinstance(trainer["plugins"], list) else [trainer["plugins"]]
    other = any(isinstance(p, ClusterEnvironment) and not isinstance(p, environment) for p in plugins)
    if other or not environment.detect():
        return
    devices, nodes = _devices(trainer["devices"], trainer["accelerator"]), int(trainer["num_nodes"] or 1)
    asked = f"trainer.devices={trainer['devices']} x trainer.num_nodes={nodes} asks for {devices * nodes}"
    if environment is TorchElasticEnvironment:
        started = int(os.environ["WORLD_SIZE"])
        if started != devices * nodes:
            raise UserError(
                f"torchrun started {started} processes, and {asked}: give --trainer.devices as torchrun's "
                "--nproc-per-node, and --trainer.num_nodes as its --nnodes"
            )
        return
    started, machines = int(os.environ["SLURM_NTASKS"]), int(os.environ.get("SLURM_NNODES", "1"))
    if (started, machines) != (devices * nodes, nodes):
        raise UserError(
            f"Slurm started {started} tasks on {machines} nodes, and {asked} on {nodes}: give --trainer.num_nodes as "
            "sbatch's --nodes, and --trainer.devices as its --ntasks-per-node (gear-lightning slurm writes both)"
        )
    if started > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise UserError(f"Slurm was asked for {started} tasks by --ntasks: give --ntasks-per-node={devices} instead")
    if started > 1 and "SLURM_STEP_ID" not in os.environ:
        raise UserError(f"this is the job's only process, and {asked}: put srun before the command")


def _devices(asked: Any, accelerator: Any) -> int:
    """Return the number of processes on a node."""
    if isinstance(asked, list | tuple):
        return len(asked)
    if str(asked) in ("auto", "-1"):
        return max(1, torch.cuda.device_count()) if accelerator != "cpu" else 1
    parts = [part for part in str(asked).split(",") if part]
    return int(parts[0]) if "," not in str(asked) else len(parts)


def _largest_part(parameter: Any, parts: int) -> int:
    """Return the bytes of the largest part of a parameter that is split along its rows."""
    size = shape(parameter)
    rows = size[0] if size else 1
    return math.ceil(rows / parts) * (size.numel() // max(rows, 1)) * parameter.element_size()


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"
