"""How often each class occurs where a model is used, and what that makes of its probabilities."""

import csv
import math
from pathlib import Path

from torch import Tensor

from tailcal.errors import UserError

HEADER = ["class", "frequency"]


def adjust_to_prior(probabilities_NK: Tensor, frequencies_K: Tensor) -> Tensor:
    """p'_k = p_k f_k / sum_j p_j f_j (Saerens et al. 2002, eq. 2.4, from equally frequent classes), float64 [N, K].

    probabilities_NK: [N, K], of a model that takes all classes for equally frequent; frequencies_K: float64
    [K], above 0, on any scale.
    """
    weighted_NK = probabilities_NK.double() * (frequencies_K / frequencies_K.max())
    return weighted_NK / weighted_NK.sum(dim=1, keepdim=True)


def read_frequencies(path: Path, names: list[str]) -> list[float]:
    """The frequency of each of the classes `names`, in their order, from a CSV with the columns of HEADER.

    Raises UserError naming file and line for whatever is wrong in it.
    """
    if len(set(names)) < len(names):
        raise UserError(f"--frequencies {path}: two classes of the model have one name: only `train` can be given")
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            lines = list(csv.reader(stream, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--frequencies {path}: must be CSV in UTF-8 ({error})") from None
    except OSError as error:
        raise UserError(f"--frequencies {path}: cannot be read ({error.strerror}); or say train") from None
    if not lines or lines[0] != HEADER:
        raise UserError(f"--frequencies {path} line 1: must be {','.join(HEADER)}")
    found: dict[str, float] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line:  # such as spreadsheets leave at the end
            continue
        where = f"--frequencies {path} line {number}"
        if len(line) != len(HEADER):
            raise UserError(f"{where}: must have a class and its frequency")
        name, text = line
        if name not in names:
            raise UserError(f"{where}: the model has no class {name!r}")
        if name in found:
            raise UserError(f"{where}: {name!r} is there twice")
        try:
            found[name] = float(text)
        except ValueError:
            found[name] = math.nan
        if not 0 < found[name] < math.inf:
            raise UserError(f"{where}: must be a number above 0, a count or a share, got {text!r}")
    if lacking := [name for name in names if name not in found]:
        raise UserError(f"--frequencies {path}: lacks {lacking[0]!r}: every class of the model must have a line")
    return [found[name] for name in names]
