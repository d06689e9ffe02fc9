"""Network weights as safetensors: nothing in such a file can be executed."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from tailcal.errors import UserError
from tailcal.files import REPRO, sha256, verify, write_bytes
from tailcal.params import Dataset


def save_weights(network: nn.Module, path: Path) -> str:
    """Write all weights and buffers atomically; returns the file's SHA-256."""
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()})
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def load_weights(network: nn.Module, path: Path, expected: str | None, again: str = REPRO) -> None:
    """Load weights in place, from a file whose SHA-256 must be `expected`; `again` is how such a file is made.

    Raises UserError naming the file when it is missing, damaged or of another network.
    """
    verify(path, expected, again=again)
    read_weights(network, path, f"delete it and {again}")


def read_weights(network: nn.Module, path: Path, advice: str) -> None:
    """Load weights in place, from a file without a recorded SHA-256.

    Raises UserError naming the file, with `advice`, when it is missing, damaged or of another network.
    """
    try:
        state: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): {advice}") from None
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path} holds the weights of another network ({reason}): {advice}") from None


def pretrained_digest(dataset: Dataset) -> str:
    """SHA-256 of the data set's file of pretrained weights. Raises UserError naming the key when there is none."""
    path = Path(dataset.pretrained.file)
    if not path.is_file():
        raise UserError(f"{dataset.key('pretrained.file')}: there is no file {path}: put one of weights there")
    return sha256(path)
