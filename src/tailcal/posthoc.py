"""Rules that change predictions after training, from saved logits alone.

A rule is a Config and a function `fit(config, counts_K, holdout_logits_NK, holdout_labels_N) -> Fitted`; what it
returns maps test logits to calibrated logits. No rule is ever handed test labels, and it sees test logits only after it
is fitted, so by its signature it cannot be tuned on the test split. A new rule is a Config, a function and a line
of RULES.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from scipy.optimize import minimize_scalar

from tailcal.errors import UserError
from tailcal.metrics.calibration import nll
from tailcal.params import PARAMS, Strict, validate


@dataclass(frozen=True)
class Fitted:
    """A rule ready for test logits [N, K]; `numbers` are the scalars it fitted, reported beside the metrics."""

    apply: Callable[[np.ndarray], np.ndarray]
    numbers: dict[str, float] = field(default_factory=dict)

    def __call__(self, logits_NK: np.ndarray) -> np.ndarray:
        return self.apply(logits_NK)


class Temperature(Strict):
    """Temperature scaling has no settings."""


def fit_temperature(
    _config: Temperature, _counts_K: np.ndarray, holdout_logits_NK: np.ndarray, holdout_labels_N: np.ndarray
) -> Fitted:
    """z / T, with the one T > 0 that minimises the NLL of the hold-out (Guo et al., ICML 2017, section 4.2).

    The NLL is convex in 1/T, hence has one valley in log T. T is kept in 0.01..100, because a hold-out need not
    determine it: without a single mistake, every T small enough to bring the NLL to 0 in float64 is as good; where the
    predictions are no better than chance, larger is always better. Raises ValueError when the hold-out is empty.
    """
    holdout_logits_NK = np.asarray(holdout_logits_NK, dtype=np.float64)
    best = minimize_scalar(
        lambda log_T: nll(holdout_logits_NK / np.exp(log_T), holdout_labels_N),
        bounds=(np.log(0.01), np.log(100)),
        method="bounded",
        options={"xatol": 1e-8},
    )
    T = float(np.exp(best.x))
    return Fitted(lambda logits_NK: np.asarray(logits_NK, dtype=np.float64) / T, {"temperature": T})


class LogitAdjustment(Strict):
    """Strength of the adjustment: 0 changes nothing, 1 takes the whole training prior away."""

    tau: Annotated[float, Field(ge=0)]


def fit_logit_adjustment(
    config: LogitAdjustment, counts_K: np.ndarray, _holdout_logits_NK: np.ndarray, _holdout_labels_N: np.ndarray
) -> Fitted:
    """z_k - tau log pi_k, pi_k = n_k / N (Menon et al., ICLR 2021, eq. 9). Nothing is fitted.

    Raises ValueError when a class has no training image: its prior has no logarithm.
    """
    counts_K = np.asarray(counts_K, dtype=np.float64)
    if counts_K.min() <= 0:
        raise ValueError(f"logit adjustment needs a training image of every class, class {counts_K.argmin()} has none")
    shift_K = config.tau * np.log(counts_K / counts_K.sum())
    return Fitted(lambda logits_NK: np.asarray(logits_NK, dtype=np.float64) - shift_K)


@dataclass(frozen=True)
class Rule:
    """One entry of RULES; a rule that needs a hold-out is left out of cells that have none."""

    Config: type[Strict]
    fit: Callable[[Any, np.ndarray, np.ndarray, np.ndarray], Fitted]
    needs_holdout: bool


RULES = {
    "temperature": Rule(Temperature, fit_temperature, needs_holdout=True),
    "logit_adjustment": Rule(LogitAdjustment, fit_logit_adjustment, needs_holdout=False),
}


def configure(blocks: dict[str, dict[str, Any]], where: str = "evaluate.posthoc") -> dict[str, Strict]:
    """The checked Config of each rule named in `blocks`. Raises UserError (one line) for an unknown rule or setting."""
    if unknown := sorted(set(blocks) - set(RULES)):
        raise UserError(f"{PARAMS}: {where}.{unknown[0]}: unknown rule: there are {', '.join(sorted(RULES))}")
    return {name: validate(RULES[name].Config, block, f"{where}.{name}") for name, block in blocks.items()}
