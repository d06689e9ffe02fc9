"""Rules that change predictions after training, from saved logits alone.

A rule is a Config and a function `fit(holdout, **settings) -> Fitted`; what it returns is then applied to the test
logits. A `Holdout` has no test labels, and a rule sees test logits only after it is fitted, so by its signature it
cannot be tuned on the test split. Most rules then treat a sample at a time; one that looks at all given predictions
together is `transductive`, and its numbers say so. A new rule is a Config, a function and a line of RULES.

What is fitted suits data with the hold-out's class frequencies: our hold-outs are balanced, and so are most test splits
(that of a folder or list of one's own need not be, and the report says so).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import PlainValidator
from scipy.optimize import minimize, minimize_scalar
from scipy.special import logsumexp

from tailcal.errors import UserError
from tailcal.metrics.calibration import nll
from tailcal.metrics.scores import check, log_softmax, softmax
from tailcal.params import PARAMS, Strict, validate

TUNED = "tuned"
MAX_TAU = 10.0  # of a tuned one; published values lie below 2
LARGEST_TAU = 100.0  # of a given one: far beyond any use, far from logits that overflow
TEMPERATURES = (0.01, 100.0)  # bounds of a fitted temperature
REACH = 10.0  # how far vector scaling may move a logit at its class's mean, and again at each deviation from it


class Holdout(NamedTuple):
    """All that a rule is fitted on: training images per class, int [K], and logits float [N, K] and labels int [N] of
    the held-out split; N is 0 where nothing is held out."""

    counts: np.ndarray
    logits: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Fitted:
    """A rule ready for logits float64 [N, K]; `numbers` are the scalars it fitted, reported beside the metrics."""

    apply: Callable[[np.ndarray], np.ndarray]
    numbers: dict[str, float] = field(default_factory=dict)

    def __call__(self, logits_NK: np.ndarray) -> np.ndarray:
        """Changed logits, float64 [N, K]."""
        return self.apply(logits_NK)


class NoSettings(Strict):
    """A rule without settings."""


def _tau(value: Any) -> float | str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value != TUNED and not (number and 0 <= value <= LARGEST_TAU):
        raise ValueError(f"must be a number from 0 to {LARGEST_TAU:g}, or the word {TUNED}")
    return float(value) if number else value


class Tau(Strict):
    """How strongly a rule acts: 0 changes nothing, 1 is the rule's own full step; `tuned`: fitted on the hold-out."""

    tau: Annotated[float | Literal["tuned"], PlainValidator(_tau)]


def fit_temperature(holdout: Holdout) -> Fitted:
    """z / T, with the one T > 0 that minimises the NLL of the hold-out (Guo et al., ICML 2017, section 4.2).

    The NLL is convex in 1/T, hence has one valley in log T, but for two cases. Where the predictions are no better than
    chance, larger is always better, and T ends at its bound, 100. Where every one of the N held-out labels is the
    predicted one, smaller is always better, down to confidences of 1 that so few images cannot vouch for; then T is the
    one that brings the mean confidence to (N + 1) / (N + 2), Laplace's rule of succession.
    """
    T = _best_temperature(holdout)
    return Fitted(lambda logits_NK: logits_NK / T, {"temperature": T})


def at_bound(temperature: float) -> bool:
    """Whether a fitted temperature, or the mean of several, is at its bound: no temperature helps such logits."""
    return any(math.isclose(temperature, bound, rel_tol=1e-3) for bound in TEMPERATURES)


def fit_vector_scaling(holdout: Holdout) -> Fitted:
    """w_k z_k + b_k, with the w, b that minimise the NLL of the hold-out (Guo et al., ICML 2017, section 4.2).

    The NLL is convex in (w, b); the search starts at temperature scaling, so on the hold-out it can only be better. It
    goes by the logits of each class brought to mean 0 and deviation 1 there, which takes a fraction of the steps, and
    in these units w_k and b_k stay within REACH of the start: where every label can be told by some scaling (with few
    images per class that is common) the NLL falls for ever as they grow. Then the bound decides: the hold-out is too
    small for 2K parameters. A hold-out without a mistake gets temperature scaling.
    """
    T = _best_temperature(holdout)
    if _without_mistake(holdout):
        return Fitted(lambda logits_NK: logits_NK / T)
    mean_K, std_K = holdout.logits.mean(axis=0), holdout.logits.std(axis=0)
    std_K[std_K == 0] = 1.0
    start_2K = np.concatenate([std_K / T, mean_K / T])
    best = minimize(
        vector_scaling_nll,
        start_2K,
        args=((holdout.logits - mean_K) / std_K, holdout.labels),
        jac=True,
        method="L-BFGS-B",
        bounds=np.column_stack([start_2K - REACH, start_2K + REACH]),
    )
    w_K, b_K = np.split(best.x, 2)
    return Fitted(lambda logits_NK: (logits_NK - mean_K) / std_K * w_K + b_K)


