"""The contract of a method, and how methods are found. Read this first.

A method is one file of `tailcal.methods`. A block of params.yaml names it with the key `method`, or by having its name.
The file holds a class `Method` derived from one of the two bases below. To follow a training through the hooks:

    method = Method(config, class_counts)          typed settings, training images per class
    groups = method.setup(network)                 replace the head, freeze, name the parameters that learn
    each epoch: method.set_mode(network)           which layers are in training mode
    each step:  batch = method.mix(batches, draws) `views` batches per sampler -> images and targets of the loss
                loss, logits = method.loss(network, batch, progress), by default method.criterion of the logits
                method.observe(logits, batch)      what the method accumulates from the steps it has taken
    method.finish(network)                         leave the network as it is used from here on

Whatever a method accumulates is a buffer of it, so it is saved in every checkpoint. A method that takes no step
(`trained = False`) computes its head in `setup`, or in `fit` from the features of the training images.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailcal import methods
from tailcal.draws import Draws
from tailcal.errors import UserError
from tailcal.models import Network
from tailcal.params import PARAMS, Strict, validate
from tailcal.samplers import Sampler, class_balanced, instance

Stage = Literal["representations", "classifiers"]


@dataclass(frozen=True)
class Batch:
    """Augmented, normalised images float [B, C, H, W], their labels int64 [B], and the targets of the loss:
    the labels again, or soft targets float [B, K]. `mix` may make images of V views, [V, B, C, H, W]."""

    images: Tensor
    labels: Tensor
    targets: Tensor


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that learn, and their learning rate as a multiple of the recipe's."""

    parameters: list[nn.Parameter]
    lr_factor: float = 1.0


class TrainedConfig(Strict):
    """Settings of every method that takes training steps. What the two augmentations are, the data set says."""

    augmentation: Literal["standard", "strong"]


class Method(nn.Module):
    """What both kinds of method share: by default, plain cross-entropy on one stream of images."""

    class Config(TrainedConfig):
        """Settings of the method: the keys of its block in params.yaml."""

    stage: ClassVar[Stage]
    views: ClassVar[int] = 1  # augmentations of each drawn image
    trained: ClassVar[bool] = True  # False: no step is taken

    def __init__(self, config: Strict, counts: Tensor):
        """counts: training images per class, int64 [K], each 1 or more."""
        super().__init__()
        self.config = config
        self.register_buffer("counts", counts, persistent=False)

    def samplers(self) -> tuple[Sampler, ...]:
        """Where the images of a step come from: a batch from each."""
        return (instance,)

    def setup(self, network: Network) -> list[ParameterGroup]:
        """Prepare the network in place; return what learns."""
        raise NotImplementedError(f"{type(self).__module__} must say what learns")

    def fit(self, network: Network, features: Callable[[], Tensor], labels: Tensor) -> None:
        """In the place of training, where no step is taken: compute the head, if `setup` has not, from all training
        images. `features` computes theirs, unaugmented, float [N, D]; labels int64 [N]."""
        del network, features, labels

    def set_mode(self, network: Network) -> None:
        """Put the layers into training or evaluation mode."""
        network.train()

    def mix(self, batches: list[Batch], draws: Draws) -> Batch:
        """Make the batch of the loss from `views` batches of each sampler: sampler 0 view 0, sampler 0 view 1, ..."""
        del draws
        return batches[0]

    def criterion(self, logits: Tensor, batch: Batch) -> Tensor:
        """The paper's equation, where it takes logits [B, K]: the batch-mean loss."""
        return F.cross_entropy(logits, batch.targets)

    def loss(self, network: Network, batch: Batch, progress: Tensor) -> tuple[Tensor, Tensor]:
        """The batch-mean loss and the logits [B, K], of a method whose equation takes more than these. `progress` is
        the share of the epochs that is over, a float64 scalar in [0, 1)."""
        del progress
        logits = network(batch.images)
        return self.criterion(logits, batch), logits

    def ascent_loss(self, network: Network, batch: Batch, progress: Tensor) -> Tensor:
        """The loss that SAM climbs before it descends `loss`; only used where a recipe asks for SAM."""
        return self.loss(network, batch, progress)[0]

    def observe(self, logits: Tensor, batch: Batch) -> None:
        """Take note of a step that has been taken, from the logits that `loss` returned. No gradient is recorded."""
        del logits, batch

    def finish(self, network: Network) -> None:
        """Leave the network, in place, as it is used after training."""
        del network


