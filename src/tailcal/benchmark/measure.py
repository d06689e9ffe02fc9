"""Times the real training loop (`tailcal.train.train`), and in turn with it what a case is held against.

A round trains from scratch: an epoch that does not count (libraries set themselves up in it, steps are recorded), the
epochs that are measured, and one step more, in which the training saves its state and ends. The loop reads its mean
loss at the end of each epoch, so the clock, read right after, has waited for the device.
"""

import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from tailcal import method, models, train
from tailcal.benchmark.cases import FILE, Benchmark, Case, Workload
from tailcal.engine import WARM_UP
from tailcal.models import Network
from tailcal.params import Runtime
from tailcal.store import Images

PROFILED = 20  # steps, about: some thousand kernels each

AtEpoch = Callable[[int], None]  # called with the number of an epoch as a network begins it


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def machine(device: torch.device) -> dict[str, Any]:
    """The machine and the libraries, without which a time says nothing; no date."""
    on_gpu = device.type == "cuda"
    return {
        "cpu": _cpu(),
        "cores": cores(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu() -> str:
    """The processor's name as the kernel tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and largest, to four digits: times are not better than that."""
    numbers = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {key: float(f"{value:.4g}") for key, value in numbers.items()}


def watched(cls: type[method.Method], at_epoch: AtEpoch) -> type[method.Method]:
    """The same method, which tells `at_epoch` each time that the training loop begins an epoch with it."""

    class Watched(cls):
        begun = 0

        def set_mode(self, network: Network) -> None:
            at_epoch(self.begun)
            self.begun += 1
            super().set_mode(network)

    return Watched


def run(name: str, case: Case, workload: Workload, iterations: int, at_epoch: AtEpoch) -> None:
    """Train the case's networks for so many steps, with tailcal."""
    runtime = Runtime(
        device="auto",
        replicas=case.replicas,
        processes=1,
        placement="auto",
        cuda_graphs=case.cuda_graphs,
        checkpoint_seconds=float(10**9),
    )
    device = train.prepare(runtime, case.precision)
    data = Images(*workload.images.draw(), workload.images.augmentation, device)
    Method = watched(method.load(workload.method), at_epoch)
    counts = torch.from_numpy(workload.images.counts)

    def make() -> tuple[Network, method.Method]:
        network = models.build(workload.backbone, "linear", workload.images.channels, workload.images.classes)
        return network, Method(Method.Config.model_validate(workload.settings), counts)

    with tempfile.TemporaryDirectory(prefix="tailcal-benchmark-") as scratch:
        replicas = [
            train.Replica(
                f"benchmark {name} network {seed}",
                seed,
                make,
                Path(scratch) / f"seed{seed}.pt",
                f"{FILE}: workloads.{case.workload}",
            )
            for seed in range(case.replicas)
        ]
        train.train(replicas, data, workload.recipe(iterations), runtime, case.precision)


def images_per_second(name: str, case: Case, workload: Workload) -> float:
    """One round of tailcal's loop, all networks of the case together: from the first that begins its measured epochs
    to the last that ends them."""
    began, ended = [], []

    def at_epoch(epoch: int) -> None:
        if epoch == 1:
            began.append(time.perf_counter())
        if epoch == 1 + case.epochs:
            ended.append(time.perf_counter())

    run(name, case, workload, (1 + case.epochs) * workload.steps + 1, at_epoch)
    images = case.replicas * case.epochs * workload.steps * workload.batch_size
    return images / (max(ended) - min(began))


def reference_images_per_second(loop: str, case: Case, workload: Workload, device: torch.device, workers: int) -> float:
    """One round of a loop written by hand, which trains one network.

    On a CPU it has as many threads as the case has networks side by side, so that both have the same cores.
    """
    from tailcal.benchmark import references  # not at the top: what it imports is no part of tailcal's start-up

    references.prepare(case.precision, cores() if device.type == "cuda" else min(case.replicas, cores()))
    job = references.Job(workload, *workload.images.draw(), device, case.precision, min(workers, cores()))
    epoch = references.LOOPS[loop](job)
    epoch()
    began = time.perf_counter()
    for _ in range(case.epochs):
        epoch()  # it ends by reading a loss, so the device is done
    return case.epochs * workload.steps * workload.batch_size / (time.perf_counter() - began)


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of what intervals (begin, end) cover together."""
    covered, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered


def shortened(workload: Workload, steps: int) -> Workload:
    """The same with about so many steps an epoch, or as many as it has if those are fewer."""
    largest = math.ceil(workload.images.largest * min(1, steps / workload.steps))
    images = workload.images.model_copy(update={"largest": max(largest, math.ceil(workload.images.factor))})
    return workload.model_copy(update={"images": images})


def gpu(name: str, case: Case, workload: Workload) -> dict[str, float | int | None]:
    """What the case asks of the GPU. The profiler slows it down, so nothing is timed here.

    memory: the most that torch reserved, in bytes (what recorded steps work in counts as free between replays);
    busy: share of an epoch, from the start of its first kernel to the end of its last, in which at least one kernel
    or copy ran; kernel_ms: milliseconds of them a step of one network. The last two are None where the profiler sees no
    kernel, as on a GPU that not all users may profile.
    """
    from torch.profiler import ProfilerActivity, profile, schedule  # not at the top: it is no part of the start-up

    run(name, case, workload, WARM_UP + 2, lambda _: None)
    memory = torch.cuda.max_memory_reserved()

    # It listens from the first epoch on, since it must know a recorded step to see its kernels; it keeps the second.
    profiler = profile(activities=[ProfilerActivity.CUDA], schedule=schedule(wait=0, warmup=1, active=1, repeat=1))
    turn = {0: profiler.start, 1: profiler.step, 2: profiler.step}

    def at_epoch(epoch: int) -> None:
        if epoch in turn:
            turn.pop(epoch)()  # the first network that comes here does it for all

    short = shortened(workload, PROFILED)
    run(name, case, short, 2 * short.steps + 1, at_epoch)
    kernels = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    if not kernels:
        print(f"{name}: the profiler saw no kernel: let all users profile this GPU (CUPTI)", file=sys.stderr)
        return {"busy": None, "kernel_ms": None, "memory": memory}
    window = max(end for _, end in kernels) - min(begin for begin, _ in kernels)
    spent = sum(end - begin for begin, end in kernels)  # microseconds
    return {
        "busy": round(union(kernels) / window, 4),
        "kernel_ms": round(spent / 1000 / short.steps / case.replicas, 4),
        "memory": memory,
    }


def first_step(name: str, case: Case, workload: Workload) -> dict[str, float | int]:
    """Train until a step has been taken the way all others will be.

    Returns clock, in seconds, which all processes share, and host_memory, the most this process took, in bytes.
    """
    run(name, case, workload, WARM_UP + 1 if case.cuda_graphs else 1, lambda _: None)
    return {"clock": time.monotonic(), "host_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


ALONE = {"gpu": gpu, "first_step": first_step}  # what is measured in a process of its own


def in_a_process(part: str, name: str) -> dict[str, Any]:
    """One of ALONE, of the case of this name: nothing that ran before has warmed it up, or left memory behind."""
    command = [sys.executable, "-m", "stages.benchmark", "--alone", part, name]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(said.splitlines()[-1])


def start_up(name: str, repeats: int) -> dict[str, Any]:
    """From the start of a process to its first step: imports, data, network, and on a GPU the recording of a step."""
    seconds, memory = [], []
    for _ in range(repeats):
        began = time.monotonic()
        told = in_a_process("first_step", name)
        seconds.append(told["clock"] - began)
        memory.append(told["host_memory"])
    return {"case": name, "seconds": spread(seconds), "host_memory": max(memory)}


def describe(case: Case, workload: Workload) -> dict[str, Any]:
    """What a case is, as it stands beside its numbers."""
    return {**case.model_dump(exclude={"against"}), "workload": {"name": case.workload} | workload.model_dump()}


def measure(name: str, cases: dict[str, Case], benchmark: Benchmark, device: torch.device) -> dict[str, Any]:
    """All rounds of one case, in each of which it and its rivals take their turn."""
    case = cases[name]
    workload = benchmark.workload(case)
    rates = {rival: [] for rival in [name, *case.against]}
    for _ in range(benchmark.repeats):
        for rival, rated in rates.items():
            if rival in cases:
                rate = images_per_second(rival, cases[rival], benchmark.workload(cases[rival]))
            else:
                rate = reference_images_per_second(rival, case, workload, device, benchmark.workers)
            rated.append(rate)
    own = rates.pop(name)
    batches = case.replicas * workload.batch_size  # of the steps that the networks take side by side
    return {
        **describe(case, workload),
        "steps": case.epochs * workload.steps,
        "images_per_second": spread(own),
        "step_ms": spread([1000 * batches / rate for rate in own]),
        "training_seconds": spread([workload.epochs * workload.steps * batches / rate for rate in own]),
        "gpu": in_a_process("gpu", name) if device.type == "cuda" else None,
        "against": {
            rival: {
                "images_per_second": spread(rated),
                "ratio": spread([mine / theirs for mine, theirs in zip(own, rated, strict=True)]),
            }
            for rival, rated in rates.items()
        },
    }
