"""One training on several processes: the same batches, the same losses, the same weights, a share of the work each.

Every process draws and augments the whole batch, so that mixing and every random draw are those of one process. The
backbone then runs on each process's share of it, and the features of all shares are gathered: from there on every
process has the whole batch again, and a method's loss need not know (a weighted mean, an accumulated gradient, a
consistency term are those of the whole batch). Going back, a process's backbone receives the gradient of its own
share, and the sum over processes is the gradient of one; the head's is whole on every process already.

Batch norm sees the whole batch too, so that the loss curve is that of one process but for rounding.
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tailcal.errors import UserError
from tailcal.models import Network
from tailcal.models.resnet import BatchNorm2d
from tailcal.params import PARAMS

MEETING = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells a process beside RANK


def join(device: torch.device) -> torch.device:
    """Join the other processes, if torchrun has started some; returns this process's device.

    Raises UserError when only a part of what torchrun tells is there, and when there is no GPU for each process.
    """
    if "RANK" not in os.environ:
        return device
    if lacking := [name for name in MEETING if name not in os.environ]:
        raise UserError(f"the environment has RANK, and lacks {', '.join(lacking)}: start with torchrun, or unset RANK")
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(
                f"{PARAMS}: runtime.processes: one process per GPU, and there are {torch.cuda.device_count()} here"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes files and speaks."""
    return not dist.is_initialized() or dist.get_rank() == 0


def record() -> dict[str, int]:
    """What the provenance of a result says of this: nothing for one process."""
    return {"processes": size()} if size() > 1 else {}


def require_same(epoch: int, checkpoint: Path, device: torch.device) -> None:
    """Raise UserError unless all processes go on from the same epoch: one may not see, or not read, the checkpoint."""
    if size() == 1:
        return
    epochs = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(size())]
    dist.all_gather(epochs, torch.tensor(epoch, device=device))
    if len(found := {int(one) for one in epochs}) > 1:
        raise UserError(
            f"{checkpoint}: the processes would go on from different epochs ({', '.join(map(str, sorted(found)))}): "
            f"all must see the same {checkpoint.parent}; mend that, or delete it and run again"
        )


class _Gather(torch.autograd.Function):
    """Features of every process's share, in order. Backward: the own share's rows, since every process has the whole
    gradient of the whole batch."""

    @staticmethod
    def forward(ctx, share: Tensor) -> Tensor:
        shares = [torch.empty_like(share) for _ in range(size())]
        dist.all_gather(shares, share.contiguous())
        ctx.rows = len(share)
        return torch.cat(shares)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient[dist.get_rank() * ctx.rows :][: ctx.rows]


class _SharedNorm(torch.autograd.Function):
    """Batch norm of a share [B, C, H, W] by the mean and variance [C] of all equal shares.

    Returns the normalised share, that mean, and the variance as running statistics take it, over N - 1.

    Each process runs torch's own kernels on its share, with one message of 2C numbers in each direction. Backward
    (Ioffe & Szegedy 2015): with x^ the normalised share, g the gradient of its result and N the values of a channel in
    all shares, the share's gradient is weight / std * (g - (sum g + x^ * sum(g x^)) / N), the sums over all shares.
    Those of weight and bias are of this share alone, as every gradient of the backbone is until `sum_gradients`.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        own = torch.stack(torch.batch_norm_update_stats(x.float(), None, None, 0.0))  # no running ones, no momentum
        shares = [torch.empty_like(own) for _ in range(size())]
        dist.all_gather(shares, own)
        means, variances = torch.stack(shares).unbind(dim=1)
        variance, mean = variances.mean(dim=0) + means.var(dim=0, correction=0), means.mean(dim=0)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.count = eps, size() * x.numel() // x.shape[1]
        unbiased = variance * (ctx.count / (ctx.count - 1))
        ctx.mark_non_differentiable(mean, unbiased)
        ctx.set_materialize_grads(False)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, unbiased

    @staticmethod
    def backward(ctx, gradient: Tensor, *_statistics: None) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        constants = None, None, False, ctx.eps, [True, True, True]
        # The first term: the gradient where mean and variance are given.
        given, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, variance, *constants
        )
        sums = torch.stack((of_weight, of_bias))
        dist.all_reduce(sums)
        scale = (variance + ctx.eps).rsqrt()
        slope, level = sums * (weight * scale / ctx.count)
        slope = slope * scale
        through = torch.addcmul((level - slope * mean)[:, None, None], x, slope[:, None, None])  # mean and variance
        return given.sub_(through), of_weight, of_bias, None


class SyncBatchNorm2d(BatchNorm2d):
    """Batch norm over the shares of all processes; torch's own does not run on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        normalised, mean, variance = _SharedNorm.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)
        return normalised


class Shared(nn.Module):
    """A backbone that computes this process's share of the batch in training, and returns the features of all."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.inner = backbone

    def forward(self, images: Tensor) -> Tensor:
        return _Gather.apply(self.inner(images.chunk(size())[dist.get_rank()]))


def share(network: Network) -> Network:
    """A view of the network for training with the other processes: same parameters, the backbone's work divided."""
    if size() == 1:
        return network
    for module in network.backbone.modules():
        if isinstance(module, BatchNorm2d):
            module.__class__ = SyncBatchNorm2d  # the same parameters and statistics, another forward
    return Network(Shared(network.backbone), network.head)


@torch.no_grad()
def sum_gradients(backbone: nn.Module) -> None:
    """Give every process the backbone's gradient of the whole batch, in one message."""
    if size() == 1:
        return
    gradients = [p.grad for p in backbone.parameters() if p.grad is not None]
    if gradients:
        message = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(message)
        parts = message.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
