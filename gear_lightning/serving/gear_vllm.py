"""The part of gear_lightning that runs inside of vLLM's processes: it takes new weights from a file or a broadcast.

vLLM has an environment of its own, so this module imports only what lies beside it. vLLM loads it by name
(``--worker-extension-cls gear_vllm.GearWorker``), with this folder on its Python path. It registers the weight-transfer
backends ``file`` and ``broadcast``, which `gear_lightning.serving.transfer` drives.
"""
# pyright: reportMissingImports=false, reportOptionalMemberAccess=false

import os
from dataclasses import dataclass, field
from typing import Any

import gear_broadcast
from gear_repack import repack_head
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory


@dataclass
class NoInit(WeightTransferInitInfo):
    """Options of a backend: none, there is no lasting connection."""


@dataclass
class FileUpdate(WeightTransferUpdateInfo):
    """A file with weights.

    Attributes:
        path: a safetensors file that this process can read.
        tensors: number of tensors in it.
    """

    path: str = ""
    tensors: int = 0


@dataclass
class BroadcastUpdate(WeightTransferUpdateInfo):
    """An invitation to a broadcast, see `gear_broadcast.receiving`."""

    host: str = ""
    port: int = 0
    seconds: float = 0.0
    tensors: list = field(default_factory=list)


class CheckpointEngine(WeightTransferEngine[NoInit, Any]):
    """Loads tensors as vLLM loads a checkpoint."""

    init_info_cls = NoInit

    def init_transfer_engine(self, init_info: NoInit) -> None:
        """Do nothing: there is no lasting connection."""

    def start_weight_update(self) -> None:
        """Prepare the model's layers for new weights."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        """Let the layers process their new weights."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        repack_head(self.model)

    def shutdown(self) -> None:
        """Do nothing: there is no lasting connection."""


class FileEngine(CheckpointEngine):
    """Takes weights from a file."""

    update_info_cls = FileUpdate

    def receive_weights(self, update_info: FileUpdate) -> None:
        """Load a file."""
        with safe_open(os.path.realpath(update_info.path), "pt") as file:
            names = list(file.keys())
            if len(names) != update_info.tensors:
                raise ValueError(f"{update_info.path} has {len(names)} tensors, expected {update_info.tensors}")
            self.model.load_weights((name, file.get_tensor(name)) for name in names)


class BroadcastEngine(CheckpointEngine):
    """Takes weights from the trainer, tensor by tensor, on all workers at the same time."""

    update_info_cls = BroadcastUpdate

    def receive_weights(self, update_info: BroadcastUpdate) -> None:
        """Load what the trainer sends."""
        per_replica = self.parallel_config.world_size
        worker = self.parallel_config.data_parallel_index * per_replica + self.parallel_config.rank
        workers = self.parallel_config.data_parallel_size * per_replica
        with gear_broadcast.receiving(
            **vars(update_info), worker=worker, workers=workers, device=self.device
        ) as tensors:
            self.model.load_weights(tensors)


for backend, engine in {"file": FileEngine, "broadcast": BroadcastEngine}.items():
    if backend not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(backend, engine)


class GearWorker:
    """vLLM's worker gets the methods of this class; it needs none. Naming it makes vLLM import this module."""
