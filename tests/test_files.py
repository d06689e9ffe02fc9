"""Atomic writes: whole or absent, also when the disk is full; and weights that are what they were when written."""

import errno
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from tailcal import errors, files, weights
from tailcal.errors import UserError
from tests.conftest import ROOT


def full_disk(_descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_keeps_the_old_file_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    files.write_json(path, {"a": 1})
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="cannot write: No space left on device"):
        files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_ends_a_stage_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(SystemExit) as ended:
        errors.run(lambda: files.write_text(tmp_path / "x.txt", "text"))
    assert ended.value.code == f"error: {tmp_path / 'x.txt'}: cannot write: No space left on device"


@pytest.mark.parametrize(
    ("goes_on", "said"),
    [(False, ""), (True, "; run the same command again to go on from the last checkpoint")],
)
def test_a_checkpoint_is_promised_where_there_is_one(goes_on, said):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        errors.run(interrupted, goes_on)
    assert ended.value.code == f"error: interrupted{said}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: --seed"),
        (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["--seed", "1", "two\nlines"], r"unrecognized arguments: two\nlines"),
    ],
)
def test_a_wrong_option_is_one_line(arguments, said, capsys):
    parser = errors.CommandLine("stages.x", "What it does.")
    parser.add_argument("--seed", type=int, required=True)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {said}: see python -m stages.x --help\n"


def test_a_failing_block_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), files.atomic(tmp_path / "x") as stream:
        stream.write(b"half")
        stream.write(bytes([1 // 0]))
    assert list(tmp_path.iterdir()) == []


def test_arrays_round_trip_and_objects_are_refused(tmp_path):
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    files.write_array(tmp_path / "a.npy", array)
    assert np.array_equal(files.read_array(tmp_path / "a.npy"), array)
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"o\.npy is damaged"):
        files.read_array(tmp_path / "o.npy")


def test_nan_is_no_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "x.json", {"a": float("nan")})


def test_weights_round_trip_and_refuse_other_bytes_and_other_networks(tmp_path):
    path, network, other = tmp_path / "seed0.safetensors", torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    weights.save_weights(network, path)
    weights.load_weights(other, path, files.sha256(path))
    assert torch.equal(network.weight, other.weight)
    with pytest.raises(UserError, match="is damaged"):
        weights.load_weights(other, path, "0" * 64)
    with pytest.raises(UserError, match="holds the weights of another network"):
        weights.load_weights(torch.nn.Linear(4, 2), path, files.sha256(path))
    with pytest.raises(UserError, match="is missing"):
        weights.load_weights(other, tmp_path / "none", "")


@pytest.mark.parametrize("module", ["stages.represent", "tailcal.predict", "tailcal.export"])
def test_an_interrupt_while_a_command_imports_its_libraries_has_no_traceback(module, tmp_path):
    """At the first library that it imports; a program that imports us keeps its own way with interrupts."""
    (tmp_path / "numpy.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    package = module.partition(".")[0]
    heeding = "import signal, sys, runpy; signal.signal(signal.SIGINT, signal.default_int_handler)"
    run = f"{heeding}; sys.argv = ['-m']; import {package}; runpy.run_module({module!r}, alter_sys=True)"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}:{ROOT / 'src'}"}
    ended = subprocess.run([sys.executable, "-c", run], env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")
    ended = subprocess.run(
        [sys.executable, "-c", f"{heeding}; import {module}"], env=environment, capture_output=True, text=True
    )
    assert "KeyboardInterrupt" in ended.stderr


def test_a_command_that_has_begun_says_that_it_was_interrupted():
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit, match="error: interrupted"):
            errors.run(lambda: os.kill(os.getpid(), signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
