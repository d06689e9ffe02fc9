"""A stage as several processes of this machine that train one network together; how they meet is that of torchrun."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time

from stages import end_with_parent

SHARED_MISTAKE_SECONDS = 5.0  # that the first process has to report what another one has ended with


def launch(module: str, processes: int) -> None:
    """Run `python -m module` with the present arguments as `processes` processes on this machine, and exit as they do.

    Does nothing, and returns, for one process and in a process that was started so (by this or by torchrun). If one
    ends badly the others are stopped; they end with this process, however it ends.
    """
    if processes == 1 or "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    with contextlib.ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(1, processes)]  # the first speaks for all
        started = [
            subprocess.Popen(
                [sys.executable, "-m", module, *sys.argv[1:]],
                env=os.environ | meeting | {"WORLD_SIZE": str(processes), "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=errors,
                preexec_fn=end_with_parent,
            )
            for rank, errors in enumerate([None, *said])
        ]
        codes = _wait(started)
        if any(code < 0 for code in codes):
            sys.exit(
                "error: one of the processes was killed; run the same command again to go on from the last checkpoint"
            )
        if any(codes) and not codes[0]:
            alone = said[next(rank for rank, code in enumerate(codes) if code) - 1]
            alone.seek(0)
            sys.stderr.write(alone.read().decode(errors="replace"))
    sys.exit(max(codes))


def _wait(started: list[subprocess.Popen]) -> list[int]:
    """Wait until all processes have ended, or one has ended badly; returns how each ended (0: well, or not by itself)
    and stops the others."""
    while all(process.poll() in (None, 0) for process in started) and any(p.poll() is None for p in started):
        time.sleep(0.1)
    codes = [process.poll() or 0 for process in started]
    if any(codes[1:]):
        with contextlib.suppress(subprocess.TimeoutExpired):  # most mistakes are everybody's, so the first tells them
            codes[0] = started[0].wait(timeout=SHARED_MISTAKE_SECONDS)
    for process in started:
        process.kill()
        process.wait()
    return codes
