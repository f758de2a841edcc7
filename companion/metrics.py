"""Numbers with their uncertainty: how good, how sure, better or worse, and how many samples it takes to tell.

A sequence has a value for each sample: numbers or bools, or labels. None and NaN are missing and counted
out; `n` is what was left. What cannot be computed is not defined and says why. Intervals are made so that
95 % of them (or `level`) hold the true value, were the evaluation repeated many times. Samples that belong
together, such as the turns of one conversation, are told by `clusters`, an id for each sample: they say less
than as many samples apart (Miller 2024, Adding Error Bars to Evals, arXiv:2411.00640). This module runs no
model and draws nothing.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import optimize, stats

Values = Iterable[float | bool | None]
Labels = Iterable[Hashable]

RESAMPLES = 2000  # of a bootstrap
FLIPS = 9999  # of a permutation test
_CELLS = 5_000_000  # numbers that resampling holds at a time
_BCA = 5000  # samples up to which the bootstrap corrects for bias and skew; beyond, both intervals agree

_ALONE = "one sample says nothing about the spread"
_EQUAL = "all values are equal and say nothing about the spread"
_ONE_CLUSTER = "all samples are in one cluster, which says nothing about the spread between clusters"
_NOTHING = "there are no values"
_INFINITE = "a value is infinite"


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    value: None where the number is not defined.
    low, high: the ends of the interval; None where there is no interval.
    n: how many samples it was computed from.
    what: its name.
    why: why the number, or only its interval, is not defined; None where both are.
    level: how often such an interval holds the true value.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    what: str
    why: str | None = None
    level: float = 0.95

    def __str__(self) -> str:
        if self.value is None:
            return f"not defined: {self.why}"
        if self.low is None or self.high is None:
            return f"{_shown(self.value, min(abs(self.value), 1))} (no interval: {self.why}), n = {self.n:,}"
        value, low, high = (_shown(x, self.high - self.low) for x in (self.value, self.low, self.high))
        return f"{value} ({low} to {high}), n = {self.n:,}"

    def _repr_pretty_(self, printer, cycle) -> None:
        printer.text(str(self))


def _shown(number: float, scale: float) -> str:
    """The number with two digits of what an interval of this width leaves open, or two decimals."""
    digits = 1 - math.floor(math.log10(scale)) if scale > 0 else 2
    digits = max(digits, 2) if scale < 10 else digits
    return f"{round(number, digits) + 0.0:,.{max(digits, 0)}f}"


# What was given


def _numbers(values: Values) -> np.ndarray:
    """The values as floats, NaN where one is missing."""
    return np.array([_number(value) for value in values], dtype=float)


def _number(value: Any) -> float:
    if isinstance(value, Real | np.bool_):
        return float(value)
    if value is None or value is pd.NA:
        return math.nan
    raise ValueError(f"{value!r} is no number: give numbers or bools, and None where one is missing")


def _objects(values: Iterable) -> np.ndarray:
    values = list(values)
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _codes(clusters: Iterable, n: int) -> np.ndarray:
    """The clusters as numbers, one for each of n samples."""
    clusters = _objects(clusters)
    if len(clusters) != n:
        raise ValueError(f"there are {len(clusters)} clusters for {n} samples: give one for each sample")
    codes, _ = pd.factorize(clusters)
    if (codes < 0).any():
        raise ValueError(f"clusters[{np.argmax(codes < 0)}] is missing: each sample needs a cluster's id")
    return codes


def _present(clusters: Iterable | None, *columns: np.ndarray) -> tuple[np.ndarray | None, ...]:
    """Clusters and columns without the samples of which anything is missing."""
    lengths = {len(column) for column in columns}
    if len(lengths) > 1:
        raise ValueError(f"there are {' and '.join(map(str, map(len, columns)))} values, not as many")
    codes = None if clusters is None else _codes(clusters, lengths.pop())
    kept = ~np.any([pd.isna(column) for column in columns], axis=0)
    codes = None if codes is None else np.unique(codes[kept], return_inverse=True)[1]
    return codes, *(column[kept] for column in columns)


def _tail(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level={level} must be between 0 and 1: 0.95 is usual")
    return 0.5 + level / 2


# Means and shares


def mean(
    values: Values, clusters: Iterable | None = None, *, what: str = "mean", level: float = 0.95
) -> Estimate:
    """The mean, with Student's t interval.

    For 0 and 1 `proportion` is better. With clusters the standard error is the bias-reduced one (CR2) with
    its own degrees of freedom (Bell and McCaffrey 2002), which holds with few or unequal clusters too, where
    the plain clustered error is too small; for clusters of one size both are the same.

    Raises:
        ValueError: a value that is no number, clusters of another length or with a missing id.
    """
    tail = _tail(level)
    clusters, x = _present(clusters, _numbers(values))
    if why := _unusable(x):
        return Estimate(None, None, None, len(x), what, why, level)
    value = float(x.mean())
    error, freedom, why = _standard_error(x, clusters)
    if why:
        return Estimate(value, None, None, len(x), what, why, level)
    half = float(stats.t.ppf(tail, freedom)) * error
    return Estimate(value, value - half, value + half, len(x), what, None, level)


def _unusable(x: np.ndarray) -> str | None:
    return _NOTHING if not len(x) else _INFINITE if np.isinf(x).any() else None


def _standard_error(x: np.ndarray, clusters: np.ndarray | None) -> tuple[float, float, str | None]:
    """Standard error of the mean, its degrees of freedom, and why there is none.

    CR2 for a model of only a mean, with its Satterthwaite degrees of freedom (Pustejovsky and Tipton 2018,
    doi:10.1080/07350015.2016.1247004). Where every sample is a cluster it is s / sqrt(n) with n - 1.
    """
    if len(x) < 2:
        return 0.0, 0.0, _ALONE
    if x.min() == x.max():
        return 0.0, 0.0, _EQUAL
    clusters = np.arange(len(x)) if clusters is None else clusters
    sizes, n = np.bincount(clusters), len(x)
    if len(sizes) < 2:
        return 0.0, 0.0, _ONE_CLUSTER
    sums = np.bincount(clusters, weights=x - x.mean())
    rest = 1 - sizes / n
    error = math.sqrt((sums**2 / rest).sum()) / n
    if error < 1e-14 * np.abs(x).max():
        return 0.0, 0.0, "the means of the clusters are all equal and say nothing about the spread"
    weights = sizes**2 / rest
    freedom = n**2 / ((sizes**2).sum() + (weights.sum() ** 2 - (weights**2).sum()) / n**2)
    return error, float(freedom), None


def proportion(
    values: Values, clusters: Iterable | None = None, *, what: str = "proportion", level: float = 0.95
) -> Estimate:
    """The share of 1 or True, with Wilson's interval (1927, doi:10.2307/2276774).

    It holds on the average from 10 samples, and from 50 for each share between 0.2 and 0.8.

    With clusters as many independent samples are counted as would have the same standard error (Korn and
    Graubard 1998; see `mean`), and where all values are equal as many as there are clusters. From about 20
    clusters that holds; with fewer the interval is too wide rather than too narrow.

    Raises:
        ValueError: a value other than 0, 1, True, False and missing; and as `mean`.
    """
    tail = _tail(level)
    clusters, x = _present(clusters, _numbers(values))
    if not len(x):
        return Estimate(None, None, None, 0, what, _NOTHING, level)
    if (wrong := x[(x != 0) & (x != 1)]).size:
        raise ValueError(f"a proportion counts 0 and 1, not {wrong[0]:g}: use mean()")
    value, n, critical = float(x.mean()), float(len(x)), float(stats.norm.ppf(tail))
    if clusters is not None:
        error, freedom, why = _standard_error(x, clusters)
        count = int(clusters.max()) + 1
        if count < 2:
            return Estimate(value, None, None, len(x), what, _ONE_CLUSTER, level)
        if why == _EQUAL:
            n = freedom = count
        elif why:
            freedom = count - 1
        else:
            n = min(n, value * (1 - value) / error**2)
        critical = float(stats.t.ppf(tail, freedom))
    low, high = _wilson(value, n, critical)
    return Estimate(value, low, high, len(x), what, None, level)


def _wilson(share: float, n: float, critical: float) -> tuple[float, float]:
    scale = 1 + critical**2 / n
    middle = (share + critical**2 / (2 * n)) / scale
    half = critical * math.sqrt(share * (1 - share) / n + critical**2 / (4 * n**2)) / scale
    return (max(middle - half, 0.0) if share else 0.0), (min(middle + half, 1.0) if share < 1 else 1.0)


def rate(values: Values, what: str, clusters: Iterable | None = None, *, level: float = 0.95) -> Estimate:
    """How often something happened, as an escalation, a refusal or an invalid answer: `proportion`, named."""
    return proportion(values, clusters, what=what, level=level)


def percentile(values: Values, q: float, *, level: float = 0.95) -> Estimate:
    """The value below which q percent lie (0 < q < 100), as for latency in seconds.

    The value is interpolated as numpy does. The interval is between two of the values and assumes nothing of
    their distribution (Conover 1999, scipy's `quantile_test`), so it holds at least at its level.
    """
    _tail(level)
    if not 0 < q < 100:
        raise ValueError(f"q={q} must be between 0 and 100: 95 for the 95th percentile")
    _, x = _present(None, _numbers(values))
    what = f"{q:g}th percentile"
    if why := _unusable(x):
        return Estimate(None, None, None, len(x), what, why, level)
    value = float(np.percentile(x, q))
    low, high = map(float, stats.quantile_test(x, p=q / 100).confidence_interval(level))
    if math.isnan(low) or math.isnan(high):
        why = f"{len(x)} values are too few to bound this percentile from both sides"
        return Estimate(value, None, None, len(x), what, why, level)
    return Estimate(value, low, high, len(x), what, None, level)


def tokens(usages: Iterable[Mapping[str, Any] | None]) -> dict[str, Estimate]:
    """The mean number of tokens of a request: those of the prompt and those of the completion.

    usages: what the API says an answer used, as a dict ("prompt_tokens" and "completion_tokens", or
    "input_tokens" and "output_tokens" of the Responses API). A total is the mean times n.
    """
    usages = [usage or {} for usage in usages]
    return {
        "prompt tokens": mean(map(_prompt, usages), what="prompt tokens of a request"),
        "completion tokens": mean(map(_completion, usages), what="completion tokens of a request"),
    }


def cost(usages: Iterable[Mapping[str, Any] | None], *, prompt: float, completion: float) -> Estimate:
    """The mean cost of a request, in the currency of the prices.

    usages: as for `tokens`. prompt, completion: the price of a million tokens.
    """
    used = [(_prompt(usage or {}), _completion(usage or {})) for usage in usages]
    costs = [None if None in pair else (pair[0] * prompt + pair[1] * completion) / 1e6 for pair in used]
    return mean(costs, what="cost of a request")


def _prompt(usage: Mapping[str, Any]) -> int | None:
    return usage.get("prompt_tokens", usage.get("input_tokens"))


def _completion(usage: Mapping[str, Any]) -> int | None:
    return usage.get("completion_tokens", usage.get("output_tokens"))


# The bootstrap


def bootstrap(
    values: Values,
    statistic: Callable[[np.ndarray], float],
    clusters: Iterable | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Estimate:
    """Any statistic, with an interval from resampling the values, or whole clusters of them.

    The interval is corrected for bias and skew (BCa, Efron 1987, doi:10.1080/01621459.1987.10478410; by
    scipy). It holds for smooth statistics, as means, from about 50 samples or clusters.

    Args:
        statistic: takes a float array and gives a number, as `numpy.median`.
        seed: the same seed gives the same interval.
    """
    _tail(level)
    clusters, x = _present(clusters, _numbers(values))
    what = getattr(statistic, "__name__", "statistic")
    if why := _unusable(x):
        return Estimate(None, None, None, len(x), what, why, level)
    value = float(statistic(x))
    if not math.isfinite(value):
        return Estimate(None, None, None, len(x), what, f"{what} is {value} for these values", level)
    if clusters is None:
        low, high, why = _resampled(x, statistic, _takes_axis(statistic), seed, resamples, level)
    else:
        groups = np.split(x[np.argsort(clusters, kind="stable")], np.cumsum(np.bincount(clusters))[:-1])

        def of_clusters(rows: np.ndarray) -> float:
            return statistic(np.concatenate([groups[row] for row in rows]))

        low, high, why = _resampled(np.arange(len(groups)), of_clusters, False, seed, resamples, level)
        why = _ONE_CLUSTER if len(groups) < 2 else why
    return Estimate(value, low, high, len(x), what, why, level)


def _takes_axis(statistic: Callable) -> bool:
    try:
        return "axis" in inspect.signature(statistic).parameters
    except ValueError:  # some of Python's own functions do not say
        return False


def _resampled(
    units: np.ndarray,
    statistic: Callable,
    vectorized: bool,
    seed: int,
    resamples: int,
    level: float,
    size: int = 0,
) -> tuple[float | None, float | None, str | None]:
    """The ends of a bootstrap interval, or why there is none. size: how many numbers one resample takes."""
    if len(units) < 2:
        return None, None, _ALONE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = stats.bootstrap(
            (units,),
            statistic,
            n_resamples=resamples,
            batch=max(1, _CELLS // max(len(units), size)),
            vectorized=vectorized,
            confidence_level=level,
            method="BCa" if len(units) <= _BCA else "percentile",
            rng=seed,
        )
    if np.isnan(result.bootstrap_distribution).any():
        return None, None, "it is not defined in some of the resamples"
    if np.ptp(result.bootstrap_distribution) == 0:
        return None, None, "it is the same in all resamples"
    low, high = map(float, result.confidence_interval)
    if math.isnan(low) or math.isnan(high):
        return None, None, "too few of the resamples differ"
    return low, high, None


# Labels


def accuracy(
    truth: Labels, said: Labels, clusters: Iterable | None = None, *, level: float = 0.95
) -> Estimate:
    """The share of samples that were given their true label, with the interval of `proportion`.

    A sample without a truth or an answer is counted out. To count a missing answer as wrong, give it a label
    of its own, such as "none".
    """
    clusters, truth, said = _present(clusters, _objects(truth), _objects(said))
    return proportion(truth == said, clusters, what="accuracy", level=level)


def confusion(truth: Labels, said: Labels) -> pd.DataFrame:
    """How often each true label (row) was given each label (column): counts, without missing ones."""
    labels, cells, _ = _cells(truth, said)
    counts = np.bincount(cells, minlength=len(labels) ** 2).reshape(len(labels), len(labels))
    rows, columns = pd.Index(labels, name="truth", dtype=object), pd.Index(labels, name="said", dtype=object)
    return pd.DataFrame(counts, index=rows, columns=columns)


def by_label(truth: Labels, said: Labels, *, level: float = 0.95) -> pd.DataFrame:
    """For each label its precision and recall (Estimates), its F1 and the number of samples that have it.

    Precision: of the samples that were given the label, the share that has it. Recall: of those that have it,
    the share that was given it. F1: their harmonic mean.
    """
    rows = {}
    table = confusion(truth, said)
    for label in table.index:
        right, given, true = table.loc[label, label], table[label].sum(), table.loc[label].sum()
        never = f"no sample was given the label {label!r}"
        rows[label] = {
            "precision": _share(right, given, f"precision of {label}", never, level),
            "recall": _share(right, true, f"recall of {label}", f"no sample has the label {label!r}", level),
            "f1": float(2 * right / (given + true)),
            "n": int(true),
        }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["precision", "recall", "f1", "n"])


def _share(right: int, n: int, what: str, why: str, level: float) -> Estimate:
    if not n:
        return Estimate(None, None, None, 0, what, why, level)
    return proportion([True] * right + [False] * (n - right), what=what, level=level)


Average = Literal["macro", "weighted"]


def precision(
    truth: Labels,
    said: Labels,
    clusters: Iterable | None = None,
    *,
    average: Average = "macro",
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """The mean precision of the labels (see `by_label`), with a bootstrap interval.

    A label that was never given counts as 0, as in scikit-learn.

    Args:
        truth, said: a label for each sample.
        average: "macro": each label counts the same; "weighted": as often as it is true.

    Raises:
        ValueError: an unknown average, sequences of different lengths.
    """
    return _averaged("precision", truth, said, clusters, average, seed, level)


def recall(
    truth: Labels,
    said: Labels,
    clusters: Iterable | None = None,
    *,
    average: Average = "macro",
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """The mean recall of the labels, else as `precision`. A label that is never true counts as 0."""
    return _averaged("recall", truth, said, clusters, average, seed, level)


def f1(
    truth: Labels,
    said: Labels,
    clusters: Iterable | None = None,
    *,
    average: Average = "macro",
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """The mean F1 of the labels, else as `precision`."""
    return _averaged("f1", truth, said, clusters, average, seed, level)


def _averaged(
    name: str,
    truth: Labels,
    said: Labels,
    clusters: Iterable | None,
    average: Average,
    seed: int,
    level: float,
) -> Estimate:
    if average not in ("macro", "weighted"):
        raise ValueError(f"average={average!r} must be 'macro' or 'weighted'")

    def statistic(counts: np.ndarray) -> np.ndarray:
        right = np.diagonal(counts, axis1=-2, axis2=-1)
        true, given = counts.sum(-1), counts.sum(-2)
        of = {"precision": given, "recall": true, "f1": (given + true) / 2}[name]
        scores = right / np.maximum(of, 0.5)  # 0 where there is nothing to divide by
        weights = true if average == "weighted" else (true + given > 0)  # a resample may lack a label
        return (scores * weights).sum(-1) / weights.sum(-1)

    _tail(level)
    what = f"{average} {name}"
    labels, cells, clusters = _cells(truth, said, clusters)
    n, k = len(cells), len(labels)
    if k < 2:
        why = f"only the label {labels[0]!r} occurs" if labels else "no sample has both labels"
        return Estimate(None, None, None, n, what, why, level)
    value = float(statistic(np.bincount(cells, minlength=k * k).reshape(k, k)))
    units, table = cells, None
    if clusters is not None:
        units = np.arange(clusters.max() + 1)
        table = np.zeros((len(units), k * k))
        np.add.at(table, (clusters, cells), 1)
    kinds = k * k if table is None else len(units)

    def of_resamples(drawn: np.ndarray, axis: int) -> np.ndarray:
        rows = drawn.reshape(-1, drawn.shape[-1])
        offsets = kinds * np.arange(len(rows))[:, None]
        counts = np.bincount((rows + offsets).ravel(), minlength=kinds * len(rows)).reshape(len(rows), kinds)
        counts = counts if table is None else counts @ table
        return statistic(counts.reshape(*drawn.shape[:-1], k, k))

    low, high, why = _resampled(units, of_resamples, True, seed, RESAMPLES, level, k * k)
    why = _ONE_CLUSTER if clusters is not None and len(units) < 2 else why
    return Estimate(value, low, high, n, what, why, level)


def _cells(
    truth: Labels, said: Labels, clusters: Iterable | None = None
) -> tuple[list, np.ndarray, np.ndarray | None]:
    """The labels in order, for each sample the number of its cell in the confusion matrix, and clusters."""
    clusters, truth, said = _present(clusters, _objects(truth), _objects(said))
    labels = list({*truth, *said})
    try:
        labels.sort()
    except TypeError:
        labels.sort(key=str)
    place = {label: i for i, label in enumerate(labels)}
    cells = [place[true] * len(labels) + place[given] for true, given in zip(truth, said, strict=True)]
    return labels, np.array(cells, dtype=int), clusters


# Calibration


@dataclass(frozen=True, eq=False)
class Calibration:
    """How far a model's confidence can be believed.

    ece: the expected calibration error, the mean distance between confidence and share right, weighted by
    bin (Guo et al. 2017, arXiv:1706.04599); it is never below 0, so few samples make it too large.
    brier: the mean squared distance of confidence from right (1) or wrong (0) (Brier 1950); lower is better.
    table: a row for each bin with samples: from, to, n, confidence (the mean), right (the share), low, high
        (the interval of the share).
    """

    ece: Estimate
    brier: Estimate
    table: pd.DataFrame


def calibration(confidence: Values, correct: Values, bins: int = 10, *, level: float = 0.95) -> Calibration:
    """Compare how sure a model was (0 to 1) with whether it was right, in bins of equal width.

    Raises:
        ValueError: a confidence outside 0 to 1, a `correct` other than 0 and 1, no bin.
    """
    _tail(level)
    if bins < 1:
        raise ValueError(f"bins={bins} must be at least 1")
    _, sure, right = _present(None, _numbers(confidence), _numbers(correct))
    if (wrong := sure[(sure < 0) | (sure > 1)]).size:
        raise ValueError(f"a confidence is between 0 and 1, not {wrong[0]:g}")
    if (wrong := right[(right != 0) & (right != 1)]).size:
        raise ValueError(f"correct is 0 or 1, not {wrong[0]:g}")
    edges = np.linspace(0, 1, bins + 1)
    place = np.searchsorted(edges[1:-1], sure)  # a bin holds its upper edge
    rows = []
    for i in np.unique(place):
        inside = place == i
        share, bin_sure = proportion(right[inside], level=level), sure[inside].mean()
        rows.append((edges[i], edges[i + 1], share.n, bin_sure, share.value, share.low, share.high))
    table = pd.DataFrame(rows, columns=["from", "to", "n", "confidence", "right", "low", "high"], dtype=float)
    table["n"] = table["n"].astype(int)
    n, ece, why = len(sure), None, _NOTHING
    if n:
        ece = float((table["n"] * (table["confidence"] - table["right"]).abs()).sum() / n)
        why = "few samples make it too large, and no simple interval mends that"
    return Calibration(
        Estimate(ece, None, None, n, "expected calibration error", why, level),
        mean((sure - right) ** 2, what="Brier score", level=level),
        table,
    )


# Differences


@dataclass(frozen=True)
class Paired:
    """What changed from a to b on the same samples.

    difference: the mean of b - a, with its interval.
    p_value: how likely so large a difference, up or down, would be by chance, were a and b the same; None
        without samples.
    test: the test that gave it.
    better, worse, same: the number of samples on which b is above, below and like a.
    """

    difference: Estimate
    p_value: float | None
    test: str
    better: int
    worse: int
    same: int

    def __str__(self) -> str:
        if self.p_value is None:
            return str(self.difference)
        p = f"p = {self.p_value:.3f}" if self.p_value >= 0.0005 else "p < 0.001"
        return f"{self.difference}; {p} ({self.test})"

    def _repr_pretty_(self, printer, cycle) -> None:
        printer.text(str(self))


def paired(
    a: Values, b: Values, clusters: Iterable | None = None, *, level: float = 0.95, seed: int = 0
) -> Paired:
    """The difference b - a of two series on the same samples, in the same order.

    Of 0 and 1: Tango's score interval (Statistics in Medicine 17, 1998, p. 891), which holds from about 30
    samples, and McNemar's exact test, which is a little more careful than the interval. Of other numbers,
    and with clusters: the interval of `mean`, and a permutation test that flips the sign of each difference,
    or of each cluster's, at random (9,999 times, or in each possible way where there are fewer).

    Args:
        a, b: a value for each sample; one that is missing in either is counted out of both.
        clusters: as for `mean`.
        seed: the same seed gives the same p-value.

    Raises:
        ValueError: sequences of different lengths; and as `mean`.
    """
    tail = _tail(level)
    clusters, a, b = _present(clusters, _numbers(a), _numbers(b))
    if not len(a) or np.isinf([a, b]).any():
        why = _INFINITE if len(a) else "no sample has both values"
        return Paired(Estimate(None, None, None, len(a), "difference", why, level), None, "no test", 0, 0, 0)
    d = b - a
    better, worse = int((d > 0).sum()), int((d < 0).sum())
    if clusters is None and np.isin([a, b], (0, 1)).all():
        low, high = _tango(better, worse, len(d), float(stats.norm.ppf(tail)))
        difference = Estimate((better - worse) / len(d), low, high, len(d), "difference", None, level)
        p = float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
        test = "McNemar's exact test"
    else:
        difference = mean(d, clusters, what="difference", level=level)
        p = _flipped(d if clusters is None else np.bincount(clusters, weights=d), seed)
        test = "sign-flip permutation test" + ("" if clusters is None else " of clusters")
    return Paired(difference, p, test, better, worse, len(d) - better - worse)


def _tango(better: int, worse: int, n: int, critical: float) -> tuple[float, float]:
    """The differences that a score test at this critical value does not refuse."""

    def score(difference: float) -> float:
        # The share of samples that got worse, were this the true difference (maximum likelihood).
        linear = (2 * n - better + worse) * difference - better - worse
        root = math.sqrt(max(linear**2 + 8 * n * worse * difference * (1 - difference), 0.0))
        share = (root - linear) / (4 * n)
        variance = n * (2 * share + difference * (1 - difference))
        return (better - worse - n * difference) / math.sqrt(max(variance, 1e-300))

    value, low, high = (better - worse) / n, -1.0, 1.0
    if worse < n:
        low = optimize.brentq(lambda d: score(d) - critical, -1 + 1e-12, value, xtol=1e-13)
    if better < n:
        high = optimize.brentq(lambda d: score(d) + critical, value, 1 - 1e-12, xtol=1e-13)
    return low, high


def _flipped(d: np.ndarray, seed: int) -> float:
    """The p-value of sum(d), were the sign of each of d a coin's toss."""
    d = d[d != 0]
    n, total = len(d), d.sum()
    reach = abs(total) - 1e-12 * np.abs(d).sum()
    if 2**n <= FLIPS:
        heads = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return float(np.mean(np.abs(2 * (heads @ d) - total) >= reach))
    rng, width = np.random.default_rng(seed), math.ceil(n / 8)
    left, reached = FLIPS, 1  # the signs as they were count as one of the flips
    while left:
        rows = min(left, max(1, _CELLS // n))
        bits = np.frombuffer(rng.bytes(rows * width), np.uint8).reshape(rows, width)
        heads = np.unpackbits(bits, axis=1, count=n)
        reached += int((np.abs(2 * (heads @ d) - total) >= reach).sum())
        left -= rows
    return reached / (FLIPS + 1)


def samples_needed(
    difference: float,
    *,
    discordance: float | None = None,
    rate: float | None = None,
    power: float = 0.8,
    level: float = 0.95,
) -> int:
    """How many samples it takes to see a difference between two shares, such as accuracies.

    "To see" is that the interval of a true difference of this size leaves out 0, up or down, with the chance
    `power`. Give either of:

    discordance: the share of samples on which the two differ, where both answer the same samples (Connor
        1987, doi:10.2307/2531961). The number of samples.
    rate: the share of the old one, where each answers samples of its own (Fleiss 1981). The number for each.

    Raises:
        ValueError: both or neither of them, or a difference that they do not allow.
    """
    if (discordance is None) == (rate is None):
        raise ValueError("give discordance (both answer the same samples) or rate (samples of their own)")
    if not 0 < power < 1:
        raise ValueError(f"power={power} must be between 0 and 1: 0.8 is usual")
    alpha, beta = stats.norm.ppf(_tail(level)), stats.norm.ppf(power)
    if difference == 0:
        raise ValueError("a difference of 0 cannot be seen with any number of samples")
    if discordance is not None:
        if not abs(difference) <= discordance <= 1:
            raise ValueError(
                f"discordance={discordance} must be between the difference, {abs(difference):g}, and 1"
            )
        spread = alpha * math.sqrt(discordance) + beta * math.sqrt(discordance - difference**2)
    else:
        new = rate + difference
        if not (0 <= rate <= 1 and 0 <= new <= 1):
            raise ValueError(f"rate={rate} and rate + difference = {new:g} must be between 0 and 1")
        both = (rate + new) / 2
        spread = alpha * math.sqrt(2 * both * (1 - both))
        spread += beta * math.sqrt(rate * (1 - rate) + new * (1 - new))
    return math.ceil((spread / difference) ** 2 - 1e-9)


def adjust(p_values: Sequence[float | None], method: Literal["holm", "bh"] = "holm") -> list[float | None]:
    """P-values corrected for how many comparisons were made, in their order; None stays None.

    "holm": the chance of one false alarm or more stays below the limit that is set for one (Holm 1979).
    "bh": of the alarms, the share that is false stays below it (Benjamini and Hochberg 1995).

    Raises:
        ValueError: an unknown method, a p-value outside 0 to 1.
    """
    if method not in ("holm", "bh"):
        raise ValueError(f"method={method!r} must be 'holm' or 'bh'")
    given = _numbers(p_values)
    if (wrong := given[(given < 0) | (given > 1)]).size:
        raise ValueError(f"a p-value is between 0 and 1, not {wrong[0]:g}")
    kept = np.flatnonzero(~np.isnan(given))
    order = kept[np.argsort(given[kept])]
    if method == "bh":
        given[kept] = stats.false_discovery_control(given[kept]) if len(kept) else []
    else:
        factors = np.arange(len(kept), 0, -1)
        given[order] = np.minimum(np.maximum.accumulate(given[order] * factors), 1)
    return [None if math.isnan(p) else float(p) for p in given]
