"""Copies of the project to run in, so that no test touches the checkout."""

import compileall
import contextlib
import importlib
import io
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

# Before torch and numpy, which look at the environment: at what this sets for every stage, and at the threads.
import stages  # noqa: F401

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # the tests run side by side already

# isort: split
import torch

from tailcal import errors

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
STAGE1 = {  # what the stages read of the provenance of stage 1
    "code": "0+0",
    "params": {"dataset": {}, "representation": {}},
    "data": {},
    "device": "cpu",
    "versions": {},
    "network": {},
    "weights": {"seed0": "0123456789abcdef"},
    "history": "",
}
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # `python` in dvc.yaml is this one
    "GIT_AUTHOR_NAME": "test",
    "GIT_AUTHOR_EMAIL": "test@localhost",
    "GIT_COMMITTER_NAME": "test",
    "GIT_COMMITTER_EMAIL": "test@localhost",
    "DVC_NO_ANALYTICS": "1",
}
TINY = [  # digits_lt, two cells, two seeds, a few epochs
    ("  - mixup\n  - balanced_softmax\n  - bagmar\n  - fsgl\n", ""),
    ("  - crt\n  - mislas\n  - marc\n", "  - mislas\n"),
    ("- 1\n- 2\n", "- 1\n"),
    ("epochs: 60\n", "epochs: 8\n"),
    ("- 48\n      - 54\n", "- 6\n"),
    ("epochs: 10\n", "epochs: 2\n"),
    ("replicas: 2", "replicas: 1"),  # the tests run side by side already
]
TINY_STAGES = re.compile(r"check|report|\w+@digits_lt|represent@digits_lt-ce|\w+@digits_lt-ce-(joint|mislas)")

IN_ORDER = """
import importlib, sys
for stage in sys.argv[1:]:
    name, *sys.argv[1:] = stage.split()
    importlib.import_module(f"stages.{name}").main()
"""


@pytest.fixture(autouse=True)
def _the_same_random_numbers_each_time():
    """What a test draws from torch's global generator; without this it would be another draw in every run."""
    torch.manual_seed(0)


def edit(path: Path, changes: list[tuple[str, str]]) -> None:
    """Replace the first occurrence of each text; fail when one is not there."""
    text = path.read_text()
    for old, new in changes:
        assert old in text, f"{path.name} has no {old!r}"
        text = text.replace(old, new, 1)
    path.write_text(text)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the long form of the tests that break things: minutes each")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Have a worker that is done take over what the other has not begun: some tests take a minute."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Whether the long form of a test was asked for."""
    return request.config.getoption("--long")


class Project:
    """A copy of the project with a git repository of its own."""

    def __init__(self, root: Path):
        self.root = root

    def copy(self, root: Path) -> "Project":
        """The project as it is, in another folder."""
        return Project(Path(shutil.copytree(self.root, root, symlinks=True)))

    def start(self, *command: str) -> subprocess.Popen:
        """Start a command in the project, in a process group of its own."""
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=ENVIRONMENT,
            text=True,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, *command: str, ok: bool = True) -> str:
        """Run a command in the project; returns what it printed."""
        process = self.start(*command)
        output, _ = process.communicate(timeout=300)
        assert (process.returncode == 0) == ok, f"{' '.join(command)} ended with {process.returncode}:\n{output}"
        return output

    def stage(self, name: str, *arguments: str, ok: bool = True) -> str:
        """Run one stage script."""
        return self.run("python", "-m", f"stages.{name}", *arguments, ok=ok)

    def in_order(self, *commands: str, **environment: int) -> None:
        """Run stages, each a name and its arguments, one after the other in one process of the project."""
        self.run("env", *(f"{key}={value}" for key, value in environment.items()), "python", "-c", IN_ORDER, *commands)

    def inside(self, name: str, *arguments: str, ok: bool = True) -> str:
        """Run one stage in this process, by the checkout's code; returns what it printed.

        A process of its own imports torch for seconds, to train for a tenth of one.
        """
        return self._inside(lambda: errors.run(importlib.import_module(f"stages.{name}").main), name, *arguments, ok=ok)

    def script(self, name: str, *arguments: str, ok: bool = True) -> str:
        """The same, from the first line of the stage's script to its last, as a process of its own runs it."""
        return self._inside(lambda: runpy.run_module(f"stages.{name}", run_name="__main__"), name, *arguments, ok=ok)

    def _inside(self, call: Callable[[], object], name: str, *arguments: str, ok: bool) -> str:
        said, code, mode = io.StringIO(), 0, torch.get_deterministic_debug_mode()
        with (
            pytest.MonkeyPatch.context() as patch,
            warnings.catch_warnings(record=True) as warned,
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            warnings.simplefilter("ignore", DeprecationWarning)  # as in a process of its own, which prints the others
            warnings.filterwarnings("ignore", "'stages", RuntimeWarning)  # of runpy: what it runs is imported already
            patch.chdir(self.root)
            patch.setattr(sys, "argv", [name, *arguments])
            try:
                call()
            except SystemExit as end:
                code = end.code
                print(code)
            finally:
                torch.set_deterministic_debug_mode(mode)
        printed = said.getvalue() + "".join(f"{warning.message}\n" for warning in warned)
        assert (not code) == ok, f"{name} ended with {code}:\n{printed}"
        return printed


@pytest.fixture(scope="session")
def _tiny(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project with a tiny grid, and of dvc.lock its stages: DVC takes a second to read and write all of it."""
    root = tmp_path_factory.mktemp("tiny")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name, follow_symlinks=False)
    edit(root / "params.yaml", TINY)
    lock = yaml.load((root / "dvc.lock").read_text(), yaml.CSafeLoader)
    lock["stages"] = {name: stage for name, stage in lock["stages"].items() if TINY_STAGES.fullmatch(name)}
    (root / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))
    for folder in ("src", "stages"):  # once, and not by the first process in each copy
        compileall.compile_dir(root / folder, quiet=2)
    p = Project(root)
    for command in (["git", "init", "-q"], ["git", "add", "-A"], ["git", "commit", "-qm", "copy"]):
        p.run(*command)
    return p


@pytest.fixture(scope="session")
def _cut(_tiny: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The same with its data set downloaded and subsampled."""
    p = _tiny.copy(tmp_path_factory.mktemp("cut") / "project")
    for stage in ("download", "subsample"):
        p.inside(stage, "--dataset", "digits_lt")
    return p


@pytest.fixture
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Project]:
    """Make a copy of the project with a tiny grid; further changes to its params.yaml as (old, new) pairs.

    cut: with its data set downloaded and subsampled, as the changes must leave it.
    """

    def make(*changes: tuple[str, str], name: str = "project", cut: bool = False) -> Project:
        p = request.getfixturevalue("_cut" if cut else "_tiny").copy(tmp_path / name)
        if changes:
            edit(p.root / "params.yaml", list(changes))
            p.run("git", "commit", "-qam", "changes")
        return p

    return make


@pytest.fixture
def interrupts():
    """Interrupts come as in a command, however the tests were started."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
