"""ResNets for photographs of some 224 pixels: torchvision's own, without their classifier.

resnet10 has one basic block in each stage, D = 512 (Gidaris and Komodakis 2018; the small one of ImageNet-LT);
resnet50, resnet101, resnet152 and resnext50_32x4d have bottlenecks, D = 2048. Parameters have torchvision's names, so
that a file of its weights fits; torchvision is imported when such a network is built, and not before.
"""

import pickle
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tailcal.errors import UserError
from tailcal.models.resnet import BatchNorm2d


def _resnet(channels: int, block: str, layers: tuple[int, ...], **options: Any) -> nn.Module:
    """torchvision's ResNet of a kind of block, so many in each stage: images float [B, channels, H, W] to features
    [B, D], D = `features`. Weights are drawn from torch's global generator."""
    from torchvision.models import resnet

    network = resnet.ResNet(getattr(resnet, block), list(layers), norm_layer=BatchNorm2d, **options)
    network.features, network.kaiming = network.fc.in_features, False  # a linear head begins as torchvision's does
    network.fc = nn.Identity()
    if channels != network.conv1.in_channels:
        network.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's own
    return network


BACKBONES = {
    "resnet10": partial(_resnet, block="BasicBlock", layers=(1, 1, 1, 1)),
    "resnet50": partial(_resnet, block="Bottleneck", layers=(3, 4, 6, 3)),
    "resnet101": partial(_resnet, block="Bottleneck", layers=(3, 4, 23, 3)),
    "resnet152": partial(_resnet, block="Bottleneck", layers=(3, 8, 36, 3)),
    "resnext50_32x4d": partial(_resnet, block="Bottleneck", layers=(3, 4, 6, 3), groups=32, width_per_group=4),
}


WRAPS = ("state_dict", "model")  # the keys under which training scripts save a network's weights among other things
SHOWN = 5  # keys of a file that is none of weights, in an error line
PARALLEL = "module."  # what torch's DataParallel puts before every name


def load_pretrained(backbone: nn.Module, path: Path) -> None:
    """Load a file of torchvision's weights in place: its own .pth, or the same as .safetensors. Executes nothing in it.

    The weights may lie under one of the keys WRAPS of a checkpoint, and their names may begin with PARALLEL.
    The classifier (`fc.*`) is left out, as the backbone has none; everything else must fit, or nothing is loaded.
    Raises UserError (one line) naming the file when it is missing, unreadable, or of another network.
    """
    found = {name: value for name, value in _read_state(path).items() if not name.startswith("fc.")}
    wanted = backbone.state_dict()
    # Files of before 2018 have no such counters, and torch fills them in.
    missing = [name for name in wanted if name not in found and not name.endswith("num_batches_tracked")]
    problems = [
        *(f"it lacks {name}" for name in missing),
        *(f"this backbone has no {name}" for name in found if name not in wanted),
        *(
            f"{name} is {list(value.shape)} there and {list(wanted[name].shape)} here"
            for name, value in found.items()
            if name in wanted and value.shape != wanted[name].shape
        ),
    ]
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        strange = found and not set(wanted) & set(found)
        first = f" (its first tensor is called {next(iter(found))})" if strange else ""
        raise UserError(f"{path} holds the weights of another network: {problems[0]}{more}{first}")
    for name, value in found.items():
        if value.layout != torch.strided or value.is_meta or not value.isfinite().all():
            raise UserError(f"{path}: {name} must be finite numbers, each of them in the file")
    backbone.load_state_dict(found)


def _read_state(path: Path) -> dict[str, Tensor]:
    """Names, without PARALLEL, and tensors of a .safetensors or a .pth file. Raises UserError naming the file."""
    if not path.is_file():
        raise UserError(f"{path} is missing: no such file of pretrained weights")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            _refuse_bomb(path)
            state = torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError:  # its text is several lines of advice to execute the file
        raise UserError(f"{path} is damaged, or holds more than tensors: save its state_dict alone") from None
    except Exception as error:  # torch raises a different type for each way in which a file can be damaged
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged ({reason})") from None
    state = _unwrapped(state)
    if not _is_state(state):
        raise UserError(
            f"{path} holds {_described(state)}: must hold a state_dict, names and tensors and nothing else, "
            f"by itself or as its {' or '.join(WRAPS)}"
        )
    parallel = all(name.startswith(PARALLEL) for name in state)
    return {name.removeprefix(PARALLEL): value for name, value in state.items()} if parallel else state


def _refuse_bomb(path: Path) -> None:
    """Raise ValueError for a .pth that would unpack to more than it is: torch writes none, and reads any."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
                raise ValueError("its parts are compressed, or lie on top of each other")


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def _unwrapped(loaded: Any) -> Any:
    """What lies under the first of WRAPS that holds a state_dict, or else `loaded` itself."""
    wraps = [loaded[key] for key in WRAPS if key in loaded] if isinstance(loaded, dict) else []
    return next((value for value in wraps if _is_state(value)), loaded)


def _described(loaded: Any) -> str:
    """What a file holds, on one line: the first few keys of a dict, each with its type."""
    if not isinstance(loaded, dict):
        return f"a {type(loaded).__name__}"
    keys = [f"{key!r} ({type(value).__name__})" for key, value in list(loaded.items())[:SHOWN]]
    return f"a dict of {', '.join(keys)}" + (f" and {len(loaded) - SHOWN} more" if len(loaded) > SHOWN else "")


def freeze_but_last_block(backbone: nn.Module) -> None:
    """Let only the last residual block learn, in place; all other layers are pinned to evaluation mode, so that their
    batch norms use and keep the statistics they have.

    How networks pretrained on ImageNet are trained on Places-LT (Zhong et al. 2021 and others).
    """
    backbone.requires_grad_(False)
    block = backbone.layer4[-1].requires_grad_(True)
    inside = set(block.modules())
    for layer in backbone.modules():
        if layer not in inside and not list(layer.children()):
            layer.pinned = True
