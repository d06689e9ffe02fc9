"""A GPU that is not there: tensors say that they are on it, are computed on the CPU, and complain as a GPU's would.

What fails on a GPU and not on a CPU fails here too: tensors of two devices in one operation, and within a step a number
read back, a copy from memory that is not pinned, and an operation that has no deterministic kernel there. So the
branches for GPUs run wherever the tests do. Which streams are told to wait for each other is noted. What a kernel
computes and how fast, what a capture refuses, and whether streams wait for all they have to, only a GPU can tell.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tailcal import engine, store, train
from tests.recording import record

GPU = torch.device("cuda", 0)
aten = torch.ops.aten

READS_BACK = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.allclose,
    aten.masked_select,
    aten.bincount,
    aten.equal,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.repeat_interleave,
}
# Of the operations that torch.use_deterministic_algorithms refuses on a GPU, those that a classifier might use.
NOT_DETERMINISTIC = {
    aten._adaptive_avg_pool2d_backward,
    aten.adaptive_max_pool2d_backward,
    aten.avg_pool3d_backward,
    aten.fractional_max_pool2d_backward,
    aten.grid_sampler_2d_backward,
    aten.histc,
    aten.kthvalue,
    aten.max_pool3d_with_indices_backward,
    aten.median,
    aten.nll_loss2d_forward,
    aten.nll_loss2d_backward,
    aten.put,
    aten.reflection_pad1d_backward,
    aten.reflection_pad2d_backward,
    aten.replication_pad2d_backward,
    aten.scatter_reduce,
    aten.upsample_bicubic2d_backward,
    aten.upsample_bilinear2d_backward,
    aten.upsample_linear1d_backward,
}
MADE_ON_THE_HOST = ("tensor", "as_tensor", "asarray", "new_tensor")
MAY_MIX = ("__get__", "_has_compatible_shallow_copy_type")  # functions that compute nothing


class Watch(TorchDispatchMode):
    """Looks at every operation of a step."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet = function.overloadpacket
        if packet.__name__.endswith("_"):  # in place it is the same operation
            packet = getattr(aten, packet.__name__.rstrip("_"), packet)
        assert packet not in READS_BACK, f"{function} waits for the device"
        assert packet not in NOT_DETERMINISTIC, f"{function} is not deterministic on a GPU"
        # Without atomic additions it is a sort, for which some versions of torch send strides from pageable memory:
        # slow, and refused in a capture. It is the backward pass of `gather`.
        assert packet not in (aten.scatter_add, aten.scatter_reduce), f"{function} sorts on a GPU"
        assert packet is not aten.cumsum or not args[0].is_floating_point(), "no deterministic sum of floats on a GPU"
        if packet in (aten.index, aten.index_put):
            masked = any(index is not None and index.dtype == torch.bool for index in args[1])
            # Only with a number of the host is such a place filled without asking where it is.
            filled = packet is not aten.index and args[2].dim() == 0 and not on_gpu(args[2])
            assert filled or not masked, "a mask as index waits for the device"
        return function(*args, **(kwargs or {}))


