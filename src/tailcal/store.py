"""Where the images of a split lie while they are used, and how batches of them reach the device.

device: all of them on the device, as uint8; a batch is one gather. Where they fit, this is the fastest.
host:   all of them in the host's memory (pinned, for a GPU).
disk:   in the file, memory-mapped; the operating system's page cache holds what fits.

From host or disk, a thread reads the coming batches ahead and copies them to the device while it computes. What it
holds of its own is bounded: 2 AHEAD + 2 steps of uint8 batches, whatever the size of the data set.
"""

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import Literal

import numpy as np
import psutil
import torch
from torch import Tensor

from tailcal.augment import augment, normalise, plain
from tailcal.draws import Draws
from tailcal.method import Batch
from tailcal.params import Augmentation, Placement
from tailcal.rows import chunk

AHEAD = 3  # steps that are read before they are wanted
DEVICE_SHARE, HOST_SHARE = 0.5, 0.3  # of the free memory that images may take; networks and other processes need theirs


def host_memory() -> int:
    """Bytes of memory that the host has free, or can free: what has been read from a disk and is kept counts too."""
    return psutil.virtual_memory().available


def choose(size: int, device: torch.device) -> Literal["device", "host", "disk"]:
    """The fastest place that has room for `size` bytes of images."""
    if device.type == "cuda" and size <= DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return "device"
    if size <= HOST_SHARE * host_memory():
        return "host" if device.type == "cuda" else "device"
    return "disk"


def channels_first(images: np.ndarray) -> Tensor:
    """A copy of [N, H, W, C] as [N, C, H, W]. With C = 1 a mere view would have strides that a convolution takes for
    another memory format, in which it rounds differently."""
    return torch.from_numpy(np.array(images.transpose(0, 3, 1, 2), order="C"))


def _resident(images: np.ndarray, device: torch.device) -> Tensor:
    """All images [N, H, W, C] as [N, C, H, W] on the device, by way of a few MB of the host's memory at a time."""
    n, h, w, c = images.shape
    resident = torch.empty((n, c, h, w), dtype=torch.uint8, device=device)
    size = chunk(images.shape, images.dtype)
    for start in range(0, n, size):
        resident[start : start + size].copy_(channels_first(images[start : start + size]))
    return resident


class Images:
    """One split: images uint8 [N, H, W, C] wherever they lie, labels int64 [N] on the device, and their preparation."""

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        augmentation: Augmentation,
        device: torch.device,
        placement: Placement = "auto",
    ):
        self.augmentation, self.device = augmentation, device
        self.placement = choose(images.nbytes, device) if placement == "auto" else placement
        _, *self.size, self.channels = images.shape
        self.labels = torch.from_numpy(np.array(labels)).to(device)
        self.mean, self.std = (torch.tensor(v, device=device) for v in (augmentation.mean, augmentation.std))
        if self.placement == "device":
            self._images = _resident(images, device)
        elif self.placement == "host":
            self._images = np.array(images)
        else:
            self._images = images
        # Of another priority than the trainings' streams, of which torch hands out the same 32 again and again: a copy
        # must not fall into what a training records.
        self._copies = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self.labels)

    def steps(self, drawn: list[np.ndarray]) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """For each step, from each sampler, images uint8 [B, C, H, W] and labels [B] on the device.

        drawn: one array per sampler, the indices of its images, int64 [steps, B].
        """
        if self.placement == "device":
            streams = [torch.from_numpy(indices).to(self.device) for indices in drawn]
            for step in range(len(drawn[0])):
                yield [(self._images[stream[step]], self.labels[stream[step]]) for stream in streams]
            return
        with ThreadPoolExecutor(max_workers=1) as reader:
            asked = (reader.submit(self._read, rows) for rows in zip(*drawn, strict=True))
            ahead, launched = list(islice(asked, AHEAD)), deque()
            while ahead:
                batches, copied = ahead.pop(0).result()
                ahead += islice(asked, 1)
                if not copied:
                    yield batches
                    continue
                current = torch.cuda.current_stream(self.device)
                current.wait_event(copied)
                for tensor in chain.from_iterable(batches):
                    tensor.record_stream(current)
                yield batches
                # A step that is launched may wait long for its turn, and holds its images until then.
                launched.append(current.record_event())
                if len(launched) > AHEAD:
                    launched.popleft().synchronize()

    def _read(self, rows: tuple[np.ndarray, ...]) -> tuple[list[tuple[Tensor, Tensor]], torch.cuda.Event | None]:
        """Runs in the reading thread: the images at each of `rows`, on their way to the device."""
        if self._copies is None:
            return [(self._gather(indices), self.labels[torch.from_numpy(indices)]) for indices in rows], None
        with torch.cuda.stream(self._copies):
            batches = [
                (
                    self._gather(indices).pin_memory().to(self.device, non_blocking=True),
                    self.labels[torch.from_numpy(indices).to(self.device)],
                )
                for indices in rows
            ]
            return batches, self._copies.record_event()

    def _gather(self, indices: np.ndarray) -> Tensor:
        order = np.argsort(indices)  # the disk is read in its own order
        batch = np.empty((len(indices), *self._images.shape[1:]), np.uint8)
        batch[order] = self._images[indices[order]]
        return channels_first(batch)

    def prepare(self, images: Tensor, labels: Tensor, strength: str, draws: Draws) -> Batch:
        """Drawn images, augmented with this strength (`standard` or `strong`) and normalised."""
        images = augment(images, self.augmentation, strength, draws)
        return Batch(normalise(images, self.mean, self.std), labels, labels)

    def whole(self, pixels: int) -> Iterator[Tensor]:
        """All images in order, without augmentation and normalised: float32 [B, C, H, W] of about `pixels` pixels.

        What a network makes of an image grows with its size, so that large images come in smaller batches. Of no
        images, one empty batch: a hold-out may be empty, and its logits still have K columns.
        """
        size = max(1, pixels // math.prod(self.size))
        for start in range(0, max(len(self), 1), size):
            stop = min(start + size, len(self))
            if self.placement == "device":
                images = self._images[start:stop]
            else:
                images = self._gather(np.arange(start, stop)).to(self.device)
            yield normalise(plain(images, self.augmentation), self.mean, self.std)
