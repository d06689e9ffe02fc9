"""Network weights as safetensors: nothing in such a file can be executed."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from tailcal.errors import UserError
from tailcal.files import verify, write_bytes


def save_weights(network: nn.Module, path: Path) -> None:
    """Write all weights and buffers atomically."""
    write_bytes(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}))


def load_weights(network: nn.Module, path: Path, expected: str) -> None:
    """Load weights in place, from a file whose SHA-256 must be `expected`.

    Raises UserError naming the file when it is missing, damaged or of another network.
    """
    verify(path, expected)
    try:
        state: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run `dvc repro`") from None
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{path} holds the weights of another network ({reason}): delete it and run `dvc repro`"
        ) from None
