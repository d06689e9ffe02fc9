"""The stages of dvc.yaml, one script each. Run them from the project's root: `python -m stages.represent --help`."""

import contextlib
import ctypes
import os
import shutil
import signal
import sys
from itertools import takewhile
from pathlib import Path

if sys.platform != "linux":  # its locks, signals and counts of cores are used all over
    sys.exit(f"error: the stages run on Linux only, and this is {sys.platform}; tailcal.predict may run here")

# The library of this very tree, not of an installed copy: `dvc exp run --temp` and `--queue` run in a copy of the
# project, and must import that copy's code.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
import tailcal  # noqa: F401  (before the libraries: it sees to interrupts while they are imported)

# Instructions that x86-64 processors have had for ten years, also where there are wider ones: sums in wider registers
# round otherwise, and training makes another network of that. They must be set before torch looks. Whoever has set them
# already, for speed, gets other bits than everybody else.
PORTABLE = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"}


def _has_avx2() -> bool:
    """Whether this processor has them: torch would take our word for it, and die of an illegal instruction."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as told:
        return any("avx2" in line.split() for line in takewhile(str.strip, told))  # of the first core
    return False


if _has_avx2():
    for _name, _value in PORTABLE.items():
        os.environ.setdefault(_name, _value)


def _begin_under_dvc() -> None:
    """End with DVC, which alone can record what this stage makes, and keep a copy of dvc.lock: .scratch/dvc.lock.

    DVC writes dvc.lock in place, which takes it a second or more, but never while a stage runs. So the copy is whole
    when a DVC that was killed has left half of the file.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    scratch = Path(".scratch")
    # There is no dvc.lock before the first stage has ended; and a stage that cannot write says so itself, in one line.
    with contextlib.suppress(OSError):
        scratch.mkdir(exist_ok=True)
        shutil.copyfile("dvc.lock", scratch / ".dvc.lock.part").replace(scratch / "dvc.lock")


if os.environ.pop("DVC_STAGE", None):  # popped, since processes that a stage starts import this again
    _begin_under_dvc()
