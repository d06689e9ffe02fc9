"""Where images lie: the same batches from everywhere, and a bound on memory that does not grow with the data set."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tailcal import store
from tailcal.params import PadCrop
from tailcal.store import AHEAD, Images

CPU = torch.device("cpu")
AUGMENTATION = PadCrop(kind="pad_crop", pad=0, flip=False, cutout=1, fill=128, mean=[0.0] * 3, std=[1.0] * 3)


def anonymous_memory() -> int:
    """Bytes that this process holds beside mapped files, which the system can drop at any time."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


@pytest.mark.parametrize("placement", ["device", "host", "disk"])
def test_a_step_has_the_images_and_labels_at_the_drawn_indices(placement):
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 5, 3), dtype=np.uint8)
    labels = np.arange(9) % 3
    drawn = [np.array([[0, 8, 8], [3, 1, 2]]), np.array([[5, 5, 4], [7, 0, 6]])]
    steps = list(Images(images, labels, AUGMENTATION, CPU, placement).steps(drawn))
    assert len(steps) == 2
    for step, pairs in enumerate(steps):
        for indices, (pixels, of_class) in zip((d[step] for d in drawn), pairs, strict=True):
            assert np.array_equal(pixels.numpy(), images[indices].transpose(0, 3, 1, 2))
            assert np.array_equal(of_class.numpy(), labels[indices])
            assert pixels.is_contiguous()


@pytest.mark.parametrize("placement", ["device", "host", "disk"])
def test_whole_gives_every_image_once_in_order(placement):
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    parts = list(Images(images, np.zeros(7, np.int64), AUGMENTATION, CPU, placement).whole(50))
    assert [len(part) for part in parts] == [3, 3, 1]
    np.testing.assert_allclose(torch.cat(parts).numpy(), images.transpose(0, 3, 1, 2) / np.float32(255), rtol=1e-6)


@pytest.mark.parametrize("placement", ["device", "host", "disk"])
def test_no_images_are_one_empty_batch(placement):
    nothing = Images(np.zeros((0, 4, 4, 3), np.uint8), np.zeros(0, np.int64), AUGMENTATION, CPU, placement)
    assert [part.shape for part in nothing.whole(3)] == [(0, 3, 4, 4)]


def test_from_disk_the_memory_is_bounded_by_the_steps_ahead_and_not_by_the_data(tmp_path):
    """600 MB of images in steps of 3 MB: what is held stays near 2 AHEAD + 2 steps, far from the 190 there are."""
    shape = (3052, 256, 256, 3)
    np.lib.format.open_memmap(tmp_path / "images.npy", "w+", np.uint8, shape).flush()
    images = np.load(tmp_path / "images.npy", mmap_mode="r")
    data = Images(images, np.zeros(len(images), np.int64), AUGMENTATION, CPU, "disk")
    drawn = [np.random.default_rng(0).permutation(len(images))[:3040].reshape(190, 16)]
    before = highest = anonymous_memory()
    for ((batch, _),) in data.steps(drawn):
        highest = max(highest, anonymous_memory())
        step_bytes = batch.numel()
    assert images.nbytes > 30 * (AHEAD + 3) * step_bytes
    assert highest - before < 10 * (AHEAD + 3) * step_bytes  # allocators keep some of it


def test_auto_takes_the_fastest_place_that_has_room(monkeypatch):
    monkeypatch.setattr(store, "host_memory", lambda: 1000)
    assert store.choose(200, CPU) == "device"
    assert store.choose(400, CPU) == "disk"


def test_memory_that_only_keeps_what_was_read_counts_as_free(monkeypatch):
    """As Linux has it: some is free, more is, or can be made so, and the rest is in use."""
    monkeypatch.setattr(store.psutil, "virtual_memory", lambda: SimpleNamespace(total=4000, free=10, available=1000))
    assert store.choose(300, CPU) == "device"


def test_an_error_while_reading_ahead_reaches_the_training():
    images = np.zeros((4, 2, 2, 3), np.uint8)
    data = Images(images, np.zeros(4, np.int64), AUGMENTATION, CPU, "disk")
    with pytest.raises(IndexError):
        list(data.steps([np.array([[0, 1], [2, 99]])]))
