"""How trainings are executed: several side by side, and on a GPU each step as one replayed CUDA graph.

Nothing here changes what is computed. A training is a generator that pauses after every step. On a CPU each of them
has a thread of its own, and computes with that one thread: a network's bits do not depend on how many cores there are.
On a GPU one thread feeds them all in turn, each on a stream of its own, so that the kernels of small networks overlap.

With `cuda_graphs` a step is recorded once (augmentation, both passes, update) and replayed from then on, which costs
the host one launch instead of some thousand. A recorded step reads fixed addresses, so what differs from step to step
is copied there before: the images, the numbers drawn on the host, and the state of the device's generator.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import cache, partial
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from tailcal.draws import Draws, HostDraw

T = TypeVar("T")
Training = Callable[[], Generator[None, None, T]]
Pairs = list[tuple[Tensor, Tensor]]
Step = Callable[[Pairs, Draws], None]

STREAMS = 32  # after which torch hands out the first ones again: two networks on one would share a workspace of cuBLAS
WARM_UP = 3  # steps that are taken one kernel at a time before a step is recorded: libraries set themselves up in them


def side_by_side(trainings: list[Training[T]], device: torch.device, at_once: int) -> list[T]:
    """Run every training to its end, `at_once` of them at a time; returns what they return, in order.

    The first exception of one of them stops all, at their next step, and is raised.
    """
    if device.type == "cuda":
        return _in_turn(trainings, device, at_once)
    if min(at_once, len(trainings)) == 1:
        return [_drain(training, threading.Event()) for training in trainings]
    stop = threading.Event()
    with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        ends = [pool.submit(_drain, training, stop) for training in trainings]
        try:
            wait(ends, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
    return [end.result() for end in ends]


def _drain(training: Training[T], stop: threading.Event) -> T | None:
    """Take all steps of a training; None if it was stopped."""
    steps = training()
    while not stop.is_set():
        try:
            next(steps)
        except StopIteration as end:
            return end.value
    return None


def _in_turn(trainings: list[Training[T]], device: torch.device, at_once: int) -> list[T]:
    """One step of each after the other, all launched by this thread."""
    results: list[T | None] = [None] * len(trainings)
    waiting, running = iter(enumerate(trainings)), deque()

    def begin(stream: torch.cuda.Stream) -> None:
        for index, training in islice(waiting, 1):
            stream.wait_stream(torch.cuda.default_stream(device))  # which put the images there
            running.append((index, training(), stream))

    for number in range(at_once):
        begin(_stream(device, number))
    try:
        while running:
            index, steps, stream = running.popleft()
            try:
                with torch.cuda.stream(stream):
                    next(steps)
            except StopIteration as end:
                results[index] = end.value
                begin(stream)
            else:
                running.append((index, steps, stream))
    finally:
        torch.cuda.synchronize(device)  # nobody may free the images, after a failure, while a step still reads them
    return results


@cache
def _stream(device: torch.device, _number: int) -> torch.cuda.Stream:
    """The same few streams for all trainings and predictions of a process: torch keeps memory, and cuBLAS a workspace,
    for every stream that was ever used."""
    return torch.cuda.Stream(device)


class Eager:
    """Takes each step as it comes."""

    def __init__(self, step: Step, seed: int, device: torch.device):
        self.step, self.draws = step, Draws(seed, 0, torch.Generator(device))

    def __call__(self, pairs: Pairs, number: int) -> None:
        """Take step `number` of the training with these images and labels, one pair per sampler."""
        self.draws.turn_to(number)
        self.step(pairs, self.draws)


class _Tape(Draws):
    """Draws whose host numbers lie in fixed tensors; which numbers a step draws is noted when it is first taken."""

    def __init__(self, seed: int, generator: torch.Generator):
        self.slots: list[tuple[HostDraw, Tensor]] = []
        self.complete = False
        super().__init__(seed, 0, generator)

    def turn_to(self, step: int) -> None:
        """The generators, and once the tape is complete its numbers, become those of the step."""
        super().turn_to(step)
        self._next = iter(self.slots)
        if self.complete:
            for draw, slot in self.slots:
                slot.copy_(super().host(draw), non_blocking=True)

    def host(self, draw: HostDraw) -> Tensor:
        if self.complete:
            return next(self._next)[1]
        values = super().host(draw)
        self.slots.append((draw, values))
        return values


def record_cuda_graph(step: Callable[[], None], generator: torch.Generator) -> Callable[[], None]:
    """Record what `step` launches on the present stream, without running it; returns what replays it there."""
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    # Another thread may be pinning memory for its images meanwhile, which is no concern of this recording.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        step()
    return graph.replay


class Graphed:
    """Takes the first steps as they come, records one, and replays it for all that follow.

    On a GPU it must be called on the same stream each time, which may not be the default stream.
    """

    def __init__(
        self,
        step: Step,
        seed: int,
        device: torch.device,
        record: Callable[[Callable[[], None], torch.Generator], Callable[[], None]] = record_cuda_graph,
    ):
        self.step, self.device, self.record = step, device, record
        self.tape = _Tape(seed, torch.Generator(device))
        self.inputs: Pairs = []
        self.taken, self.replay = 0, None

    def __call__(self, pairs: Pairs, number: int) -> None:
        """Take step `number` of the training with these images and labels, one pair per sampler."""
        if self.taken < WARM_UP:
            self.tape.slots.clear()
            self.tape.turn_to(number)
            self.step(pairs, self.tape)
            self.taken += 1
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # what a first step sets up, other streams may use from now on
            return
        if self.replay is None:
            self.inputs = [(images.clone(), labels.clone()) for images, labels in pairs]
            self.tape.complete = True
            self.tape.turn_to(number)
            self.replay = self.record(partial(self.step, self.inputs, self.tape), self.tape.generator)
        for ours, given in zip(self.inputs, pairs, strict=True):
            for fixed, value in zip(ours, given, strict=True):
                fixed.copy_(value, non_blocking=True)
        self.tape.turn_to(number)
        self.replay()


def executor(step: Step, seed: int, device: torch.device, cuda_graphs: bool) -> Callable[[Pairs, int], None]:
    """What takes the steps of one training; called with the images of a step and the step's number."""
    return (Graphed if cuda_graphs and device.type == "cuda" else Eager)(step, seed, device)
