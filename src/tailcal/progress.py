"""Progress of a long stage: a live bar on a terminal, a line now and then in a log."""

import sys
import time

from tqdm import tqdm

LOG_SECONDS = 15.0


class Progress:
    """Counts epochs and shows epoch, loss, images a second and the time left.

    On a terminal this is one tqdm bar. Elsewhere a line is printed every `LOG_SECONDS` and one at the end. `silent`:
    nothing at all, for all but the first of several processes.
    """

    def __init__(self, title: str, epochs: int, done: int, images_per_epoch: int, silent: bool = False):
        self.title, self.epochs, self.images = title, epochs, images_per_epoch
        self.first, self.started = done, time.monotonic()
        self.printed = self.started
        self.bar, self.silent = None, silent
        if silent:
            return
        if done < epochs and sys.stderr.isatty():
            self.bar = tqdm(total=epochs, initial=done, desc=title, unit="epoch", dynamic_ncols=True, leave=True)
        if 0 < done < epochs:
            print(f"{title}: goes on after epoch {done} of {epochs}", file=sys.stderr)

    def epoch(self, done: int, loss: float) -> None:
        """Say that `done` epochs are finished and what the last one's mean loss was."""
        if self.silent:
            return
        now = time.monotonic()
        per_epoch = (now - self.started) / (done - self.first)
        rate = self.images / max(per_epoch, 1e-9)
        if self.bar:
            self.bar.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} images/s", refresh=False)
            self.bar.update(1)
            if done == self.epochs:
                self.bar.close()
        elif done == self.epochs or now - self.printed >= LOG_SECONDS:
            self.printed = now
            left = per_epoch * (self.epochs - done)
            remaining = f", {left:.0f} s left" if done < self.epochs else f", {now - self.started:.1f} s"
            print(
                f"{self.title}: epoch {done}/{self.epochs}, loss {loss:.4f}, {rate:,.0f} images/s{remaining}",
                file=sys.stderr,
                flush=True,
            )
