"""The stages of dvc.yaml, one script each. Run them from the project's root: `python -m stages.represent --help`."""

import contextlib
import ctypes
import os
import shutil
import signal
import sys
from pathlib import Path

if sys.platform != "linux":  # its locks, signals and counts of cores are used all over
    sys.exit(f"error: the stages run on Linux only, and this is {sys.platform}; tailcal.predict may run here")

# The library of this very tree, not of an installed copy: `dvc exp run --temp` and `--queue` run in a copy of the
# project, and must import that copy's code.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
from tailcal import portable  # before the libraries: tailcal sees to interrupts while they are imported

portable.set_variables()
# Else streams beyond eight share a queue to the GPU. It is read when a program first uses the GPU.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _begin_under_dvc() -> None:
    """End with DVC, which alone can record what this stage makes, and keep a copy of dvc.lock: .scratch/dvc.lock.

    DVC writes dvc.lock in place, which takes it a second or more, but never while a stage runs. So the copy is whole
    when a DVC that was killed has left half of the file.
    """
    end_with_parent()
    scratch = Path(".scratch")
    # There is no dvc.lock before the first stage has ended; and a stage that cannot write says so itself, in one line.
    with contextlib.suppress(OSError):
        scratch.mkdir(exist_ok=True)
        shutil.copyfile("dvc.lock", scratch / ".dvc.lock.part").replace(scratch / "dvc.lock")


if os.environ.pop("DVC_STAGE", None):  # popped, since processes that a stage starts import this again
    _begin_under_dvc()
