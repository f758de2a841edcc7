"""Two runs of the same samples: is the new one better, worse, or can that not be told?

Also what a run and a comparison share: a sample's values, their estimate, and a table to show them.
"""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from companion import metrics

if TYPE_CHECKING:
    from companion.evaluation import Evaluation


@dataclass
class Values:
    """What a sample has in a run: a hash of its target, and by scorer its scores, one an epoch."""

    target: int
    id: str
    conversation: Any
    unanswered: int = 0
    scores: dict[str, list[Any]] = field(default_factory=dict)

    def mean(self, scorer: str) -> Any:
        """The mean of a scorer's values; a label as it is, None where nothing could be scored."""
        values = self.scores.get(scorer)
        if not values or any(isinstance(value, str) for value in values):
            return values[0] if values else None
        return sum(values) / len(values)


def clusters_of(found: Iterable[Values]) -> list[str] | None:
    """What each sample shares with others, itself where that is nothing; None where none shares anything."""
    if all(values.conversation is None for values in found):
        return None
    return [f"sample {v.id}" if v.conversation is None else f"conversation {v.conversation}" for v in found]


def estimate(
    means: list[Any], clusters: list[str] | None, what: str, level: float = 0.95
) -> metrics.Estimate:
    """The mean of a value for each sample: a share where all are 0 or 1, not defined for labels."""
    if any(isinstance(value, str) for value in means):
        there = sum(value is not None for value in means)
        return metrics.Estimate(None, None, None, there, what, "these are labels: see frame()", level)
    kind = metrics.proportion if set(means) <= {0, 1, None} else metrics.mean
    return kind(means, clusters, what=what, level=level)


@dataclass(frozen=True)
class Comparison:
    """Whether the new run is better than the old one. Its text is the evidence.

    verdict: "worse" if the interval of the difference, or of `scored`, lies wholly below -margin; "better" if
        that of the difference lies wholly above 0; or else "cannot tell".
    difference: new minus old on the same samples (`companion.metrics.Paired`).
    scored: the same for having a score at all: a system that fails more often is worse, whatever the rest is.
    old, new: each run's mean on these samples.
    changed: the samples whose score changed: id, input, target, old_score, new_score, old_answer, new_answer.
    left_out: how many samples were not compared, by reason.
    needed: how many samples it takes to tell a difference of this size from 0, in four of five evaluations;
        None where this run tells it, or where none was found.
    """

    verdict: Literal["better", "worse", "cannot tell"]
    scorer: str
    margin: float
    difference: metrics.Paired
    scored: metrics.Paired
    old: metrics.Estimate
    new: metrics.Estimate
    changed: pd.DataFrame
    left_out: dict[str, int]
    needed: int | None

    def _rows(self) -> list[tuple[str, str]]:
        found = self.difference
        rows = [
            ("old", f"{self.old.what}: {self.old}"),
            ("new", f"{self.new.what}: {self.new}"),
            ("new - old", str(found)),
            ("samples", f"{found.better} better, {found.worse} worse, {found.same} the same"),
        ]
        if self.scored.better or self.scored.worse:
            rows.append(("scored", f"new - old: {self.scored}"))
        if self.margin:
            rows.append(("margin", f"{self.margin:g}: worse by less is not yet worse"))
        if self.left_out:
            rows.append(("left out", ", ".join(f"{number} {why}" for why, number in self.left_out.items())))
        if self.needed:
            rows.append(("to tell", f"about {self.needed:,} samples show a difference of this size"))
        return rows

    def __str__(self) -> str:
        lines = (f"  {what:9}  {said}" for what, said in self._rows())
        return "\n".join([f"{self.scorer}: {self.verdict}", *lines])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return table(f"{self.scorer}: {self.verdict}", self._rows())


