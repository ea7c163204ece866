"""Description of the hardware that a benchmark ran on."""

import platform
from pathlib import Path


def cpu_name() -> str:
    """Return the processor's model name if the system provides it."""
    found = Path("/proc/cpuinfo")
    lines = found.read_text().splitlines() if found.exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()
