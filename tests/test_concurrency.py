"""Several processes at once: one makes an artefact, the others end with a clear message, and nothing is corrupted.

Two `dvc repro` are in tests/test_pipeline.py.
"""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages import calibrate, paths, represent, workspace
from tailcal import cifar_archive, lock
from tailcal.cell import CellName
from tailcal.errors import UserError
from tests.conftest import edit
from tests.killing import leftovers

CELL = ("--dataset", "digits_lt", "--representation", "ce")
LOCK = f".scratch/locks/{hashlib.sha256(b'data/representations/digits_lt/ce').hexdigest()[:32]}.lock"
LONGER = ("epochs: 8\n", "epochs: 40\n")


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Wait until a running process has made a file."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_second_is_told_who_is_first(tmp_path):
    output = tmp_path / "weights"
    with lock.alone(tmp_path / "locks", output, tmp_path / "more"):
        assert len(list((tmp_path / "locks").iterdir())) == 1
        with (
            pytest.raises(
                UserError, match=rf"weights: another process \(pid {os.getpid()}\) is making it: wait for it"
            ),
            lock.alone(tmp_path / "locks", output),
        ):
            pytest.fail("both are alone")
        with lock.alone(tmp_path / "locks", tmp_path / "another"):
            pass
    with lock.alone(tmp_path / "locks", output):
        pass
    assert not list((tmp_path / "locks").iterdir())


def test_a_killed_process_locks_nothing_and_its_leftovers_go(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from tailcal import files, lock\n"
        "out, folder = Path('out.json'), Path('folder')\n"
        "with lock.alone(Path('locks'), out, folder), files.atomic(out), files.atomic(folder / 'a/b'):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    source = Path(lock.__file__).parents[1]
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(source)})
    assert ran.returncode == -signal.SIGKILL
    others = [tmp_path / ".another.json.x1.part", tmp_path / "folder/a/whole"]
    for other in others:
        other.touch()
    assert len(leftovers(tmp_path)) == 3
    with lock.alone(tmp_path / "locks", tmp_path / "out.json", tmp_path / "folder"):
        assert leftovers(tmp_path) == others[:1]
    assert all(other.exists() for other in others)


def test_of_processes_that_train_together_the_first_takes_the_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with lock.alone(tmp_path / "locks", tmp_path / "weights"):
        assert not (tmp_path / "locks").exists()


def test_a_folder_of_locks_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "scratch").write_text("a file")
    with pytest.raises(OSError, match="cannot write") as caught, lock.alone(tmp_path / "scratch/locks", Path("made")):
        pass
    assert caught.value.filename == str(tmp_path / "scratch/locks")


def test_a_project_and_a_workspace_in_it_fetch_an_archive_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    archive, sha256 = paths.DOWNLOADS / "archive", hashlib.sha256(b"whole").hexdigest()
    left = archive.with_name(".archive.x1.part")
    left.parent.mkdir(parents=True)
    left.touch()

    def while_it_comes(*_):
        assert not left.exists()
        with workspace.inside(Path("data/published")), pytest.raises(UserError, match=rf"{archive}: another process"):
            cifar_archive.ensure("http://nowhere", archive, sha256)
        yield b"whole"

    monkeypatch.setattr(cifar_archive, "_blocks", while_it_comes)
    cifar_archive.ensure("http://nowhere", archive, sha256)
    assert list(paths.DOWNLOADS.iterdir()) == [archive]


def test_a_workspace_finds_the_downloads_of_the_project_that_it_lies_in(tmp_path, monkeypatch):
    """Also after the project has been moved, and where a link leads elsewhere."""

    def found(root):
        monkeypatch.chdir(root)
        with workspace.inside(Path("data/published")):
            return paths.DOWNLOADS.resolve()

    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    assert found(before) == before / paths.DOWNLOADS
    link = before.rename(after) / "data/published" / paths.DOWNLOADS
    assert link.resolve() == after / paths.DOWNLOADS
    link.unlink()
    link.symlink_to(tmp_path)
    assert found(after) == after / paths.DOWNLOADS


@pytest.mark.pipeline
def test_two_trainings_of_one_cell(project):
    p = project(LONGER, cut=True)
    first = p.start("python", "-m", "stages.represent", *CELL)
    wait_for(p.root / LOCK, first)
    output = p.inside("represent", *CELL, ok=False)
    assert output == (
        f"error: data/representations/digits_lt/ce: another process (pid {first.pid}) is making it: "
        "wait for it, or stop it\n"
    )
    first.send_signal(signal.SIGKILL)
    first.wait()
    edit(p.root / "params.yaml", [LONGER[::-1]])  # nobody has to come upon this one
    p.inside("represent", *CELL)


def test_an_error_of_an_option_in_a_workspace_says_no_other_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^--images /x: is wrong$"), workspace.inside(Path("inner")):
        raise UserError("--images /x: is wrong")


def test_an_error_in_a_workspace_says_where_its_paths_begin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    says = r"meta.json is damaged \(in data/modes/bf16, where this works\)"
    with pytest.raises(UserError, match=says), workspace.inside(Path("data/modes/bf16")):
        raise UserError("data/lt/x/meta.json is damaged")
    assert Path.cwd() == tmp_path


def test_stages_in_a_workspace_remove_all_that_a_killed_one_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cell = CellName("d", "r", "c")
    places = [paths.representation("d", "r"), paths.costs("represent", "d", "r"), paths.costs("calibrate", *cell)]
    places += [place(*cell) for place in (paths.classifier, paths.predictions)]
    places += [paths.scratch("represent", "d", "r"), paths.scratch("calibrate", *cell)]
    left = [(place.parent if place.suffix else place) / f".{place.name}.x1.part" for place in places]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for stage in (represent, calibrate):
        monkeypatch.setattr(stage, stage.__name__.rpartition(".")[2], lambda *_: None)
    workspace.run_stage1(None, "d", "r")
    with workspace.run_stage2(None, cell):
        assert not [path for path in left if path.exists()]