def compare(
    old: Evaluation,
    new: Evaluation,
    scorer: str | None = None,
    *,
    margin: float = 0.0,
    level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare two runs, sample by sample, where both have a score (Miller 2024, arXiv:2411.00640).

    A gate for pytest: `comparison = compare(old, new); assert comparison.verdict != "worse", comparison`.

    Args:
        old, new: runs with the same samples, known by their ids. A sample's epochs count as their mean.
        scorer: the score to compare, more being better; the only one that both have if None.
        margin: how much worse, in the score's units, is not yet worse.
        level: of the difference's interval.
        seed: for the test where it draws.

    Raises:
        ValueError: no scorer or no sample in common, scores that are labels, or a margin below 0.
    """
    if not margin >= 0:
        raise ValueError(f"margin must be 0 or more, not {margin!r}")
    scorer = old.choose(scorer, new)
    before, after = old.values(), new.values()
    if not before.keys() & after.keys():
        raise ValueError(
            f"{old.name} and {new.name} have no sample in common: compare runs of the same samples"
        )
    left_out: Counter[str] = Counter()
    pairs: dict[str, tuple[Any, Any]] = {}
    there: dict[str, tuple[bool, bool]] = {}  # whether old and new have a score
    for id in before | after:
        if id not in after or id not in before:
            left_out[f"only in {'old' if id in before else 'new'}"] += 1
            continue
        pair = before[id].mean(scorer), after[id].mean(scorer)
        without = [side for side, value in zip(("old", "new"), pair, strict=True) if value is None]
        if any(isinstance(value, str) for value in pair):
            raise ValueError(f"{scorer} gives labels, which cannot be compared: score them right or wrong")
        if before[id].target != after[id].target:
            left_out["with another target"] += 1
            continue
        there[id] = ("old" not in without, "new" not in without)
        if without:
            left_out[f"without a score in {' and '.join(without)}"] += 1
        else:
            pairs[id] = pair
    a, b = [pair[0] for pair in pairs.values()], [pair[1] for pair in pairs.values()]
    clusters = clusters_of([before[id] for id in pairs])
    found = metrics.paired(a, b, clusters, level=level, seed=seed)
    sides = list(zip(*there.values(), strict=True)) or ([], [])
    scored = metrics.paired(*sides, clusters_of([before[id] for id in there]), level=level, seed=seed)
    verdict = "better" if _ends(found)[0] > 0 else "cannot tell"
    if min(_ends(found)[1], _ends(scored)[1]) < -margin:
        verdict = "worse"
    changed = {id: pair for id, pair in pairs.items() if pair[0] != pair[1]}
    return Comparison(
        verdict,
        scorer,
        margin,
        found,
        scored,
        estimate(a, clusters, old.name, level),
        estimate(b, clusters, new.name, level),
        _changes(old, new, changed),
        dict(left_out),
        _needed(found),
    )


def _ends(found: metrics.Paired) -> tuple[float, float]:
    """Between which differences the true one lies, as far as can be told.

    Where every sample, or every cluster's mean, differs by the same, there is no interval to give; there the
    test alone decides, and what it cannot put down to chance is taken as it was found.
    """
    low, high = found.difference.low, found.difference.high
    if low is None and found.difference.value and found.p_value < 1 - found.difference.level:
        low = high = found.difference.value
    return -math.inf if low is None else low, math.inf if high is None else high


def _needed(found: metrics.Paired) -> int | None:
    """Samples that a difference as found takes to be told from 0 in four of five evaluations."""
    value, low, high, n = (getattr(found.difference, key) for key in ("value", "low", "high", "n"))
    if not value or low is None or high is None or low > 0 or high < 0:
        return None
    if found.test.startswith("McNemar"):
        discordance = (found.better + found.worse) / n
        return metrics.samples_needed(value, discordance=discordance, level=found.difference.level)
    # The interval narrows with the root of n.
    at = NormalDist().inv_cdf
    beyond = 1 + at(0.8) / at(0.5 + found.difference.level / 2)
    return math.ceil(n * (beyond * (high - low) / 2 / value) ** 2)


def _changes(old: Evaluation, new: Evaluation, pairs: dict[str, tuple[Any, Any]]) -> pd.DataFrame:
    rows: dict[str, dict[str, Any]] = {}
    for side, run in enumerate((old, new)):
        for sample, epoch, answer, _ in run if pairs else ():
            if sample.id in pairs and not epoch:
                row = {"id": sample.id, "input": sample.input, "target": sample.target}
                row |= dict(zip(("old_score", "new_score"), pairs[sample.id], strict=True))
                rows.setdefault(sample.id, row)[("old_answer", "new_answer")[side]] = answer.text
    columns = ["id", "input", "target", "old_score", "new_score", "old_answer", "new_answer"]
    return pd.DataFrame(rows.values(), columns=columns)


def table(caption: str, rows: Iterable[tuple[str, str]]) -> str:
    """Rows of a name and a text as HTML, in the colours of the page around."""
    body = "".join(
        f'<tr><th scope="row" style="text-align:left">{html.escape(what)}</th>'
        f'<td style="text-align:left">{html.escape(said)}</td></tr>'
        for what, said in rows
    )
    caption = f'<caption style="text-align:left">{html.escape(caption)}</caption>'
    return f'<table style="color:inherit">{caption}<tbody>{body}</tbody></table>'