class Generator(torch.Generator):
    """A generator of the CPU that may say it is one of the GPU."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.place = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return GPU if self.place.type == "cuda" else self.place


class Event:
    """Counts how often one was waited for."""

    waited = 0

    def __init__(self, stream):
        self.stream = stream

    def synchronize(self):
        Event.waited += 1


class Stream:
    """Kernels of a CPU are over when they return, so nothing waits here; it is noted what would have."""

    present = threading.local()

    def __init__(self, *_, **__):
        self.waited_for, self.holds = [], []  # streams, or those of events; the tensors that it is known to use

    def wait_stream(self, other):
        self.waited_for.append(other)

    def wait_event(self, event):
        self.waited_for.append(event.stream)

    def record_event(self):
        return Event(self)

    @staticmethod
    @contextlib.contextmanager
    def use(stream):
        """What torch.cuda.stream does: it is the current one of this thread."""
        before, Stream.present.stream = Stream.current(), stream
        try:
            yield
        finally:
            Stream.present.stream = before

    @staticmethod
    def current(*_):
        return getattr(Stream.present, "stream", DEFAULT)


DEFAULT = Stream()


def on_gpu(tensor: Tensor) -> bool:
    return getattr(tensor, "pretended", False)


class PretendedGPU(TorchFunctionMode):
    """While it is entered, `cuda` is a device. `in_step` is true during a step of a training."""

    def __init__(self):
        super().__init__()
        self.in_step = False
        self.operations = 0

    def require_between_steps(self, what: str) -> None:
        """Fail within a step."""
        assert not self.in_step, f"{what} waits for the device"

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Nothing in the block may wait for the device."""
        self.in_step = True
        try:
            with Watch():
                yield
        finally:
            self.in_step = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if isinstance(function, torch._ops.OpOverload):  # a recorded step, replayed
            return function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        owner = getattr(function, "__self__", None)
        if name == "__get__" and owner is torch.Tensor.device and on_gpu(args[0]):
            return GPU
        if name == "__get__" and owner is torch.Tensor.is_cuda:
            return on_gpu(args[0])
        if name == "__deepcopy__":
            return _tag(function(*args, **kwargs), on_gpu(args[0]))
        if name == "pin_memory":
            pinned = args[0].clone()
            pinned.pinned = True
            return pinned
        if name in ("to", "cpu", "cuda"):
            return self._move(name, *args, **kwargs)
        if name in ("copy_", "_foreach_copy_"):
            self._copy(*args[:2])
            return _tag(function(*args, **kwargs), any(map(on_gpu, _tensors(args[0]))))
        if name == "__set__" and owner is torch.Tensor.data:
            function(*args, **kwargs)
            args[0].pretended = on_gpu(args[1])
            return None
        if name in ("numpy", "tolist", "item", "__array__") and on_gpu(args[0]):
            assert not self.in_step, f"{name} waits for the device"
            assert name in ("tolist", "item"), "a GPU's tensor is no array of NumPy's"

        device = kwargs.get("device")
        asked = device is not None and torch.device(device).type == "cuda"
        if device is not None:
            kwargs["device"] = "cpu"
        if self.in_step and (asked or any(map(on_gpu, _tensors(args[:1])))):
            assert name not in MADE_ON_THE_HOST, f"{name} copies from memory that is not pinned"
        if self.in_step and name in ("__getitem__", "__setitem__") and on_gpu(args[0]):
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            listed = any(isinstance(index, (list, np.ndarray)) for index in indices)
            assert not listed, "an index on the host is copied from memory that is not pinned"
        tensors = _tensors((args, kwargs))
        # Only a number on the host may go with tensors on a GPU, and within a step not even that.
        places = {on_gpu(tensor) for tensor in tensors if self.in_step or tensor.dim() or on_gpu(tensor)}
        if len(places) > 1 and name not in MAY_MIX:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cpu and cuda:0")
        generator = kwargs.get("generator")
        made_there = asked or True in places or any(map(on_gpu, tensors))
        if isinstance(generator, Generator) and (generator.device == GPU) != made_there:
            raise RuntimeError(f"{name}: a generator of {generator.device} for a tensor elsewhere")
        self.operations += made_there
        return _tag(function(*args, **kwargs), made_there)

    def _move(self, name: str, source: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`Tensor.to` in all its forms, `Tensor.cpu` and `Tensor.cuda`."""
        target, dtype = kwargs.get("device"), kwargs.get("dtype")
        if name != "to":
            target = name
        elif isinstance(args[0] if args else None, Tensor):
            target, dtype = args[0].device, args[0].dtype
        for value in args:
            if isinstance(value, (str, torch.device)):
                target = value
            elif isinstance(value, torch.dtype):
                dtype = value
        flags = [value for value in args if isinstance(value, bool)]
        waits = not (kwargs.get("non_blocking") or (flags and flags[0]))
        there = on_gpu(source) if target is None else torch.device(target).type == "cuda"
        if there and not on_gpu(source):
            self._check_copy(source, waits)
        assert there or not on_gpu(source) or not self.in_step, "a copy to the host waits for the device"
        layout = kwargs.get("memory_format") or torch.preserve_format
        moved = source.to(dtype or source.dtype, copy=there != on_gpu(source), memory_format=layout)
        return _tag(moved, there)

    def _copy(self, into: Any, values: Any) -> None:
        for tensor, value in zip(_tensors(into), _tensors(values), strict=False):
            if on_gpu(tensor) and not on_gpu(value):
                self._check_copy(value, True)
            assert not self.in_step or on_gpu(tensor) or not on_gpu(value), "a copy to the host waits for the device"

    def _check_copy(self, source: Tensor, blocking: bool) -> None:
        if self.in_step:
            assert getattr(source, "pinned", False), "a copy from memory that is not pinned waits for the device"
            assert not blocking, "a copy that blocks waits for the device"


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _tag(out: Any, there: bool) -> Any:
    for tensor in _tensors(out):
        tensor.pretended = there
    return out


@contextlib.contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGPU]:
    """Within the block there is one GPU, and every step of a training is looked at."""
    gpu = PretendedGPU()
    with monkeypatch.context() as patch:
        _install(gpu, patch)
        with gpu:
            yield gpu


def _install(gpu: PretendedGPU, patch: pytest.MonkeyPatch) -> None:
    memory = 1 << 36
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda *_: "pretended",
        "mem_get_info": lambda *_: (memory, memory),
        "max_memory_reserved": lambda *_: memory,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda *_: None,
        "synchronize": lambda *_: gpu.require_between_steps("torch.cuda.synchronize"),
        "Stream": Stream,
        "stream": Stream.use,
        "current_stream": Stream.current,
        "default_stream": lambda *_: DEFAULT,
    }.items():
        patch.setattr(torch.cuda, name, value)
    patch.setattr(torch, "Generator", Generator)
    patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: stream.holds.append(tensor))
    load, execute, read = torch.load, train.executor, store.Images._read

    def loaded(*args, map_location, **kwargs):
        found = load(*args, map_location="cpu", **kwargs)
        return _tag(found, torch.device(map_location).type == "cuda")

    def executor(step, seed, device, cuda_graphs):
        taken = []

        def watched(pairs, draws):
            if not taken:  # a first step may still bring tables to the device
                step(pairs, draws)
            else:
                with gpu.watching():
                    step(pairs, draws)
            taken.append(draws)

        if cuda_graphs:
            return engine.Graphed(watched, seed, device, record)
        return execute(watched, seed, device, cuda_graphs)

    def reading(images, rows):
        with PretendedGPU():  # a mode is a thread's own, and this is the reading thread, which may wait
            return read(images, rows)

    patch.setattr(torch, "load", loaded)
    patch.setattr(train, "executor", executor)
    patch.setattr(store.Images, "_read", reading)
    # On a CPU one_hot looks at its labels first; on a GPU it does not.
    patch.setattr(
        F,
        "one_hot",
        lambda labels, k: torch.zeros(len(labels), k, device=labels.device).long().scatter(1, labels[:, None], 1),
    )
