"""Trains methods on a few images, as one of several processes or alone: `python -m tests.distributed_worker OUT ...`.

Arguments: the folder to write to, the epochs, then names of methods. Writes <name>.json (the losses) and <name>.pt (the
weights) there; checkpoints lie in its subfolder `scratch`.
"""

import json
import sys
from pathlib import Path

import torch

from tailcal import distributed, train
from tailcal.models import build
from tests.test_contract import COUNTS, RECIPE, RUNTIME, config_of, images, load


def main() -> None:
    out, epochs, *names = sys.argv[1:]
    train.prepare(RUNTIME)
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
