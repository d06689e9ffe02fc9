"""A long training takes no more memory, open files and log lines than a short one; one that diverges stops soon."""

import statistics
import subprocess
import time
from typing import NamedTuple

import psutil
import pytest
import torch

from tailcal import checkpoint
from tailcal.errors import UserError
from tailcal.method import load
from tests.conftest import Project
from tests.test_contract import CPU, replica_of, trained

CELL = ("--dataset", "digits_lt", "--representation", "ce")
# Bytes, of noise: a network of 300 KB kept an epoch would be 6 MB in a third of 60 epochs, and 100 MB in one of 1,000.
GROWTH = {60: 3 << 20, 1000: 8 << 20}


class Sample(NamedTuple):
    """What a process holds at one moment: bytes of memory, open files."""

    memory: int
    files: int


def watch(process: subprocess.Popen) -> list[Sample]:
    """Samples of a process until it ends."""
    watched, samples = psutil.Process(process.pid), []
    while process.poll() is None:
        try:
            samples.append(Sample(watched.memory_info().rss, watched.num_fds()))
        except psutil.Error:  # it has just ended
            break
        time.sleep(0.05)
    return samples


def in_training(p: Project, epochs: int) -> tuple[list[Sample], str]:
    """Train with a checkpoint every epoch; samples from the first checkpoint on, and the log."""
    process = p.start("python", "-m", "stages.represent", *CELL)
    while not list(p.root.glob(".scratch/represent/*/*/seed0.pt")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    samples, log = watch(process), process.communicate()[0]
    assert process.returncode == 0, log
    history = (p.root / "data/representations/digits_lt/ce/history.csv").read_text()
    assert history.count("\n") == 1 + epochs
    return samples, log


@pytest.mark.pipeline
def test_memory_files_and_log_of_a_long_training(project, long):
    epochs = 1000 if long else 60
    p = project(
        ("- 0\n- 1\n", "- 0\n"),
        ("epochs: 8\n", f"epochs: {epochs}\n"),
        ("checkpoint_seconds: 5", "checkpoint_seconds: 0"),
        cut=True,
    )
    samples, log = in_training(p, epochs)
    third = len(samples) // 3
    early, late = (samples[i * third :][:third] for i in (1, 2))
    before, after = (statistics.median(sample.memory for sample in some) for some in (early, late))
    print(f"\n{epochs} epochs: {before / 2**20:.1f} MiB, later {after / 2**20:.1f} MiB, {late[0].files} files open")
    assert after - before < GROWTH[epochs]
    # The least, as a checkpoint is one file more for the moment in which it is written; one that is kept stays.
    assert min(sample.files for sample in late) <= min(sample.files for sample in early)
    assert log.count("\n") < 30, log


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_loss_that_is_no_number_ends_its_epoch_and_the_checkpoint_before_is_good(bad, tmp_path):
    class Diverging(load("ce")):
        def loss(self, network, batch, progress):
            loss, logits = super().loss(network, batch, progress)
            return loss + torch.where(progress > 0.5, float(bad), 0.0), logits  # in the third of three epochs

    replica = replica_of("ce", tmp_path, cls=Diverging)
    for _ in range(2):  # and again when it goes on from there
        with pytest.raises(UserError) as caught:
            trained(replica)
        assert str(caught.value).startswith(f"ce: the loss became {bad} in epoch 3; ")
        assert f"the last good checkpoint is {replica.scratch}" in str(caught.value)
        assert "\n" not in str(caught.value)
        saved = checkpoint.load(replica.scratch, CPU)
        assert saved["epoch"] == 2
        assert all(value.isfinite().all() for value in saved["network"].values())
