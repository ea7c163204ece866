"""The sections of a recipe, with the classes that they set options of, and the options that only one command has."""

from dataclasses import dataclass
from typing import Any

TRAINER = "lightning.pytorch.trainer.trainer.Trainer"
MODEL = "gear_lightning.module.GearModule"
DATA = "gear_lightning.data.RolloutDataModule"
WARM_START = "gear_lightning.learning.warm_start.WarmStart"
CALLBACKS = {  # callbacks of every run, in the order in which Lightning calls them
    "generation": "gear_lightning.callbacks.generation.GenerationCallback",
    "recorder": "gear_lightning.callbacks.rollout_recorder.RolloutRecorder",
    "credit_map": "gear_lightning.callbacks.credit_map.CreditMap",
    "health": "gear_lightning.callbacks.health.Health",
    "noise_floor": "gear_lightning.callbacks.noise_floor.NoiseFloor",
    "samples": "gear_lightning.callbacks.sample_table.SampleTable",
    "throughput": "gear_lightning.callbacks.throughput.Throughput",
    "progress": "gear_lightning.callbacks.progress.PhaseProgress",
    "preemption": "gear_lightning.callbacks.preemption.Preemption",
    "watchdog": "gear_lightning.callbacks.watchdog.Watchdog",
    # after the progress bar has opened
    "first_evaluation": "gear_lightning.callbacks.first_evaluation.FirstEvaluation",
    "checkpoint": "gear_lightning.callbacks.checkpoint.IterationCheckpoint",
}
TRAINER_DEFAULTS: dict[str, Any] = {
    "default_root_dir": "runs/default",
    "max_epochs": 100,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,  # `FirstEvaluation` replaces it
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}
DEFAULTS: dict[str, Any] = {
    # the module's default, as a class, so that an optimizer in a stacked config keeps its learning rate
    "model.optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-6, "weight_decay": 0.0}},
    "checkpoint.filename": "iteration={epoch:05d}",
    "checkpoint.auto_insert_metric_name": False,
    "checkpoint.enable_version_counter": False,  # an iteration repeated after a kill replaces its file
    "checkpoint.save_last": "link",
    "checkpoint.save_on_train_epoch_end": True,
}
STAGES = {  # arguments of the Trainer's methods that the command line does not set
    "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
    "validate": {"model", "dataloaders", "datamodule"},
    "test": {"model", "dataloaders", "datamodule"},
    "predict": {"model", "dataloaders", "datamodule"},
}


@dataclass(frozen=True)
class Own:
    """An option that only one command has.

    Args:
        name: its name.
        kind: its type.
        default: its default.
        text: its documentation.
    """

    name: str
    kind: Any
    default: Any
    text: str


WARM_START_TEXT = "Supervised stage before RL. Null: none."
SEED = Own("seed_everything", bool | int, 0, "Seed of everything random. True: draw a seed. False: do not seed.")
OUT = "File for the result. Null: {} in the run directory."
OWN: dict[str, tuple[Own, ...]] = {
    "teacher-check": (
        Own("out", str | None, None, OUT.format("teacher_check.json")),
        Own(
            "tasks", int | None, None,
            "Number of tasks, with data.group_size rollouts each. Null: data.tasks_per_iteration.",
        ),
    ),
    "noise-floor": (
        Own("out", str | None, None, OUT.format("noise_floor.json")),
        Own(
            "rollouts", str | None, None, "Run directory with recorded rollouts. Null: generate new ones.",
        ),
        Own("micro_batches", int, 2, "Maximum number of micro-batches to measure."),
    ),
}  # fmt: skip
