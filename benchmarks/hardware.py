"""What a benchmark ran on."""

import platform
from pathlib import Path


def cpu_name() -> str:
    """The processor's model, where the system tells it."""
    found = Path("/proc/cpuinfo")
    lines = found.read_text().splitlines() if found.exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()
