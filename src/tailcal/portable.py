"""The instructions that results may depend on: those that x86-64 processors have had for ten years.

Sums in wider registers round otherwise, and training makes another network of that. The variables must be set before
torch is imported. Whoever has set them already, for speed, gets other bits than everybody else.
"""

import contextlib
import os
from itertools import takewhile
from pathlib import Path

VARIABLES = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"}


def set_variables() -> None:
    """Set those that are not set yet, where the processor has AVX2."""
    if _has_avx2():
        for name, value in VARIABLES.items():
            os.environ.setdefault(name, value)


def deviations() -> list[str]:
    """The variables that are set to something else, as `NAME=value`."""
    found = {name: os.environ.get(name, value) for name, value in VARIABLES.items()}
    return [f"{name}={value}" for name, value in found.items() if value != VARIABLES[name]]


def _has_avx2() -> bool:
    """Whether this processor has it: torch would take our word for it, and die of an illegal instruction."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as told:
        return any("avx2" in line.split() for line in takewhile(str.strip, told))  # of the first core
    return False
