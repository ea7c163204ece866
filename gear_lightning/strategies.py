"""FSDP2 and DeepSpeed ZeRO for `GearModule`: on GPUs with NCCL, and on CPUs with gloo for tests and debugging.

Both write the same one-file checkpoints of full tensors as DDP, so that a run can resume under any strategy and any
number of processes.
"""

import argparse
import copy
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torchmetrics import Metric

from .distributed import zero_state
from .distributed.collective import run_on_all_ranks
from .distributed.sharding import fill, full, local, replace_parameters, shard_like, skeleton, whole_of
from .distributed.strategy_rules import check_replicas, check_zero, whole_replicas
from .errors import UserError
from .optimizers import as_kept, in_floats
from .runs.checkpoints import read_checkpoint, remove_checkpoint, resolve, save_checkpoint

TIMEOUT = timedelta(minutes=30)  # Lightning's default


class WholeCheckpoints(Strategy):
    """A strategy whose rank 0 writes checkpoints of full tensors to one file, gathering one tensor at a time."""

    shards = True  # whether weights are sharded over the ranks

    @property
    def computes_in(self) -> torch.dtype | None:
        """Dtype in which weights are gathered; None: the dtype in which they are stored."""
        return None

    @property
    def streams(self) -> bool:
        """Whether a forward of the sharded policy gathers its layers by itself."""
        return True

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def _to_rank_zero(self, whole: Tensor) -> Tensor | None:
        return whole.detach().to("cpu", copy=True) if self.is_global_zero else None

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        done: dict[int, Tensor | None] = {}  # gathers tied weights once
        left_out = set(getattr(self.lightning_module, "left_out", list)())
        states = self.lightning_module.state_dict(keep_vars=True)
        states = {name: value for name, value in states.items() if name not in left_out}
        for value in states.values():
            if id(value) not in done:
                done[id(value)] = self._to_rank_zero(full(value))
        return {name: done[id(value)] for name, value in states.items()} if self.is_global_zero else {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        mine, saved = self.lightning_module.state_dict(keep_vars=True), checkpoint["state_dict"]
        if strict and mine.keys() != saved.keys():
            odd = sorted(mine.keys() ^ saved.keys())
            raise UserError(
                f"the checkpoint does not match the model; {len(odd)} weights are in only one of them: "
                f"{', '.join(odd[:3])}"
            )
        with torch.no_grad():
            for name, value in mine.items():
                if name in saved:
                    fill(value, saved[name])

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise TypeError("storage_options are not supported: checkpoints are files")
        if self.is_global_zero:  # the gathered tensors are copies already
            save_checkpoint(checkpoint, Path(filepath), owned=("state_dict", "optimizer_states", "teacher_shadow"))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(resolve(Path(checkpoint_path)))  # memory-mapped: every rank reads only its part

    def remove_checkpoint(self, filepath: Any) -> None:
        if self.is_global_zero:
            remove_checkpoint(Path(filepath))

    # -- models -------------------------------------------------------------------------------------------------------

    def load(self, whole: Callable[[], Any], bare: Callable[[], Any]) -> Any:
        """Return the model to shard: with values on rank 0, with parameters on the meta device on other ranks.

        Args:
            whole: loads the model.
            bare: creates it with its parameters on the meta device.
        """
        model = run_on_all_ranks(whole if self.is_global_zero else bare)
        for part in model.modules():
            for name, buffer in list(part._buffers.items()):
                if buffer is not None:
                    device = self.root_device
                    here = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
                    dist.broadcast(here, 0)
                    part._buffers[name] = here
        return model

    def shard(self, model: Any, like: Any = None) -> Any:
        """Shard a model's parameters over the ranks, in place.

        Args:
            model: a model with values on rank 0 (see `load`), or without values if ``like`` is given.
            like: a sharded model of the same shapes from which to copy the values.
        """
        raise NotImplementedError


def place(strategy: Any, whole: Callable[[], Any], bare: Callable[[], Any]) -> tuple[Any, Any]:
    """Load a model and shard it if the strategy does. Return it, and its `skeleton` if it is sharded (else None).

    Args:
        strategy: one of Lightning's strategies or of this module.
        whole: loads the model.
        bare: creates it with its parameters on the meta device.

    Raises:
        UserError: on all ranks, if one of them cannot create the model.
    """
    if not getattr(strategy, "shards", False):
        return run_on_all_ranks(whole), None
    model = strategy.load(whole, bare)
    blank = skeleton(model)
    return strategy.shard(model), blank


class FSDP2(WholeCheckpoints, ModelParallelStrategy):
    """Fully sharded data parallelism (PyTorch's ``fully_shard``): weights, gradients, optimizer state and teacher are
    sharded over the processes, and gathered layer by layer.

    Args:
        replicas: number of copies of the sharded model (hybrid sharding); each is sharded over world size / replicas
            processes. With one per node, weights are gathered only within nodes. With as many as processes, nothing is
            sharded.
        reshard_after_forward: free a layer's gathered weights after its forward and gather them again in backward.
            False uses more memory and less communication.
        process_group_backend: ``nccl``, ``gloo``, ... Null: chosen by the device.
        timeout: maximum time that a process waits for the others in a collective, for example 0:30:00.
    """

    def __init__(
        self,
        replicas: int = 1,
        reshard_after_forward: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = TIMEOUT,
    ):
        super().__init__(
            save_distributed_checkpoint=False, process_group_backend=process_group_backend, timeout=timeout
        )
        check_replicas(replicas)
        self.replicas = replicas
        self.reshard_after_forward = reshard_after_forward

    def setup_environment(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        world = self.num_nodes * self.num_processes
        check_replicas(self.replicas, world)
        if message := whole_replicas(self.replicas, world):
            rank_zero_warn(message)
        self._data_parallel_size, self._tensor_parallel_size = world, 1
        super().setup_environment()
        kind = self.root_device.type
        if self.replicas == 1:
            self.mesh = init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
        else:
            size = (self.replicas, world // self.replicas)
            self.mesh = init_device_mesh(kind, size, mesh_dim_names=("replicate", "shard"))

    @property
    def computes_in(self) -> torch.dtype | None:
        # weights are gathered in bfloat16, gradients reduced in float32. With autocast alone, the backward pass would
        # keep a bfloat16 copy of all weights on every device
        return torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None

    def shard(self, model: Any, like: Any = None) -> Any:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        blocks = layers_of(model)
        policy = MixedPrecisionPolicy(param_dtype=self.computes_in, reduce_dtype=torch.float32)
        options: dict[str, Any] = {"mesh": self.mesh, "mp_policy": policy}
        values = [p.detach() for p in model.parameters()]
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        replace_parameters(model, lambda p: nn.Parameter(p.detach().to("meta"), p.requires_grad))
        # a teacher has no backward, which would free the weights that its forward gathered
        teacher = like is not None
        for block in blocks:
            fully_shard(block, reshard_after_forward=teacher or self.reshard_after_forward, **options)
        fully_shard(model, reshard_after_forward=True if teacher else None, **options)
        model.to_empty(device=self.root_device)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
            if like is not None:
                _copy(like, model)
                return model
            for parameter, value in zip(model.parameters(), values, strict=True):
                value = value if not value.is_meta else torch.empty(value.shape, dtype=value.dtype)
                there = distribute_tensor(value.to(self.root_device), self.mesh, parameter.placements)
                local(parameter).copy_(there.to_local())
        return model

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        whole = {
            i: {key: self._to_rank_zero(_whole_state(v)) if isinstance(v, Tensor) else v for key, v in mine.items()}
            for i, mine in state["state"].items()
        }
        return {"state": whole, "param_groups": copy.deepcopy(state["param_groups"])} if self.is_global_zero else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]

            def spread(i: int, name: str, value: Any, optimizer: Any = optimizer, parameters: list = parameters) -> Any:
                p = parameters[i]
                whole = isinstance(value, Tensor) and value.shape == p.shape and isinstance(p, DTensor)
                return as_kept(optimizer, p, name, shard_like(p, value)) if whole else value

            state = {i: {key: spread(i, key, v) for key, v in mine.items()} for i, mine in saved["state"].items()}
            optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


def _whole_state(value: Tensor) -> Tensor:
    """Return a full optimizer state in floats. All ranks must call it."""
    if isinstance(value, DTensor) and (floats := in_floats(value.to_local())) is not value.to_local():
        return whole_of(value, floats)
    return full(value)


@torch.no_grad()
def _copy(source: nn.Module, target: nn.Module) -> None:
    """Copy the values of a model that is sharded in the same way: each rank copies its own parts."""
    for theirs, mine in zip(source.parameters(), target.parameters(), strict=True):
        local(mine).copy_(local(theirs))


def layers_of(model: Any) -> list[nn.Module]:
    """Return the decoder layers that the model's class lists in ``_no_split_modules``.

    Raises:
        UserError: the model has no such layers.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [part for part in model.modules() if type(part).__name__ in names]
    if not blocks:
        raise UserError(
            f"{type(model).__name__} does not list its decoder layers (_no_split_modules: "
            f"{sorted(names) or 'none'}), which FSDP2 needs; use configs/strategy/ddp.yaml or a ZeRO strategy"
        )
    return blocks


class ZeROPrecision(DeepSpeedPrecision):
    """DeepSpeed's precision, but with the usual ``bf16-mixed``: float32 weights and autocast.

    DeepSpeed's own ``bf16-mixed`` would cast all weights, and the updates of a bfloat16 teacher would round to nothing.
    """

    @contextmanager
    def forward_context(self):
        mixed = self.precision == "bf16-mixed"
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with super().forward_context(), torch.autocast(device, dtype=torch.bfloat16, enabled=mixed):
            yield

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        # Lightning has already divided the loss by the number of micro-batches; DeepSpeed would do it again
        model.trainer.model.backward(tensor, *args, scale_wrt_gas=False, **kwargs)


class ZeRO(WholeCheckpoints, DeepSpeedStrategy):
    """DeepSpeed ZeRO. Stage 1 shards the optimizer state over the processes, stage 2 also the gradients, stage 3 also
    the weights and the teacher.

    Args:
        stage: 1, 2 or 3.
        offload_optimizer: keep the optimizer state, and compute its steps, in CPU memory.
        offload_parameters: keep the weights in CPU memory between uses. Only stage 3.
        bucket_size: number of elements that are reduced or gathered at once; determines the size of buffers.
        process_group_backend: ``nccl``, ``gloo``, ... Null: chosen by the device.
        timeout: maximum time that a process waits for the others in a collective, for example 0:30:00.
    """

    def __init__(
        self,
        stage: int = 2,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        bucket_size: int = 50_000_000,
        process_group_backend: str | None = None,
        timeout: timedelta = TIMEOUT,
    ):
        check_zero(stage, offload_parameters)
        try:
            import deepspeed  # noqa: F401
        except ImportError as error:
            raise UserError(f"ZeRO needs deepspeed: pip install 'deepspeed>=0.19,<0.20' ({error})") from None
        super().__init__(
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            reduce_bucket_size=bucket_size,
            allgather_bucket_size=bucket_size,
            logging_batch_size_per_gpu=1,  # required for DeepSpeed's throughput log, which is off
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        assert isinstance(self.config, dict)
        self.config["zero_force_ds_cpu_optimizer"] = False  # offload works with the configured optimizer, uncompiled
        # the teacher's average would not update a parameter that DeepSpeed keeps gathered in addition to its parts
        self.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        self.stage, self.shards = stage, stage == 3
        self._parameters: list[Any] = []  # in the optimizer's order

    # -- on a CPU, where Lightning rejects DeepSpeed -----------------------------------------------------------------

    def setup_environment(self) -> None:
        if isinstance(self.accelerator, CUDAAccelerator):
            return super().setup_environment()
        import deepspeed.ops

        # DeepSpeed would compile an operator for shared memory; plain gloo is enough
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        if isinstance(self.accelerator, CUDAAccelerator):
            return super().setup_distributed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def _arguments(self) -> argparse.Namespace:
        index = self.root_device.index
        return argparse.Namespace(device_rank=self.local_rank if index is None else index)

    # -- precision and accumulation -----------------------------------------------------------------------------------

    @property
    def precision_plugin(self) -> Any:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if type(plugin) is DeepSpeedPrecision:
            plugin = ZeROPrecision(plugin.precision)  # pyright: ignore[reportArgumentType]
        DeepSpeedStrategy.precision_plugin.fset(self, plugin)  # pyright: ignore[reportOptionalCall,reportAttributeAccessIssue]

    def _format_config(self) -> None:
        super()._format_config()
        assert isinstance(self.config, dict)
        # with "bf16", DeepSpeed would cast every trained weight to bfloat16, and sum and send gradients in bfloat16.
        # Without it each weight keeps its own precision: bfloat16 under bf16-true, where Lightning casts the weights,
        # but float32 for adapters
        self.config.pop("bf16", None)
        self.config["communication_data_type"] = "fp32"
        self.config["data_types"] = {"grad_accum_dtype": "fp32"}

    def setup(self, trainer: Any) -> None:
        self._init_config_if_needed()
        assert isinstance(self.config, dict)
        # an evaluation before the fit has set its own value
        self.config["gradient_accumulation_steps"] = trainer.accumulate_grad_batches
        super().setup(trainer)
        # stage 3 does not move metrics to the device: https://github.com/Lightning-AI/pytorch-lightning/issues/20258
        for part in trainer.lightning_module.modules():
            if isinstance(part, Metric):
                part.to(self.root_device)

    # -- models -------------------------------------------------------------------------------------------------------

    @contextmanager
    def model_sharded_context(self):
        yield  # `shard` shards loaded models; values could not be loaded into parameters sharded at their creation

    def shard(self, model: Any, like: Any = None) -> Any:
        import deepspeed

        self._init_config_if_needed()
        kind = self.precision_plugin._desired_dtype if "true" in self.precision_plugin.precision else None

        def cast(tensor: Tensor) -> Tensor:  # does not cast buffers
            weight = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
            return tensor.to(kind) if weight else tensor

        if kind is not None:
            model._apply(cast)  # like Lightning: adapters stay float32

        def spread(p: nn.Parameter) -> nn.Parameter:
            value = torch.empty(p.shape, dtype=p.dtype) if p.is_meta else p.detach()
            box = nn.ParameterList([nn.Parameter(value, p.requires_grad)])
            deepspeed.zero.Init(module=box, config_dict_or_path=self.config)  # broadcasts rank 0's values
            return box[0]

        replace_parameters(model, spread)
        model.to(self.root_device)
        if like is not None:
            _copy(like, model)
        return model

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
        import deepspeed

        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        wrapped: Any
        engine, wrapped, _, _ = deepspeed.initialize(
            args=self._arguments,
            config=self.config,
            model=model,
            model_parameters=self._parameters,  # pyright: ignore[reportArgumentType]
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        if self.stage < 3 and wrapped.dtype == torch.bfloat16:
            wrapped.check_grad_overflow = True  # DeepSpeed's default, but only with its "bf16" option
        zero_state.keep_idle_steps_idle(wrapped)
        return engine, wrapped

    @property
    def streams(self) -> bool:
        return self.model is not self.lightning_module  # in evaluation DeepSpeed has no hooks: see below

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        """Skip DeepSpeed's setup: evaluation samples from a full copy and runs no forward of the sharded policy."""
        model.to(self.root_device)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        super().load_model_state_dict(checkpoint, strict)
        for optimizer in self.optimizers:
            optimizer.refresh_fp32_params()  # pyright: ignore[reportAttributeAccessIssue]

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        state = zero_state.whole_state(optimizer, self._parameters, self._to_rank_zero)
        return state if self.is_global_zero else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            zero_state.load_whole_state(optimizer, self._parameters, saved)
