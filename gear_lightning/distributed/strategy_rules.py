"""Options of the sharding strategies that do not go together: told by the strategies, and before they are made."""

from ..errors import UserError


def check_replicas(replicas: int, processes: int | None = None) -> None:
    """Look at the copies of a model that FSDP2 shards, before (None) or when the number of processes is known.

    Raises:
        UserError: they are too few, or do not divide the processes.
    """
    if replicas < 1:
        raise UserError(f"trainer.strategy.replicas={replicas}: must be at least 1")
    if processes is not None and processes % replicas:
        raise UserError(f"trainer.strategy.replicas={replicas} does not divide {processes} processes")


def whole_replicas(replicas: int, processes: int) -> str | None:
    """What is odd about as many replicas as processes."""
    if processes == 1 or replicas != processes:
        return None
    return (
        f"trainer.strategy.replicas={replicas} is the number of processes: nothing is sharded, each holds the whole "
        "model; use fewer replicas, or --config configs/strategy/ddp.yaml"
    )


def check_zero(stage: int, offload_parameters: bool, clip: str = "norm") -> None:
    """Look at options of ZeRO, and at the trainer's way to clip gradients.

    Raises:
        UserError: it does not have them.
    """
    if stage not in (1, 2, 3):
        raise UserError(f"trainer.strategy.stage={stage}: ZeRO has stages 1, 2 and 3")
    if offload_parameters and stage != 3:
        raise UserError(f"trainer.strategy.offload_parameters needs stage 3, not {stage}")
    if clip == "value":
        raise UserError("trainer.gradient_clip_algorithm=value: ZeRO clips gradients by their norm alone; leave it out")
