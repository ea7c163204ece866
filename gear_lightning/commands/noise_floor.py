"""``gear-lightning noise-floor``: measure how rounding changes credit. A ``fit`` that stops before its first step."""

import sys
from functools import partial
from typing import Any

from ..credit import CreditAssigner
from ..errors import UserError
from ..probes.noise_floor import FILE, NEAR_ONE, QUANTILES, MeasureNoise
from .probe import ProbeCLI, probe_command


class NoiseFloorCLI(ProbeCLI):
    """``gear-lightning noise-floor``."""

    command, file = "noise-floor", FILE

    def make_probe(self, options: Any) -> MeasureNoise:
        return MeasureNoise(options["micro_batches"], options["rollouts"])

    def before_instantiate_classes(self) -> None:
        if self.config["fit"]["micro_batches"] < 1:
            raise UserError(f"micro_batches={self.config['fit']['micro_batches']}: must be at least 1")
        strategy = self.config["fit"]["trainer"]["strategy"]
        if not isinstance(strategy, str) and self.config["fit"]["trainer"]["precision"] not in (None, "32-true"):
            print(
                "This measures in one process, without the recipe's strategy. A run under FSDP2 with bf16-mixed has "
                "larger rounding errors, and measures its own floor (callback noise_floor).",
                file=sys.stderr,
            )
        super().before_instantiate_classes()

    def before_fit(self) -> None:
        data = self.datamodule
        wanted = -(-self.probe.micro_batches * data.micro_batch_size // data.group_size)
        data.tasks_per_iteration = min(data.tasks_per_iteration, wanted)
        super().before_fit()

    def describe(self, result: dict[str, Any]) -> str:
        return table(result, self.model.credit)


noise_floor_command = partial(probe_command, NoiseFloorCLI)


def table(result: dict[str, Any], rule: CreditAssigner) -> str:
    """Return a measurement as text, with its consequence for the rule."""
    kind = f" ({result['divergence_kind']})" if result["divergence_kind"] else ""
    shapes = sorted({tuple(shape.values()) for shape in result["shapes"]})
    sizes = ", ".join(f"{rows} x {policy} (teacher: {teacher})" for rows, policy, teacher in shapes)
    off, least_weight = result["share_of_weights_off_one"], result["weight"]["min"]
    lines = [
        f"Noise floor of {result['rule']}{kind} in {result['precision']} on {result['device']},",
        "with equal weights and no privileged text:",
        f"{result['tokens']} tokens of {result['rollouts']} rollouts, rows x columns {sizes}",
        "",
        " " * 20 + "".join(f"{name:>10}" for name in QUANTILES),
    ]
    shown = [("|log-ratio|, nats", "log_ratio")] if rule.top_k else []
    shown += [("|divergence|, nats", "divergence"), ("weight", "weight"), ("|weight - 1|", "weight_off_one")]
    for name, key in shown:
        lines.append(f"{name:<20}" + "".join(f"{result[key][q]:>10.3g}" for q in QUANTILES))
    p99 = result["divergence"]["p99"]
    lines += [
        "",
        f"weights further than {NEAR_ONE} from 1: {off:.1%} of the tokens (the smallest weight is {least_weight:.3g})",
        f"anchors: {result['anchors_per_rollout']:.3g} per rollout",
    ]
    least = getattr(rule, "floor", None)
    if least is not None and getattr(rule, "segment_end", "none") != "none" and not rule.fixed_segments:
        if least <= p99:
            lines.append(
                f"The minimum divergence of an anchor, {least:g} nats, is INSIDE this floor: rounding opens segments. "
                f"Use a higher trainer.precision, or a model.credit.anchor_floor above {p99:.2g}."
            )
        else:
            lines.append(f"The minimum divergence of an anchor, {least:g} nats, is above the floor's p99 ({p99:.2g}).")
    return "\n".join(lines)
