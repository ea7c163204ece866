"""Gradients of low-precision weights, accumulated in float32: over the micro-batches of a step, and over DDP's ranks.

Accumulated in bfloat16, the gradients of 64 micro-batches have errors of up to 3 %, and the error depends on how a step
is split. FSDP2 (`gear_lightning.strategies`) reduces each micro-batch over the ranks by itself; DeepSpeed does both.
"""

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed.sharding import local
from ..errors import UserError


class GradientSums:
    """Takes each new gradient of a low-precision parameter, and sets the sum at the end of the step.

    Args:
        parameters: whole parameters, or FSDP2 shards.
        micro_batches: returns the number of micro-batches of a step; with one, and without ``group``, no gradient is
            taken.
        group: ranks to average over. None: another component averages.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], micro_batches: Callable[[], int], group: Any = None):
        self._parameters = list(parameters)
        self._micro_batches = micro_batches
        self._group = group
        self._sums: dict[int, Tensor] = {}  # id of a parameter -> float32, this rank's part
        self._hooks = [p.register_post_accumulate_grad_hook(self._take) for p in self._parameters]

    def _take(self, parameter: Any) -> None:
        if self._group is None and self._micro_batches() == 1:
            return
        new, parameter.grad = parameter.grad, None
        if (total := self._sums.get(id(parameter))) is None:
            self._sums[id(parameter)] = new.float()
        else:
            local(total).add_(local(new))

    @torch.no_grad()
    def finish(self) -> None:
        """Set the gradients to the sums, rounded once. Call after a step's last micro-batch."""
        if self._group is not None:
            self._reduce(self._group)
        for parameter in self._parameters:
            if (total := self._sums.pop(id(parameter), None)) is not None:
                parameter.grad = total.to(parameter.dtype)

    def _reduce(self, group: Any) -> None:
        """Average over the ranks. A parameter that got a gradient on some ranks counts as 0 on the others."""
        took_part = [id(p) in self._sums for p in self._parameters]
        flags = torch.tensor(took_part, dtype=torch.int32, device=self._parameters[0].device)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group)
        waiting = []
        for parameter, anywhere in zip(self._parameters, flags.tolist(), strict=True):
            if anywhere:
                blank = torch.zeros_like(parameter, dtype=torch.float32) if id(parameter) not in self._sums else None
                total = self._sums.setdefault(id(parameter), blank)  # pyright: ignore[reportArgumentType]
                waiting.append(dist.all_reduce(total, group=group, async_op=True))
        for work in waiting:
            work.wait()
        for total in self._sums.values():
            total.div_(dist.get_world_size(group))

    def clear(self) -> None:
        """Discard the sums of a step that was not finished."""
        self._sums.clear()

    def remove(self) -> None:
        """Remove the hooks: gradients are no longer taken."""
        for hook in self._hooks:
            hook.remove()
        self.clear()


class Float32Sums(L.LightningModule):
    """Mixin that accumulates gradients of low-precision weights in float32.

    List it before a LightningModule that calls `prepare_sums` at the end of ``configure_model`` and `start_sums` at the
    end of ``configure_optimizers``. From the end of a step's last backward on, ``grad`` holds the sums in the weights'
    precision.
    """

    _sums: GradientSums | None = None

    def _sums_here(self) -> bool:
        """Return whether this class accumulates the gradients with the trainer's strategy."""
        return not isinstance(self.trainer.strategy, DeepSpeedStrategy)

    def prepare_sums(self, low_precision: bool) -> None:
        """Keep DDP from allocating buckets that would not be used: 2 bytes for each weight.

        Args:
            low_precision: the trained weights will have a dtype below float32.

        Raises:
            UserError: DDP has a communication hook, which this class would replace.
        """
        strategy: Any = self.trainer.strategy
        self._ddp_params_and_buffers_to_ignore: list[str] = []  # DDP reads this attribute
        if not low_precision or not isinstance(strategy, DDPStrategy) or not self._sums_here():
            return
        if strategy._ddp_comm_hook is not None:
            raise UserError(
                f"trainer.strategy.ddp_comm_hook does nothing with trainer.precision={self.trainer.precision}: "
                "gradients are reduced in float32; remove it"
            )
        trained = sorted((p.numel(), name) for name, p in self.named_parameters() if p.requires_grad)
        self._ddp_params_and_buffers_to_ignore = [name for _, name in trained[1:]]  # DDP needs at least one

    def start_sums(self, parameters: Iterable[nn.Parameter]) -> None:
        """Accumulate gradients from now on.

        Args:
            parameters: parameters of the optimizer; only those that are trained are used.
        """
        if self._sums is not None:
            self._sums.remove()
            self._sums = None
        if not self._sums_here():
            return
        model: Any = self.trainer.strategy.model
        low = [p for p in parameters if p.requires_grad and p.dtype.itemsize < 4]
        if not low:
            return
        group = None
        if isinstance(model, DistributedDataParallel):
            group = model.process_group
            model.require_backward_grad_sync = False  # stays off: Lightning's `no_sync` restores this value
        self._sums = GradientSums(low, lambda: self.trainer.accumulate_grad_batches, group)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        super().backward(loss, *args, **kwargs)
        if self._sums is not None and not self.trainer.fit_loop._should_accumulate():
            self._sums.finish()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        super().optimizer_zero_grad(epoch, batch_idx, optimizer)
        if self._sums is not None:
            self._sums.clear()
