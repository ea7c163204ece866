"""The part of gear_lightning that runs inside of vLLM's processes: it reads new weights from a file.

vLLM has an environment of its own, so this module imports nothing of gear_lightning. vLLM loads it by name
(``--worker-extension-cls gear_vllm.GearWorker``), with this folder on its Python path. It registers a weight-transfer
backend ``file``, which `gear_lightning.serving.client.Server` drives.
"""
# pyright: reportMissingImports=false, reportOptionalMemberAccess=false

import os
from dataclasses import dataclass
from typing import Any

from safetensors import safe_open
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory


@dataclass
class FileInit(WeightTransferInitInfo):
    """Options of the backend."""


@dataclass
class FileUpdate(WeightTransferUpdateInfo):
    """A file with weights.

    Attributes:
        path: a safetensors file that this process can read.
        tensors: number of tensors in it.
    """

    path: str = ""
    tensors: int = 0


def repack_head(model: Any) -> None:
    """Pack the output head again. vLLM 0.32 on CPUs computes with a packed copy, and a reload does not renew that of a
    head that shares the embedding's weight."""
    head = getattr(getattr(model, "language_model", model), "lm_head", None)
    if getattr(head, "cpu_linear", None) is not None:
        head.quant_method.process_weights_after_loading(head)


class FileEngine(WeightTransferEngine[FileInit, FileUpdate]):
    """Loads weights from files, as vLLM loads a checkpoint."""

    init_info_cls, update_info_cls = FileInit, FileUpdate

    def init_transfer_engine(self, init_info: FileInit) -> None:
        """Do nothing: there is no connection."""

    def start_weight_update(self) -> None:
        """Prepare the model's layers for new weights."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FileUpdate) -> None:
        """Load a file."""
        with safe_open(os.path.realpath(update_info.path), "pt") as file:
            names = list(file.keys())
            if len(names) != update_info.tensors:
                raise ValueError(f"{update_info.path} has {len(names)} tensors, expected {update_info.tensors}")
            self.model.load_weights((name, file.get_tensor(name)) for name in names)

    def finish_weight_update(self) -> None:
        """Let the layers process their new weights."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        repack_head(self.model)

    def shutdown(self) -> None:
        """Do nothing: there is no connection."""


if "file" not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine("file", FileEngine)


class GearWorker:
    """vLLM's worker gets the methods of this class; it needs none. Naming it makes vLLM import this module."""
