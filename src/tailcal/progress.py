"""Progress of a long stage: a live bar on a terminal, a line now and then in a log."""

import sys
import time

from tqdm import tqdm

LOG_SECONDS = 15.0


class Progress:
    """Counts epochs or images and shows how many are done, images a second and the time left.

    On a terminal this is one tqdm bar. Elsewhere a line is printed every `LOG_SECONDS` and one at the end. `silent`
    prints nothing; it is set in every process but the first.
    """

    def __init__(self, title: str, unit: str, total: int, done: int, images: int = 1, silent: bool = False):
        """unit: what is counted; done: how many were done before; images: in one of them."""
        self.title, self.unit, self.total, self.images = title, unit, total, images
        self.first = self.done = done
        self.started = self.printed = time.monotonic()
        self.bar, self.silent = None, silent
        if silent:
            return
        if 0 < done < total:
            self._say(f"goes on after {done:,} of {total:,} {unit}s")
        if done < total and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, desc=title, unit=unit, dynamic_ncols=True)

    def add(self, count: int, note: str = "") -> None:
        """Say that `count` more are done; `note` is said with it."""
        self.done += count
        if self.silent:
            return
        now = time.monotonic()
        seconds = max(now - self.started, 1e-9)
        rate = (self.done - self.first) / seconds
        speed = f"{rate * self.images:,.0f} images/s"
        if self.bar is not None:
            self.bar.set_postfix_str(", ".join(filter(None, [note, speed])), refresh=False)
            self.bar.update(count)
            if self.done == self.total:
                self.bar.close()
        elif self.done == self.total or now - self.printed >= LOG_SECONDS:
            self.printed = now
            end = f"{seconds:.1f} s" if self.done == self.total else f"{(self.total - self.done) / rate:,.0f} s left"
            said = [f"{self.done:,} of {self.total:,} {self.unit}s", note, speed, end]
            self._say(", ".join(filter(None, said)))

    def _say(self, text: str) -> None:
        # In one piece: networks side by side write from threads of their own.
        sys.stderr.write(f"{self.title}: {text}\n")
        sys.stderr.flush()