def vector_scaling_nll(
    parameters_2K: np.ndarray, logits_NK: np.ndarray, labels_N: np.ndarray
) -> tuple[float, np.ndarray]:
    """NLL of the logits w_k z_k + b_k, and its gradient [2K]; `parameters_2K` holds w, then b.

    With g_ik = (p_ik - 1[k = y_i]) / N: dNLL/dw_k = sum_i g_ik z_ik and dNLL/db_k = sum_i g_ik.
    """
    w_K, b_K = np.split(parameters_2K, 2)
    value, gradient_NK = _nll_gradient(logits_NK * w_K + b_K, labels_N)
    return value, np.concatenate([np.einsum("nk,nk->k", gradient_NK, logits_NK), gradient_NK.sum(axis=0)])


def fit_class_temperature(holdout: Holdout) -> Fitted:
    """z_k / T_k, with T_k = exp(a + b u_k), where u_k is log n_k brought to -1 (rarest class) .. 1 (most frequent).

    a and b minimise the NLL of the hold-out, searched from temperature scaling (b = 0), which is all there is when the
    counts are equal (u = 0) or the hold-out has no mistake. Reported are T_k of the most frequent and of the rarest
    class. exp(a) is kept in 0.01..100 and exp(b) in 0.1..10, for the reasons of `fit_temperature`; the NLL need not be
    convex in (a, b), so this is the valley next to temperature scaling.

    The idea is that of CDA-TS (Islam et al., "Class-distribution-aware calibration for long-tailed visual
    recognition", ICML 2021 workshop), the form is ours: their temperatures rise with the class frequency by a margin
    chosen by hand (in their released code, which uses them for self-distillation, T_k = T + 0.1 n_k / n_max); here the
    data decide how strongly and in which direction, and T_k stays positive.

    A T_k of its own makes the result depend on what softmax does not: a constant added to all of a sample's logits.
    Raises ValueError when a class has no training image.
    """
    log_counts_K = _log_counts(holdout.counts)
    centred_K = log_counts_K - (log_counts_K.max() + log_counts_K.min()) / 2
    u_K = centred_K / (centred_K.max() or 1.0)
    start_2 = np.array([np.log(_best_temperature(holdout)), 0.0])

    def objective(parameters_2: np.ndarray) -> tuple[float, np.ndarray]:
        scaled_NK = holdout.logits / np.exp(parameters_2[0] + parameters_2[1] * u_K)
        value, gradient_NK = _nll_gradient(scaled_NK, holdout.labels)
        # d(z_k / T_k)/da = -z_k / T_k, and u_k times that by b.
        by_class_K = -np.einsum("nk,nk->k", gradient_NK, scaled_NK)
        return value, np.array([by_class_K.sum(), by_class_K @ u_K])

    bounds = [np.log(TEMPERATURES), (np.log(0.1), np.log(10))]
    a, b = start_2
    if not _without_mistake(holdout):
        a, b = minimize(objective, start_2, jac=True, method="L-BFGS-B", bounds=bounds).x
    T_K = np.exp(a + b * u_K)
    numbers = {"temperature_head": float(T_K[u_K.argmax()]), "temperature_tail": float(T_K[u_K.argmin()])}
    return Fitted(lambda logits_NK: logits_NK / T_K, numbers)


def fit_logit_adjustment(holdout: Holdout, tau: float | str) -> Fitted:
    """z_k - tau log pi_k, pi_k = n_k / N (Menon et al., ICLR 2021, eq. 9).

    Raises ValueError when a class has no training image: its prior has no logarithm.
    """
    log_prior_K = _log_counts(holdout.counts) - np.log(np.sum(holdout.counts))

    def adjusted(logits_NK: np.ndarray, tau: float) -> np.ndarray:
        return logits_NK - tau * log_prior_K

    tau, numbers = _strength(tau, holdout, adjusted)
    return Fitted(lambda logits_NK: adjusted(logits_NK, tau), numbers)


