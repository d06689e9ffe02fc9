"""Trains methods on a few images, as one of several processes or alone: `python -m tests.distributed_worker OUT ...`.

Arguments: the folder to write to, the epochs, then names of methods. Writes <name>.json (the losses) and <name>.pt (the
weights) there; checkpoints lie in its subfolder `scratch`. Two processes first hold their batch norm, of shares that
are unlike each other, against that of the whole batch.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tailcal import distributed, train
from tailcal.models import build, resnet
from tests.test_contract import COUNTS, RECIPE, RUNTIME, config_of, images, load


def compare_batch_norm() -> None:
    """Fail unless results, gradients and statistics of the shares are those of one batch norm over all of them."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(8, 3, 4, 4, generator=generator) + torch.linspace(-3, 3, 8)[:, None, None, None]
    factors = torch.randn(8, 3, 4, 4, generator=generator)
    mine = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    one, shared = resnet.BatchNorm2d(3), distributed.SyncBatchNorm2d(3)
    x_one, x_shared = whole.clone().requires_grad_(), whole[mine].clone().requires_grad_()
    y_one, y_shared = one(x_one), shared(x_shared)
    (y_one.sigmoid() * factors).sum().backward()
    (y_shared.sigmoid() * factors[mine]).sum().backward()
    distributed.sum_gradients(shared)
    pairs = [(y_shared, y_one[mine]), (x_shared.grad, x_one.grad[mine])]
    pairs += [(ours.grad, its.grad) for ours, its in zip(shared.parameters(), one.parameters(), strict=True)]
    pairs += [(shared.running_mean, one.running_mean), (shared.running_var, one.running_var)]
    for ours, its in pairs:
        torch.testing.assert_close(ours, its, rtol=1e-4, atol=1e-5)


def main() -> None:
    out, epochs, *names = sys.argv[1:]
    train.prepare(RUNTIME)
    if distributed.size() == 2:
        compare_batch_norm()
    for name in names:

        def make(name=name):
            return build("resnet8", "linear", 1, 3), load(name)(config_of(name), torch.tensor(COUNTS))

        recipe = RECIPE.model_copy(update={"epochs": int(epochs), "sam_rho": 0.05 if name == "fsgl" else 0.0})
        replica = train.Replica(name, 0, make, Path(out) / "scratch" / f"{name}.pt", "recipe")
        ((network, history, _),) = train.train([replica], images(), recipe, RUNTIME)
        if distributed.is_first():
            Path(out, f"{name}.json").write_text(json.dumps([row["loss"] for row in history]))
            torch.save(network.state_dict(), Path(out, f"{name}.pt"))


if __name__ == "__main__":
    main()