class Representation(Method):
    """Stage 1: the whole network learns. It must `finish` with the head it names, so that stage 2 can build it."""

    stage = "representations"
    head: ClassVar[str] = "linear"  # a name in models.heads.HEADS

    def setup(self, network: Network) -> list[ParameterGroup]:
        return [ParameterGroup([p for p in network.parameters() if p.requires_grad])]


class Classifier(Method):
    """Stage 2: the backbone takes no gradient and stays in evaluation mode; the head learns, or is computed.

    By default images are drawn class-balanced. With `shifted_bn` in a method's settings, the backbone's batch norms run
    in training mode: their running statistics follow this stage's images, and still no gradient is taken.
    """

    stage = "classifiers"

    def samplers(self) -> tuple[Sampler, ...]:
        return (class_balanced,)

    def setup(self, network: Network) -> list[ParameterGroup]:
        network.backbone.requires_grad_(False)
        groups = self.setup_head(network)
        learning = {id(p) for group in groups for p in group.parameters}
        for parameter in network.head.parameters():
            parameter.requires_grad_(id(parameter) in learning)
        return groups

    def setup_head(self, network: Network) -> list[ParameterGroup]:
        """Replace or change the head; return its parameters that learn."""
        raise NotImplementedError(f"{type(self).__module__} must say what learns")

    def set_mode(self, network: Network) -> None:
        network.train(getattr(self.config, "shifted_bn", False))
        network.head.train()


def names(stage: Stage | None = None) -> list[str]:
    """Names of the methods there are (of one stage)."""
    found = sorted(each.name for each in pkgutil.iter_modules(methods.__path__))
    return [name for name in found if stage is None or load(name).stage == stage]


def module(name: str) -> str:
    """The name of a method's module."""
    return f"{methods.__name__}.{name}"


def load(name: str) -> type[Method]:
    """The class `Method` of a method's module."""
    return importlib.import_module(module(name)).Method


def resolve(name: str, block: dict[str, Any], stage: Stage) -> tuple[str, dict[str, Any]]:
    """The method of a block of params.yaml, which is its key `method` or else its own name, and its other keys.

    Raises UserError when that stage has no such method, or when the block of one method has the name of another.
    """
    chosen, every = block.get("method", name), names()
    if chosen not in names(stage):
        key = f"{stage}.{name}.method" if "method" in block else f"{stage}.{name}"
        wrong = f"{chosen} belongs to {load(chosen).stage}" if chosen in every else "no such method"
        raise UserError(f"{PARAMS}: {key}: {wrong}: there are {', '.join(names(stage))}")
    if name != chosen and name in every:
        raise UserError(
            f"{PARAMS}: {stage}.{name}: is another method's name: give this block of {chosen} one of its own"
        )
    return chosen, {key: value for key, value in block.items() if key != "method"}


def configure(name: str, block: dict[str, Any], stage: Stage) -> Strict:
    """Check a block of params.yaml against the Config of its method. Raises UserError as `resolve`, or naming a key."""
    chosen, settings = resolve(name, block, stage)
    return validate(load(chosen).Config, settings, f"{stage}.{name}")


def set_up(network: Network, classifier: str, settings: dict[str, Any], counts: list[int], source: Path) -> Network:
    """Make of stage 1's network what stage 2 makes of it, but for the weights; returns it.

    classifier, settings: stage 2's method and its block; counts: training images per class. Raises UserError naming
    `source`, the file that these come from, when there is no such method.
    """
    if classifier not in names("classifiers"):
        raise UserError(f"{source}: this version of tailcal has no classifier {classifier!r}")
    chosen = load(classifier)
    config = validate(chosen.Config, settings, "settings", source)
    chosen(config, torch.tensor(counts)).setup(network)
    return network
