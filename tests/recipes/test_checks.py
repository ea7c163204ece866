"""Non-finite numbers in options are refused before training."""

import math
from functools import partial

import pytest
from tiny_runs import generation

from gear_lightning.callbacks.watchdog import Watchdog
from gear_lightning.credit import GEAR
from gear_lightning.environments.lookup_chain import LookupChainDemonstrations
from gear_lightning.environments.python_tool import PythonTool
from gear_lightning.environments.sandbox import Limits
from gear_lightning.errors import UserError
from gear_lightning.gear import find_spikes
from gear_lightning.generation.budgets import Budgets
from gear_lightning.generation.engine import Sampling
from gear_lightning.learning.lora import LoRA
from gear_lightning.learning.warm_start import WarmStart
from gear_lightning.rewards import OverlongPenalty

NUMERIC_OPTIONS = {
    "generation.success_threshold": lambda x: generation(success_threshold=x),
    "temperature": lambda x: Sampling(temperature=x),
    "top_p": lambda x: Sampling(top_p=x),
    "budgets.seconds": lambda x: Budgets(seconds=x),
    "budgets.step_seconds": lambda x: Budgets(step_seconds=x),
    "learning_rate": lambda x: WarmStart(LookupChainDemonstrations(), learning_rate=x),
    "lora.alpha": lambda x: LoRA(alpha=x),
    "limits.cpu_seconds": lambda x: Limits(cpu_seconds=x),
    "seconds": lambda x: PythonTool("contains", seconds=x),
    "overlong.factor": lambda x: OverlongPenalty(8, 8, factor=x),
    "watchdog.seconds": lambda x: Watchdog(seconds=x),
    "anchor_floor": lambda x: GEAR(anchor_floor=x),
    "mix_decay": lambda x: GEAR(mix_decay=x),
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("option", NUMERIC_OPTIONS)
def test_a_non_finite_number_is_refused_with_its_name(option, value):
    with pytest.raises(UserError, match=rf"{option}={value}.*"):
        NUMERIC_OPTIONS[option](value)


def test_a_window_longer_than_the_rollout_uses_all_previous_tokens():
    import torch

    divergence = torch.rand(3, 9, generator=torch.Generator().manual_seed(0))
    spikes = partial(find_spikes, divergence, torch.ones(3, 9, dtype=torch.bool), rule="rise", floor=0.1)
    assert torch.equal(spikes(level=1e300), spikes(level=9.0))
    assert spikes(level=9.0).any()
