"""Copies of the project to run in, so that no test touches the checkout."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the tests run side by side already

ROOT = Path(__file__).resolve().parent.parent
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


def edit(path: Path, changes: list[tuple[str, str]]) -> None:
    """Replace the first occurrence of each text; fail when one is not there."""
    text = path.read_text()
    for old, new in changes:
        assert old in text, f"{path.name} has no {old!r}"
        text = text.replace(old, new, 1)
    path.write_text(text)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the long form of the tests that break things: minutes each")


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Whether the long form of a test was asked for."""
    return request.config.getoption("--long")


class Project:
    """A copy of the project with a git repository of its own."""

    def __init__(self, root: Path, changes: list[tuple[str, str]]):
        self.root = root
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        for name in listed:
            if (ROOT / name).exists():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, root / name, follow_symlinks=False)
        edit(root / "params.yaml", changes)
        for command in (["git", "init", "-q"], ["git", "add", "-A"], ["git", "commit", "-qm", "copy"]):
            self.run(*command)

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


@pytest.fixture
def project(tmp_path: Path) -> Callable[..., Project]:
    """Make a copy of the project with a tiny grid; further changes to its params.yaml as (old, new) pairs."""

    def make(*changes: tuple[str, str], name: str = "project") -> Project:
        return Project(tmp_path / name, [*TINY, *changes])

    return make
