"""Check the options of sharding strategies: used by the strategies, and by checks before they are created."""

from ..errors import UserError


def check_replicas(replicas: int, processes: int | None = None) -> None:
    """Check the number of replicas of a model that FSDP2 shards.

    Args:
        replicas: number of replicas.
        processes: number of processes; None if it is not known yet.

    Raises:
        UserError: there are too few replicas, or they do not divide the number of processes.
    """
    if replicas < 1:
        raise UserError(f"trainer.strategy.replicas={replicas}: must be at least 1")
    if processes is not None and processes % replicas:
        raise UserError(f"trainer.strategy.replicas={replicas} does not divide {processes} processes")


def whole_replicas(replicas: int, processes: int) -> str | None:
    """Return a warning if there are as many replicas as processes; None if not."""
    if processes == 1 or replicas != processes:
        return None
    return (
        f"trainer.strategy.replicas={replicas} is the number of processes: nothing is sharded, and each holds the full "
        "model; use fewer replicas, or --config configs/strategy/ddp.yaml"
    )


def check_zero(stage: int, offload_parameters: bool, clip: str = "norm") -> None:
    """Check the options of ZeRO and the trainer's method of gradient clipping.

    Raises:
        UserError: ZeRO does not support them.
    """
    if stage not in (1, 2, 3):
        raise UserError(f"trainer.strategy.stage={stage}: ZeRO has stages 1, 2 and 3")
    if offload_parameters and stage != 3:
        raise UserError(f"trainer.strategy.offload_parameters needs stage 3, not {stage}")
    if clip == "value":
        raise UserError("trainer.gradient_clip_algorithm=value: ZeRO clips gradients only by norm; leave it out")
