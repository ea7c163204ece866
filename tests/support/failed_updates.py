"""What must hold after an update of a server's weights that fails."""

from typing import Any

import pytest
from stand_in_server import StandIn

from gear_lightning.generation import Sampling, VLLMEngine
from gear_lightning.serving.client import ServerError


def check_failed_update(made: StandIn, engine: VLLMEngine, policy: Any, fault: str, message: str) -> None:
    """Check that a fault is reported, that the update never counts as done, and that a later one succeeds."""
    made.fault = fault
    with pytest.raises(ServerError, match=message):
        engine.begin(policy, Sampling(), {5})
    assert engine.fingerprint(None) is None
    made.fault = ""
    engine.begin(policy, Sampling(), {5})
    assert engine.fingerprint(None) == made.version
