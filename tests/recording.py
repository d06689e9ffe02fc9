"""A CUDA graph on a CPU: the operations of a step are recorded once and repeated on the same tensors.

What a CUDA graph would get wrong goes wrong here too: a number that the host has put into an operation stays what it
was while recording, and an input that was not copied to its fixed place is not seen. Reading a number back to the host,
which a graph forbids, fails.
"""

from collections.abc import Callable, Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS_BACK = (aten._local_scalar_dense.default, aten.nonzero.default)


def changed(function, args: tuple) -> Iterator[torch.Tensor]:
    """The tensors that an operation writes to."""
    if function is aten.native_batch_norm.default:  # its schema does not say so
        yield from (statistic for statistic in args[3:5] if statistic is not None and args[5])
    for argument, value in zip(function._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tree_leaves(value)


class Recorder(TorchDispatchMode):
    """Runs every operation, and notes it with the very tensors that went in and came out."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in READS_BACK, f"{function} waits for the device"
        for tensor in changed(function, args):
            self.before.setdefault(id(tensor), (tensor, tensor.clone()))
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def undo(self) -> None:
        """A recording of a CUDA graph does not run anything: set back what has been changed."""
        for tensor, value in self.before.values():
            tensor.copy_(value)

    @torch.no_grad()
    def replay(self) -> None:
        """Take the step again."""
        for function, args, kwargs, out in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def record(step: Callable[[], None], _generator: torch.Generator) -> Callable[[], None]:
    """In the place of `engine.record_cuda_graph`."""
    recorder = Recorder()
    with recorder:
        step()
    recorder.undo()
    return recorder.replay