def prediction_normalization(log_p_NK: np.ndarray, tau: float, log_sums_K: np.ndarray | None = None) -> np.ndarray:
    """Prediction normalisation (PN): p'_ik proportional to p_ik / s_k^tau, with s_k = sum_i p_ik, in logarithms.

    These hold where p or s is too small for a float. Takes log p, float64 [N, K], and returns the logits
    log p_ik - tau log s_k [N, K], whose softmax is p'. `log_sums_K` [K] gives other sums, up to a common factor, which
    cancels; with None they are those of the given p, so that each row depends on all the others.
    Source: BaGMar, where the sums run over the test set; it is the prediction re-balancing of GALA (Zhang et al., 2024,
    arXiv:2403.09036).

    Raises ValueError when there are no samples, a row is no distribution, tau is negative or not finite, `log_sums_K`
    has another shape than [K], or a sum is not a positive number: a class never predicted at all would be 0 / 0^tau.
    """
    if log_p_NK.ndim != 2 or log_p_NK.size == 0:
        raise ValueError(f"log-probabilities must have shape [samples, classes], got {list(log_p_NK.shape)}")
    if not np.allclose(logsumexp(log_p_NK, axis=1), 0, rtol=0, atol=1e-4):
        raise ValueError("the probabilities of each row must sum to 1")
    if not 0 <= tau < np.inf:
        raise ValueError(f"tau must be a number, 0 or more, got {tau}")
    if log_sums_K is None:
        log_sums_K = logsumexp(log_p_NK, axis=0)
    if log_sums_K.shape != log_p_NK.shape[1:]:
        raise ValueError(f"sums must have shape [{log_p_NK.shape[1]}] like the classes, got {list(log_sums_K.shape)}")
    if not np.isfinite(log_sums_K).all():
        k = int(np.argmin(np.isfinite(log_sums_K)))
        raise ValueError(
            f"the sum of every class must be a positive number, that of class {k} is {np.exp(log_sums_K[k]):g}"
        )
    return log_p_NK - tau * log_sums_K


def fit_pn_transductive(holdout: Holdout, tau: float | str) -> Fitted:
    """`prediction_normalization` by the sums of the very predictions it is applied to.

    No label is used, but each prediction depends on all the others of the split, and on its class frequencies: those
    are assumed to be balanced. A tuned tau is tuned on the hold-out with the hold-out's own sums, then used with the
    sums of the test split.
    """
    tau, numbers = _strength(tau, holdout, prediction_normalization)
    return Fitted(lambda logits_NK: prediction_normalization(log_softmax(logits_NK), tau), numbers)


def fit_pn_inductive(holdout: Holdout, tau: float | str) -> Fitted:
    """`prediction_normalization` by the sums of the hold-out's predictions, so that a test sample stands for itself.

    Ours, beside the published transductive form.
    """
    log_sums_K = logsumexp(log_softmax(holdout.logits), axis=0)
    tau, numbers = _strength(tau, holdout, prediction_normalization)
    return Fitted(lambda logits_NK: prediction_normalization(log_softmax(logits_NK), tau, log_sums_K), numbers)


def _log_counts(counts_K: np.ndarray) -> np.ndarray:
    counts_K = np.asarray(counts_K, dtype=np.float64)
    if counts_K.min() <= 0:
        raise ValueError(f"this rule needs a training image of every class, class {counts_K.argmin()} has none")
    return np.log(counts_K)


def _without_mistake(holdout: Holdout) -> bool:
    return bool((holdout.logits.argmax(axis=1) == holdout.labels).all())


def _best_temperature(holdout: Holdout) -> float:
    _, logits_NK, labels_N = holdout

    def nll_at(log_T: float) -> float:
        return nll(logits_NK / np.exp(log_T), labels_N)

    def distance_at(log_T: float) -> float:
        confidence_N = softmax(logits_NK / np.exp(log_T)).max(axis=1)
        return abs(confidence_N.mean() - (len(labels_N) + 1) / (len(labels_N) + 2))

    objective = distance_at if _without_mistake(holdout) else nll_at
    best = minimize_scalar(objective, bounds=np.log(TEMPERATURES), method="bounded", options={"xatol": 1e-8})
    return float(np.exp(best.x))


def _strength(
    tau: float | str, holdout: Holdout, change: Callable[[np.ndarray, float], np.ndarray]
) -> tuple[float, dict[str, float]]:
    """tau, and what to report of it: as it is, or, where it is `tuned`, fitted on the hold-out.

    That is the tau in 0..MAX_TAU that minimises the NLL of `change(log_p_NK, tau)`, log p being the hold-out's: convex
    where the change is linear in tau, hence one valley.
    """
    if tau != TUNED:
        return tau, {}
    log_p_NK = log_softmax(holdout.logits)
    best = minimize_scalar(
        lambda tau: nll(change(log_p_NK, tau), holdout.labels),
        bounds=(0, MAX_TAU),
        method="bounded",
        options={"xatol": 1e-8},
    )
    return float(best.x), {"tau": float(best.x)}


