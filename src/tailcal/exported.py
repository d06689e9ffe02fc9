"""The folder of an exported model: its card, its weights, and the function from pixels to calibrated confidences.

`tailcal.export` writes such folders, and `tailcal.predict` uses them. Nothing in one is executed: it holds numbers and
names.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tailcal import method, models
from tailcal.augment import normalise, plain
from tailcal.cell import CellName
from tailcal.errors import UserError
from tailcal.models import Network
from tailcal.params import Augmentation, Positive, Strict, validate
from tailcal.weights import load_weights

WEIGHTS, CARD, ONNX = "model.safetensors", "model.json", "model.onnx"
AGAIN = "export the model again"  # how these are made


class CellSeed(Strict):
    """The cell of the grid that a model comes from, and which of its seeds."""

    dataset: str
    representation: str
    classifier: str
    seed: int

    @property
    def cell(self) -> CellName:
        """Without the seed."""
        return CellName(self.dataset, self.representation, self.classifier)


class MeasuredModel(Strict):
    """What an exported model does on the test split, by which nothing was chosen: fractions in [0, 1].

    The ECE has 15 bins; `ece_as_trained` is that of the network's own probabilities, `ece` that of the exported ones,
    and `ece_floor` what chance alone would give the latter on so few images. `nll_as_trained` and `nll` are negative
    log-likelihoods in nats, and `nll_error` is the standard error, over the images, of their difference.
    `holdout_images` is how many images there were to fit a rule on, and `trained_on` how many of the test images are
    training images too, pixel for pixel.
    """

    holdout_images: int
    test_images: int
    trained_on: int
    top1: float
    ece_as_trained: float
    ece: float
    ece_floor: float
    nll_as_trained: float
    nll: float
    nll_error: float


class Card(Strict):
    """model.json: what an exported model is, and all that is needed, beside its weights, to build it again.

    `tailcal.images.read_image` makes squares of `image_size` pixels' side; `augmentation` says how the network takes
    them: cropped or not, and normalised. `train_counts` are training images per class. `weights` and `onnx` are SHA-256
    of the files beside it.
    """

    format: Literal[1]
    class_names: Annotated[list[str], Field(min_length=2)]
    train_counts: list[Annotated[int, Field(ge=1, lt=2**31)]]
    image_size: Annotated[int, Field(ge=1, le=1024)]
    channels: Literal[1, 3]
    augmentation: Augmentation
    network: dict[str, Any]
    classifier: str
    settings: dict[str, Any]
    rule: Literal["temperature", "none"]
    fitted: dict[str, Positive]
    measured: MeasuredModel
    cell: CellSeed
    weights: str
    onnx: str | None
    versions: dict[str, str]
    provenance: dict[str, Any]

    @model_validator(mode="after")
    def _consistent(self) -> "Card":
        if len(self.train_counts) != len(self.class_names):
            raise ValueError(f"{len(self.class_names)} class_names, but {len(self.train_counts)} train_counts")
        for k, name in enumerate(self.class_names):
            if re.search("[\ud800-\udfff]", name):  # what JSON can say and no file can hold
                raise ValueError(f"class_names.{k} is {name!a}: must be text that UTF-8 has")
        if list(self.fitted) != (["temperature"] if self.rule == "temperature" else []):
            raise ValueError(f"rule {self.rule} does not go with the fitted numbers {list(self.fitted)}")
        for key, right in (("channels", self.channels), ("num_classes", len(self.class_names))):
            if self.network.get(key, right) != right:  # a key that is missing, `models.build` tells
                raise ValueError(f"network.{key} must be {right}, got {self.network[key]!r}")
        if len(self.augmentation.mean) != self.channels:
            raise ValueError(f"augmentation.mean has {len(self.augmentation.mean)} values: must be {self.channels}")
        if getattr(self.augmentation, "size", 1) > self.image_size:
            raise ValueError(f"augmentation.size must be at most image_size, {self.image_size}")
        return self

    @property
    def temperature(self) -> float:
        """What logits are divided by: 1 without a rule."""
        return self.fitted.get("temperature", 1.0)


class Predictor(nn.Module):
    """uint8 images [N, H, W, C] to calibrated probabilities float32 [N, K]: all from the pixels to the softmax.

    It acts on one image at a time, so the other images of a batch change nothing.
    """

    def __init__(self, network: Network, augmentation: Augmentation, temperature: float):
        super().__init__()
        self.network, self.augmentation, self.temperature = network, augmentation, temperature
        self.register_buffer("mean", torch.tensor(augmentation.mean))
        self.register_buffer("std", torch.tensor(augmentation.std))
        self.eval()

    def logits(self, images: Tensor) -> Tensor:
        """What the network itself says of uint8 images [N, H, W, C]: float32 [N, K]."""
        return self.network(normalise(plain(images.permute(0, 3, 1, 2), self.augmentation), self.mean, self.std))

    def forward(self, images: Tensor) -> Tensor:
        return (self.logits(images) / self.temperature).softmax(dim=1)


def load(folder: Path | str) -> tuple[Card, Predictor]:
    """The model in a folder, on the CPU.

    Raises UserError naming the file that is missing, damaged, or does not go with the others.
    """
    folder = Path(folder)
    path = folder / CARD
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file: {AGAIN}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing: --model must be a folder made by `python -m tailcal.export`") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): {AGAIN}") from None
    card = validate(Card, content, "", path)
    network = method.set_up(models.rebuild(card.network, path), card.classifier, card.settings, card.train_counts, path)
    load_weights(network, folder / WEIGHTS, card.weights, again=AGAIN)
    return card, Predictor(network, card.augmentation, card.temperature)
