"""The one training loop, and prediction. It knows the contract of `tailcal.method`, and no method by name."""

import contextlib
import copy
import math
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tailcal import checkpoint, distributed, portable
from tailcal.budget import Budget
from tailcal.costs import Cost
from tailcal.draws import Draws, derive
from tailcal.engine import STREAMS, executor, side_by_side
from tailcal.errors import UserError
from tailcal.method import Method
from tailcal.models import BFloat16Backbone, Network
from tailcal.optim import SGD, optimiser
from tailcal.params import PARAMS, Precision, Recipe, Runtime
from tailcal.progress import Progress
from tailcal.store import Images
from tailcal.weights import save_weights

EVALUATION_PIXELS = 1024 * 32 * 32  # of a batch that is predicted: 1024 images of CIFAR's size
_INITIALISING = threading.Lock()  # first weights come from torch's one global generator


def choose_device(name: str, key: str) -> torch.device:
    """The device of that name; `auto` is a GPU where there is one. Raises UserError naming the `key` it comes from when
    there is no such device."""
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UserError(f"{key} is cuda, but torch sees no CUDA device here; use auto or cpu")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def make_deterministic(precision: Precision) -> None:
    """Have torch compute the same bits each time, and round no more than the precision asks for."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
    torch.set_num_threads(1)  # sums are split by thread, so that their last bits would depend on the number of cores
    # What torch.use_deterministic_algorithms(True) does, but for importing the compiler, which takes it two seconds.
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing is read before it is written
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = False


def prepare(
    runtime: Runtime, precision: Precision = "float32", precision_key: str = f"{PARAMS}: precision"
) -> torch.device:
    """Choose the device, make torch deterministic there, and join the processes that train together.

    Raises UserError when there is no such device, when it has no such precision, naming the key or option that this
    comes from, and as `distributed.join` does.
    """
    device = choose_device(runtime.device, f"{PARAMS}: runtime.device")
    if precision == "tf32" and device.type == "cpu":
        raise UserError(f"{precision_key}: is tf32, which exists only on a GPU; use float32 or bf16")
    make_deterministic(precision)
    return distributed.join(device)


def described(device: torch.device) -> str:
    """What kind of device it is, as far as a training's bits depend on it: `cuda`, or a CPU's instructions."""
    if device.type != "cpu":
        return device.type
    return ", ".join(["cpu", torch.backends.cpu.get_cpu_capability(), *portable.deviations()])


def machine(device: torch.device) -> dict[str, Any]:
    """What a training ran on, and the most memory that the last `train` took there (None on a CPU), in bytes.

    That is what torch has reserved: what recorded steps work in counts as free between their replays.
    """
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0))
        return {"name": f"CPU, {cores} core{'s' if cores > 1 else ''}", "gpu_memory": None}
    return {"name": torch.cuda.get_device_name(device), "gpu_memory": torch.cuda.max_memory_reserved(device)}


def place(network: Network, device: torch.device) -> Network:
    """Bring a network to a device, in place, and its weights into the order in memory that computes fastest there.

    On a CPU that is channels last, where convolutions take their input's layout from their weights; of a GPU nothing
    has been measured yet.
    """
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
    return network.to(device, memory_format=layout)


@dataclass(frozen=True)
class Replica:
    """One network in training: what makes it, where its unfinished state is kept, which key its recipe has.

    `seed` is that of all its random numbers."""

    title: str
    seed: int
    make: Callable[[], tuple[Network, Method]]  # from torch's global generator, which `train` seeds
    scratch: Path
    recipe_key: str | None  # None for a method that takes no step
    late: "Late | None" = None
    begins: str | None = None  # SHA-256 of the weights that it is made with; None where they are of the seed alone

    def require_finite(self, finite: bool, wrong: str, epoch: int) -> None:
        """Raise UserError unless `finite`; it says what is wrong, in which epoch (counted from 0), and which checkpoint
        is the last good one."""
        if not finite:
            kept = next(filter(Path.exists, (self.scratch, checkpoint.previous(self.scratch))), None)
            last = f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet"
            raise UserError(
                f"{self.title}: {wrong} in epoch {epoch + 1}; {last}. A lower lr, or milder settings of the method, "
                "usually help"
            )

    def require_finite_weights(self, network: Network, epoch: int) -> None:
        """The same of the weights: a step's loss was measured before its update, and tells nothing of what came out."""
        finite = torch.stack([value.isfinite().all() for value in network.state_dict().values()]).all()
        self.require_finite(bool(finite), "a weight became no finite number", epoch)


