"""Gradients of low-precision weights, added up in float32: over the micro-batches of a step, and over DDP's ranks.

Added in bfloat16, the gradients of 64 micro-batches are off by up to 3 %, and how a step is split decides by how much.
FSDP2 (`gear_lightning.strategies`) reduces each micro-batch over the ranks by itself; DeepSpeed does both.
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
    """Takes each new gradient of a low-precision parameter away, and gives back the sum.

    Args:
        parameters: whole, or the parts of FSDP2.
        micro_batches: how many a step has; with one, and no ranks to add up, nothing is taken.
        group: ranks to average over. None: somebody else does it.
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
        """After a step's last micro-batch: put the sums, rounded once, where the optimizer expects gradients."""
        if self._group is not None:
            self._reduce(self._group)
        for parameter in self._parameters:
            if (total := self._sums.pop(id(parameter), None)) is not None:
                parameter.grad = total.to(parameter.dtype)

    def _reduce(self, group: Any) -> None:
        """Average over the ranks. A parameter that took part on one of them counts as 0 on the others."""
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
        """Forget the sums of a step that was not finished."""
        self._sums.clear()

    def remove(self) -> None:
        """Leave gradients alone from now on."""
        for hook in self._hooks:
            hook.remove()
        self.clear()


class Float32Sums(L.LightningModule):
    """Put before a LightningModule that calls `prepare_sums` at the end of ``configure_model`` and `start_sums` at the
    end of ``configure_optimizers``: gradients of low-precision weights are added up in float32. Gradients are in their
    place, in the weights' precision, from the end of a step's last backward on."""

    _sums: GradientSums | None = None

    def _sums_here(self) -> bool:
        """Whether this strategy leaves the sums to this class."""
        return not isinstance(self.trainer.strategy, DeepSpeedStrategy)

    def prepare_sums(self, low_precision: bool) -> None:
        """Keep DDP from making buckets that would not be used: 2 bytes for each weight.

        Args:
            low_precision: trained weights are going to be below float32.

        Raises:
            UserError: DDP was given a hook for its communication, which is going to be ours.
        """
        strategy: Any = self.trainer.strategy
        self._ddp_params_and_buffers_to_ignore: list[str] = []  # by this name DDP looks for it
        if not low_precision or not isinstance(strategy, DDPStrategy) or not self._sums_here():
            return
        if strategy._ddp_comm_hook is not None:
            raise UserError(
                f"trainer.strategy.ddp_comm_hook does nothing with trainer.precision={self.trainer.precision}: "
                "gradients are reduced in float32; leave it out"
            )
        trained = sorted((p.numel(), name) for name, p in self.named_parameters() if p.requires_grad)
        self._ddp_params_and_buffers_to_ignore = [name for _, name in trained[1:]]  # it wants at least one

    def start_sums(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take gradients from now on.

        Args:
            parameters: of which the optimizer gets those that are trained.
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
            model.require_backward_grad_sync = False  # for good: Lightning's `no_sync` puts back what it finds
        self._sums = GradientSums(low, lambda: self.trainer.accumulate_grad_batches, group)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        super().backward(loss, *args, **kwargs)
        if self._sums is not None and not self.trainer.fit_loop._should_accumulate():
            self._sums.finish()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        super().optimizer_zero_grad(epoch, batch_idx, optimizer)
        if self._sums is not None:
            self._sums.clear()
