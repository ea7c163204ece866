"""Records of optimizer steps: ``steps/step_NNNNNN.safetensors``, written by rank 0.

Tensors are one-dimensional samples (see ``StepRecorder.elements``) of full tensors, the same elements in every run of
a recipe. ``gradient/NAME`` is the gradient, reduced over all ranks and micro-batches, before clipping. ``weight/NAME``
is the weight after the step, for the policy's trained parameters and all parameters of the teacher. ``step_000000``
holds the weights before the first step.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import UserError
from .files import replace_file

RECORDER = "gear_lightning.callbacks.step_recorder.StepRecorder"  # writes the records


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        number: from 1; 0 for the start of the run.
        iteration: RL iteration, from 0.
        lr: learning rate of this step, the largest of the parameter groups'.
        norm: L2 norm of the full gradient before clipping.
        clip: ``trainer.gradient_clip_val``; 0 for none.
        clip_by: ``norm`` or ``value``.
        elements: maximum number of values kept of each tensor.
        gradients: name of a parameter -> sample.
        weights: name of a parameter -> sample, after the step.
    """

    number: int
    iteration: int
    lr: float
    norm: float
    clip: float
    clip_by: str
    elements: int
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def is_teacher(name: str) -> bool:
    """Return whether the parameter of `gear_lightning.module.GearModule` with this name belongs to the teacher."""
    return name.startswith("teacher.") or ".teacher." in name


def sample(whole: Tensor, elements: int) -> Tensor:
    """Return at most ``elements`` evenly spaced values of a tensor, in CPU memory; all values if there are no more."""
    every = max(1, -(-whole.numel() // elements))
    return whole.detach().flatten()[::every].to("cpu", copy=True)


def write_step(run: Path, step: Step) -> None:
    """Write one record atomically.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors.torch import save

    tensors = {f"gradient/{name}": value for name, value in step.gradients.items()}
    tensors |= {f"weight/{name}": value for name, value in step.weights.items()}
    header = {name: getattr(step, name) for name in ("iteration", "lr", "norm", "clip", "clip_by", "elements")}
    content = save(tensors, metadata={"step": json.dumps(header)})
    path = run / "steps" / f"step_{step.number:06d}.safetensors"
    replace_file(path, lambda file: file.write(content))


def read_steps(run: Path) -> Iterator[Step]:
    """Yield a run's records in order, with one in memory at a time.

    Raises:
        UserError: there are none, one is missing, or one cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted((run / "steps").glob("step_*.safetensors"))
    for number, path in enumerate(files):
        if path.stem != f"step_{number:06d}":
            raise UserError(f"{path.parent}: step {number} is missing")
        try:
            with safe_open(path, "pt") as file:
                header = json.loads(file.metadata()["step"])
                parts: dict[str, dict[str, Tensor]] = {"gradient": {}, "weight": {}}
                for key in list(file.keys()):
                    kind, _, name = key.partition("/")
                    parts[kind][name] = file.get_tensor(key)
            step = Step(number, gradients=parts["gradient"], weights=parts["weight"], **header)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from None
        yield step
    if not files:
        raise UserError(f"{run / 'steps'}: no records of optimizer steps; train with --trainer.callbacks+={RECORDER}")