def _nll_gradient(logits_NK: np.ndarray, labels_N: np.ndarray) -> tuple[float, np.ndarray]:
    """NLL and its gradient by the logits [N, K], (softmax - one-hot) / N."""
    log_p_NK = log_softmax(logits_NK)
    rows_N = np.arange(len(labels_N))
    gradient_NK = np.exp(log_p_NK)
    gradient_NK[rows_N, labels_N] -= 1
    return float(-log_p_NK[rows_N, labels_N].mean()), gradient_NK / len(labels_N)


@dataclass(frozen=True)
class Rule:
    """One entry of RULES. `says`: what it does, half a sentence for a reader of the report.

    `fit` takes a Holdout and the Config's fields by name. A rule that is `fitted`, or has a tuned setting, needs a
    hold-out and is left out of cells that have none. A transductive rule makes each prediction depend on all the
    predictions that it is given with.
    """

    says: str
    Config: type[Strict]
    fit: Callable[..., Fitted]
    fitted: bool = True
    transductive: bool = False

    def needs_holdout(self, config: Strict) -> bool:
        """Whether the rule, set like this, cannot be fitted on counts alone."""
        return self.fitted or TUNED in config.model_dump().values()


RULES = {
    "temperature": Rule(
        "divides all logits by one temperature, fitted on the hold-out (Guo et al. 2017)",
        NoSettings,
        fit_temperature,
    ),
    "vector_scaling": Rule(
        "gives each class's logit a scale and a shift of its own, fitted on the hold-out (Guo et al. 2017)",
        NoSettings,
        fit_vector_scaling,
    ),
    "class_temperature": Rule(
        "divides by a temperature that follows the class's training count, fitted on the hold-out "
        "(after Islam et al. 2021)",
        NoSettings,
        fit_class_temperature,
    ),
    "logit_adjustment": Rule(
        "subtracts tau times the log class priors; meant for logits that no method has balanced (Menon et al. 2021)",
        Tau,
        fit_logit_adjustment,
        fitted=False,
    ),
    "pn_inductive": Rule(
        "divides each class's probabilities by a power tau of their sum over the hold-out's predictions",
        Tau,
        fit_pn_inductive,
    ),
    "pn_transductive": Rule(
        "divides each class's probabilities by a power tau of their sum over the test split's predictions "
        "(Zhang et al. 2024)",
        Tau,
        fit_pn_transductive,
        fitted=False,
        transductive=True,
    ),
}


def fit_rule(name: str, config: Strict, holdout: Holdout) -> Fitted:
    """The rule `name` fitted on a hold-out, to be called with logits float [N, K] of any precision.

    Raises ValueError when it needs a hold-out and `check` refuses this one or its K is not that of the counts, and as
    the rule says; when called, where there are no samples or not K classes.
    """
    rule, K = RULES[name], len(holdout.counts)
    if rule.needs_holdout(config):
        check(holdout.logits, holdout.labels)
        if holdout.logits.shape[1] != K:
            raise ValueError(f"held-out logits of {holdout.logits.shape[1]} classes, counts of {K}")
    holdout = holdout._replace(logits=np.asarray(holdout.logits, dtype=np.float64))
    fitted = rule.fit(holdout, **config.model_dump())

    def apply(logits_NK: np.ndarray) -> np.ndarray:
        logits_NK = np.asarray(logits_NK, dtype=np.float64)
        if logits_NK.ndim != 2 or len(logits_NK) == 0 or logits_NK.shape[1] != K:
            raise ValueError(f"logits must have shape [samples, {K}], got {list(logits_NK.shape)}")
        return fitted(logits_NK)

    return replace(fitted, apply=apply)


def fit(rules: dict[str, Strict], holdout: Holdout) -> dict[str, Fitted]:
    """Each of `rules`, {name: Config}, fitted on a hold-out; where that is empty, those alone that need none."""
    return {
        name: fit_rule(name, config, holdout)
        for name, config in rules.items()
        if len(holdout.labels) or not RULES[name].needs_holdout(config)
    }


def configure(blocks: dict[str, dict[str, Any]]) -> dict[str, Strict]:
    """The checked Config of each rule named in `blocks`. Raises UserError (one line) for an unknown rule or setting."""
    where = "evaluate.posthoc"
    if unknown := sorted(set(blocks) - set(RULES)):
        raise UserError(f"{PARAMS}: {where}.{unknown[0]}: unknown rule: there are {', '.join(sorted(RULES))}")
    return {name: validate(RULES[name].Config, block, f"{where}.{name}") for name, block in blocks.items()}