@dataclass(frozen=True)
class Late:
    """A diagnostic: the network as it stands after each of the last `epochs` epochs is written to `folder`, a file
    epoch<e>.safetensors each. Training takes no notice of them."""

    folder: Path
    epochs: int

    def keep(self, network: Network, method: Method, epoch: int, epochs: int) -> None:
        """Write the network as it would be used if training ended with `epoch` (counted from 1) of `epochs`."""
        if epoch > epochs - self.epochs:
            ended = copy.deepcopy(network)
            method.finish(ended)
            save_weights(ended, self.folder / f"epoch{epoch}.safetensors")


class TrainedNetwork(NamedTuple):
    """A network after its last epoch; its history, one dict(epoch, lr, loss, train_accuracy) per epoch; its cost."""

    network: Network
    history: list[dict[str, Any]]
    cost: Cost


def training_accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Training accuracy of a batch: the mean share of the target that the predicted class has.

    logits [B, K]; targets int64 [B], or soft [B, K], where a prediction that hits one of two mixed labels counts with
    that label's lambda (as in the released mixup code).
    """
    predicted = logits.argmax(1)
    if targets.ndim == 1:
        return (predicted == targets).float().mean()
    return targets.gather(1, predicted[:, None]).mean()


def at_once(runtime: Runtime, networks: int, device: torch.device) -> int:
    """How many of so many networks train side by side.

    Processes that share a network meet at each step, so they must take the steps of all networks in the same order. On
    a GPU each network has a stream of its own, of which torch has STREAMS.
    """
    if distributed.size() > 1:
        return 1
    most = STREAMS if device.type == "cuda" else networks
    return max(1, min(runtime.replicas, networks, most))


@contextlib.contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Raise UserError, with advice that names the keys, when there is too little memory for the block."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # On a CPU torch raises a bare RuntimeError.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        said = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"there is not enough memory: {advice} ({said})") from None


def train(
    replicas: list[Replica], data: Images, recipe: Recipe, runtime: Runtime, precision: Precision = "float32"
) -> list[TrainedNetwork]:
    """Train networks side by side, each going on from its checkpoint if there is one.

    A network is a function of (code, recipe, precision, data, its seed): interruptions and neighbours leave no trace in
    it. Where several processes train together (`tailcal.distributed`), each calls this and each gets the same networks.
    precision: of the backbone, forwards and backwards; weights, updates, heads and losses are float32 always.
    Raises UserError when there is too little memory, naming runtime.replicas and the batch size; when a loss or a
    weight is not finite; as `Budget.require_possible` does; when a checkpoint is of another training, and when the
    processes would go on from different ones.
    """
    together = at_once(runtime, len(replicas), data.device)
    trainings = [partial(_training, replica, data, recipe, runtime, precision, together) for replica in replicas]
    if data.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(data.device)
    batch_size = f", or {replicas[0].recipe_key}.batch_size" if replicas[0].recipe_key else ""
    with enough_memory(f"use a smaller runtime.replicas{batch_size}"):
        return side_by_side(trainings, data.device, together)


@dataclass
class _State:
    """A training between two epochs: all that its checkpoint holds."""

    network: Network
    method: Method
    optimise: SGD
    begins: str | None  # as in Replica
    epoch: int = 0  # how many are over
    history: list[dict[str, Any]] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)

    def save(self, path: Path) -> None:
        """Write it as a checkpoint."""
        checkpoint.save(
            path,
            {
                "begins": self.begins,
                "network": self.network.state_dict(),
                "method": self.method.state_dict(),
                "optimiser": self.optimise.state(),
                "epoch": self.epoch,
                "history": self.history,
                "cost": asdict(self.cost),
            },
        )

    def resume(self, path: Path, device: torch.device) -> None:
        """Go on from the checkpoint at `path`, if there is one, and it began with the same weights. Raises UserError
        when it is of another training."""
        if not (saved := checkpoint.load(path, device)):
            return
        try:
            if saved["begins"] != self.begins:
                return
            self.network.load_state_dict(saved["network"])
            self.method.load_state_dict(saved["method"])
            self.optimise.load_state(saved["optimiser"])
            self.epoch, self.history, self.cost = saved["epoch"], saved["history"], Cost(**saved["cost"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            folder = path.parent
            raise UserError(
                f"{folder} holds a checkpoint of another training ({type(error).__name__}): delete it and run again"
            ) from None


def _training(
    replica: Replica, data: Images, recipe: Recipe, runtime: Runtime, precision: Precision, together: int
) -> Generator[None, None, TrainedNetwork]:
    """The one training loop; pauses after every step. `together`: how many networks train side by side."""
    with _INITIALISING:
        torch.manual_seed(derive(replica.seed, "initialisation"))
        network, method = replica.make()
        groups = method.setup(network)  # before the device, so that every first weight comes from the one generator
    device = data.device
    network, method = place(network, device), method.to(device)
    if not method.trained:
        method.fit(network, partial(over_batches, network.backbone, data), data.labels)
        return TrainedNetwork(network, [], Cost())

    labels = data.labels.cpu().numpy()
    budget = Budget(recipe, len(labels))
    budget.require_possible(replica.recipe_key, replica.title)
    optimise = optimiser(groups, recipe, partial(distributed.sum_gradients, network.backbone))
    state = _State(network, method, optimise, replica.begins)
    state.resume(replica.scratch, device)
    distributed.require_same(state.epoch, replica.scratch, device)

    computing = Network(BFloat16Backbone(network.backbone), network.head) if precision == "bf16" else network
    learning = distributed.share(computing)
    # What changes from epoch to epoch, and the sums over one: tensors, so that a step never waits for the device.
    lr, progress = torch.zeros((), device=device), torch.zeros((), device=device, dtype=torch.float64)
    sums = torch.zeros(2, device=device)  # of losses, of training accuracies

    def step(pairs: list[tuple[Tensor, Tensor]], draws: Draws) -> None:
        views = [data.prepare(*pair, method.config.augmentation, draws) for pair in pairs for _ in range(method.views)]
        batch = method.mix(views, draws)
        of_batch = (learning, batch, progress)
        loss, logits = optimise.step(lr, partial(method.loss, *of_batch), partial(method.ascent_loss, *of_batch))
        method.observe(logits, batch)
        sums.add_(torch.stack([loss, training_accuracy(logits, batch.targets)]))

    def drawn(epoch: int) -> list[np.ndarray]:
        """The images of an epoch's steps, from each sampler: int64 [steps, batch size]."""
        return [
            sampler(labels, derive(replica.seed, "sampler", i), *budget.stretch(epoch)).reshape(-1, recipe.batch_size)
            for i, sampler in enumerate(method.samplers())
        ]

    execute = executor(step, replica.seed, device, runtime.cuda_graphs and distributed.size() == 1)
    images, first = budget.steps * recipe.batch_size, distributed.is_first()
    bar = Progress(replica.title, "epoch", budget.epochs, state.epoch, images, silent=not first)
    last_saved = began = time.monotonic()
    indices = drawn(state.epoch) if state.epoch < budget.epochs else []
    for epoch in range(state.epoch, budget.epochs):
        method.set_mode(network)
        rate = budget.learning_rate(epoch)
        lr.fill_(rate)
        progress.fill_(epoch / budget.epochs)
        sums.zero_()
        taken = len(indices[0])
        for number, pairs in enumerate(state.cost.waiting(data.steps(indices)), start=epoch * budget.steps):
            execute(pairs, number)
            yield

        if epoch + 1 < budget.epochs:
            indices = drawn(epoch + 1)  # while the device is at work on the steps that are launched
        loss, accuracy = (sums / taken).tolist()
        replica.require_finite(math.isfinite(loss), f"the loss became {loss}", epoch)
        state.epoch = epoch + 1
        state.history.append({"epoch": state.epoch, "lr": rate, "loss": loss, "train_accuracy": accuracy})
        if replica.late and first:
            replica.late.keep(network, method, state.epoch, budget.epochs)
        now = time.monotonic()
        state.cost.add(taken * recipe.batch_size, now - began, machine(device), data.placement, together)
        began = now
        bar.add(1, f"loss {loss:.4f}")
        if first and (state.epoch == budget.epochs or now - last_saved >= runtime.checkpoint_seconds):
            replica.require_finite_weights(network, epoch)  # nothing that has diverged replaces a good checkpoint
            state.save(replica.scratch)
            last_saved = time.monotonic()
    network.zero_grad(set_to_none=True)  # of the size of the network, and of no more use
    method.finish(network)
    replica.require_finite_weights(network, budget.epochs - 1)
    return TrainedNetwork(network, state.history, state.cost)


@torch.no_grad()
def over_batches(module: nn.Module, data: Images) -> Tensor:
    """What a module makes of all images of a split, unaugmented and in evaluation mode: [N, ...]."""
    module.eval()
    return torch.cat([module(images) for images in data.whole(EVALUATION_PIXELS)])


def predict(networks: list[Network], data: Images, runtime: Runtime) -> list[np.ndarray]:
    """Each network's logits of a whole split, unaugmented: float32 [N, K].

    The networks are moved to the data's device, and put into evaluation mode. Raises UserError when there is too little
    memory.
    """

    def predicting(network: Network) -> Generator[None, None, np.ndarray]:
        logits = over_batches(place(network, data.device), data).cpu().numpy()
        yield
        return logits

    with enough_memory("use a smaller runtime.replicas"):
        together = at_once(runtime, len(networks), data.device)
        return side_by_side([partial(predicting, network) for network in networks], data.device, together)
