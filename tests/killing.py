"""Killing the pipeline at random moments, and what it takes to be as if nothing had happened.

A kill is a signal to one process or to its whole group, as a terminal, a batch system or the kernel sends it.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil
import yaml

from tests.conftest import Project

HOW = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MEND = "cp .scratch/dvc.lock dvc.lock; rm -f .dvc/tmp/rwlock .git/index.lock"  # as README.md says
TIMED = ("data/costs/", "plots/costs.html")  # what holds times, and so differs from run to run


@dataclass(frozen=True)
class Kill:
    """One kill that hit: the stage at work, or `dvc` between two, or `dvc, writing` when it has left a file torn."""

    at_work: str
    how: signal.Signals
    whom: str  # stage | dvc | group
    lost: float  # seconds that the next run repeats: since the stage began, its start included, or since its checkpoint


@dataclass
class Tally:
    """All kills of a run of the harness."""

    kills: list[Kill] = field(default_factory=list)
    resumed: int = 0  # trainings and packings that said they go on where they were
    torn: Counter = field(default_factory=Counter)  # files that DVC was found to have left unfinished

    def report(self) -> str:
        """A line a stage: how many kills by whom and how, and the work that was repeated."""
        lines = [f"{len(self.kills)} kills, {self.resumed} times gone on from unfinished work, torn: {dict(self.torn)}"]
        for at_work in sorted({kill.at_work for kill in self.kills}):
            some = [kill for kill in self.kills if kill.at_work == at_work]
            by = Counter(f"{kill.how.name} {kill.whom}" for kill in some)
            lost = sorted(kill.lost for kill in some)
            lines.append(
                f"{at_work}: {len(some)} ({', '.join(f'{n} {name}' for name, n in sorted(by.items()))}); repeated: "
                f"{sum(lost) / len(lost):.1f} s on average, {lost[-1]:.1f} s at most"
            )
        return "\n".join(lines)


def artefacts(root: Path) -> dict[str, bytes]:
    """Every final artefact of a project by its name: data/, metrics/, plots/ and dvc.lock, but for what holds times."""
    files = [path for top in ("data", "metrics", "plots") for path in (root / top).rglob("*") if path.is_file()]
    named = {str(path.relative_to(root)): path for path in sorted([*files, root / "dvc.lock"]) if path.is_file()}
    return {name: path.read_bytes() for name, path in named.items() if not name.startswith(TIMED)}


def leftovers(root: Path) -> list[Path]:
    """Temporary files that nobody will give their name any more."""
    return [path for path in root.rglob("*.part") if ".git" not in path.parts]


def processes(root: Path) -> Iterator[psutil.Process]:
    """The processes that run in a project's folder."""
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(root):
                yield process
        except psutil.Error:  # it has just ended, or is not ours
            continue


class Stage(NamedTuple):
    """A stage at work: its process, its name, and when it began."""

    pid: int
    name: str
    began: float


def stage_at_work(root: Path) -> Stage | None:
    """The stage at work in a project; the first of its processes, where it has several."""
    for process in processes(root):
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if words[1:2] == ["-m"] and words[2].startswith("stages."):
                return Stage(process.pid, words[2].removeprefix("stages."), process.create_time())
    return None


def wait_for_the_end(root: Path, seconds: float = 10.0) -> None:
    """Wait until nothing runs in the project any more; fail when something is still there."""
    deadline = time.monotonic() + seconds
    while left := list(processes(root)):
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.05)


def lost_work(root: Path, began: float) -> float:
    """Seconds since a stage began, or since the last checkpoint that it wrote."""
    saved = [path.stat().st_mtime for path in root.glob(".scratch/*/*/*/seed*.pt")]
    return time.time() - max([began, *(when for when in saved if when > began)])


def has_begun(root: Path, process: subprocess.Popen) -> bool:
    """Whether a stage holds its lock: it has imported its libraries, and begins its work."""
    for lock in root.glob(".scratch/locks/*.lock"):
        with contextlib.suppress(FileNotFoundError):  # it has just been done
            if lock.read_text() == str(process.pid):
                return True
    return False


def kill_after(
    project: Project, seconds: float, how: signal.Signals, whom: str, *command: str, in_its_work: bool = False
) -> tuple[str, Kill | None]:
    """Start a command and kill it after so many seconds; returns what it printed, and the kill, None if it was done.

    It must have ended well then. whom: stage | dvc | group. Where that is not at work the command itself is killed.
    in_its_work: the command is a stage, and the seconds count from when it has begun.
    """
    process = project.start(*command)
    while in_its_work and process.poll() is None and not has_begun(project.root, process):
        time.sleep(0.01)
    try:
        output, _ = process.communicate(timeout=seconds)
        assert process.returncode == 0, output
        return output, None
    except subprocess.TimeoutExpired:
        pass
    stage = stage_at_work(project.root)
    at_work, began = (stage.name, stage.began) if stage else ("dvc", time.time())
    lost = lost_work(project.root, began)
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        if whom == "group":
            os.killpg(process.pid, how)
        else:
            os.kill(stage.pid if stage and whom == "stage" else process.pid, how)
    output, _ = process.communicate(timeout=120)
    wait_for_the_end(project.root)
    if at_work == "dvc" and torn(project.root):
        at_work = "dvc, writing"
    return output, Kill(at_work, how, whom, lost) if process.returncode else None


def torn(root: Path) -> list[str]:
    """What a killed DVC has left unfinished: `dvc.lock` that cannot be read or lacks stages, `rwlock`, `index.lock`."""
    found = []
    whole, here = root / ".scratch/dvc.lock", root / "dvc.lock"
    if whole.exists():
        stages, text = yaml.safe_load(whole.read_text())["stages"], here.read_text()
        try:
            if not (yaml.safe_load(text)["stages"].keys() >= stages.keys() and text.endswith("\n")):
                found.append("dvc.lock, shorter")
        except (yaml.YAMLError, TypeError, KeyError, AttributeError):
            found.append("dvc.lock, unreadable")
    with contextlib.suppress(FileNotFoundError):
        try:
            json.loads((root / ".dvc/tmp/rwlock").read_text())
        except ValueError:
            found.append("rwlock")
    if (root / ".git/index.lock").exists():
        found.append("index.lock")
    return found


def kill_until_done(
    project: Project,
    generator: random.Random,
    tally: Tally,
    kills: int,
    times: tuple[float, float],
    whom: tuple[str, ...],
    *command: str,
    in_its_work: bool = False,
    last: Callable[[], str] | None = None,
) -> None:
    """Run a command until it ends well, killing it `kills` times before, at a random one of `times` after its start.

    in_its_work: as in `kill_after`. last: what runs it when it is no more killed.
    """
    for _ in range(kills):
        how, hit = generator.choice(HOW), generator.choice(whom)
        if hit == "dvc" and how == signal.SIGINT:
            hit = "group"  # DVC leaves interrupts to its stage: only a terminal sends them, and to both
        output, kill = kill_after(project, generator.uniform(*times), how, hit, *command, in_its_work=in_its_work)
        tally.resumed += output.count("goes on after")
        if kill is None:
            return
        tally.kills.append(kill)
        if found := torn(project.root):
            tally.torn.update(found)
            project.run("sh", "-c", MEND)
    tally.resumed += (last() if last else project.run(*command)).count("goes on after")
