"""Is it better, and how sure are we? Samples put to a solver, its answers scored, two runs compared.

    run = evaluate("smollm2-135m-instruct", samples, scorers, log="run.jsonl")
    compare(load("baseline.jsonl"), run)

A run is a JSONL file: a header, and a line for each sample and epoch as soon as it is scored. An interrupted
run goes on from there, and what was answered is not asked again. Every sample is kept: one that could not be
answered or scored says why. The transcripts stay in the file, so a run of any length takes little memory.

A solver runs in this process, in threads: one that hangs is given up, but a thread cannot be ended.
`evaluation_run` asks and scores, `evaluation_log` keeps, `comparison` compares.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd

from companion import comparison, evaluation_report, metrics
from companion.comparison import Comparison as Comparison
from companion.comparison import compare as compare
from companion.evaluation_log import FORMAT, Record, Sample, as_json, as_record, locked, read, resumed, unlink
from companion.evaluation_log import Answer as Answer
from companion.evaluation_log import Score as Score
from companion.evaluation_run import LONGEST as LONGEST
from companion.evaluation_run import Run, Scorer, Solver, prepare

COLUMNS = ("id", "epoch", "input", "target", "answer", "error", "seconds", "tokens")


def evaluate(
    solver: str | Solver | Any,
    samples: Iterable[Sample],
    scorers: Scorer | Sequence[Scorer],
    *,
    name: str | None = None,
    log: str | os.PathLike | None = None,
    epochs: int = 1,
    limit: int | None = None,
    concurrency: int = 8,
    timeout: float | None = 120.0,
    seed: int | None = 0,
    progress: bool = True,
    **request: Any,
) -> Evaluation:
    """Put samples to a solver, some at a time, and score what it answers.

    Args:
        solver: a model's name; a `Chat`, of which each sample gets a copy with an empty conversation; or a
            function of a sample's input that returns a text, an `Answer`, a `Chat`'s reply, a ChatCompletion,
            or None where it has no answer. A function with a parameter `seed` gets the epoch's.
        samples: the questions. The results keep their order.
        scorers: functions of (answer, sample) that return a `Score`, a number, a bool or None. They are known
            by their names, and asked where there is an answer.
        name: what to call the run; the solver's name if None.
        log: the JSONL file. Where it exists, the run in it goes on: only samples without an answer are asked.
            A function is known there by its name and source, not by what it uses: a prompt in a variable of
            its own, once changed, needs another log. None keeps the run in a temporary file, for as long as
            the result lives.
        epochs: how often each sample is asked.
        limit: take only so many samples, the first ones.
        concurrency: how many samples are with the solver at the same time.
        timeout: seconds for the solver, and again for the scorers, before a sample is given up; None waits.
        seed: sent with each request, plus the epoch's number (from 0); None sends none.
        progress: whether to show a bar.
        **request: sent with each request: temperature, max_completion_tokens, response_format, …

    A model that is asked the very same thing for several samples is asked once. Ctrl-C stops the run and
    leaves the log whole.

    Raises:
        ValueError: samples, scorers or options that cannot be used; two samples of one id; or a log of
            another evaluation. Nothing was asked.
        RuntimeError: another process is writing to the log, or there is no endpoint to ask.
        OSError: the log cannot be written.
    """
    for what, number in (("epochs", epochs), ("concurrency", concurrency)):
        if number < 1:
            raise ValueError(f"{what} must be at least 1, not {number!r}")
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout must be more than 0 seconds, or None to wait, not {timeout!r}")
    asked = prepare(solver, timeout, request)
    named = _named(scorers)
    samples, ids, digest = _checked(samples, limit)
    header = {
        "format": FORMAT,
        "name": name or asked.name,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "solver": asked.described,
        "samples": {"number": len(samples), "sha256": digest},
        "scorers": list(named),
        "request": request,
        "epochs": epochs,
        "seed": seed,
    }
    header = json.loads(as_json(header))
    if log is None:
        handle, path = tempfile.mkstemp(prefix="companion-evaluation-", suffix=".jsonl")
        os.close(handle)
    else:
        path = os.fspath(log)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        with locked(path) if log is not None else nullcontext():
            file = resumed(path, header)
            Run(asked, samples, ids, named, file, epochs, seed, timeout).go(concurrency, progress, log)
    except BaseException:
        if log is None:
            os.unlink(path)
        raise
    run = Evaluation(file.path, file.header, file.offsets)
    if log is None:
        weakref.finalize(run, unlink, path)
    return run


def load(path: str | os.PathLike) -> Evaluation:
    """A run from its log, finished or not. Raises ValueError for a file that is no log of `evaluate`."""
    file = read(os.fspath(path))
    return Evaluation(file.path, file.header, file.offsets)


def _checked(samples: Iterable[Sample], limit: int | None) -> tuple[list[Sample], list[str], str]:
    """The samples, their ids, and a hash of them all."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, or None for all samples, not {limit!r}")
    found, ids, digest = [], {}, hashlib.sha256()
    for number, sample in enumerate(islice(samples, limit), start=1):
        if not isinstance(sample, Sample):
            raise ValueError(f"sample {number} must be a Sample, not {sample!r:.80}")
        messages = sample.input if isinstance(sample.input, list) else []
        if not (isinstance(sample.input, str) or messages) or not all(
            isinstance(message, dict) and "role" in message for message in messages
        ):
            raise ValueError(
                f"the input of sample {number} must be a text or messages, not {sample.input!r:.80}"
            )
        if isinstance(sample.target, float) and math.isnan(sample.target):  # as pandas writes a missing value
            sample = replace(sample, target=None)
        content = as_json([sample.input, sample.target])
        id = hashlib.sha256(content).hexdigest()[:16] if sample.id is None else str(sample.id)
        if id in ids:
            raise ValueError(f"samples {ids[id]} and {number} have the same id {id!r}: give each its own")
        ids[id] = number
        digest.update(as_json([id, sample.metadata]) + content)
        found.append(sample)
    if not found:
        raise ValueError("there are no samples")
    return found, list(ids), digest.hexdigest()


def _named(scorers: Scorer | Sequence[Scorer]) -> dict[str, Scorer]:
    named: dict[str, Scorer] = {}
    for scorer in [scorers] if callable(scorers) else scorers:
        if not callable(scorer):
            raise ValueError(f"a scorer is a function of (answer, sample), not {scorer!r}")
        name = str(getattr(scorer, "__name__", type(scorer).__name__))
        if name in named:
            raise ValueError(f"two scorers are named {name!r}: give one another name=")
        if name in COLUMNS or name.startswith("metadata."):
            raise ValueError(f"a scorer cannot be named {name!r}, since that is a column of the results")
        named[name] = scorer
    if not named:
        raise ValueError("there are no scorers")
    return named


class Evaluation:
    """A run: its records in the order of the samples, read from its log as they are needed.

    Iterating gives a `Record` for each sample and epoch; one that is not there yet is left out. `name`,
    `scorers` (their names), `path` (the log) and `header` (what was asked for) say what was run.
    """

    def __init__(self, path: str, header: dict[str, Any], offsets: Sequence[int]):
        self.path, self.header, self._offsets = os.path.abspath(path), header, offsets
        self.name: str = header["name"]
        self.scorers: tuple[str, ...] = tuple(header["scorers"])

    def __len__(self) -> int:
        return sum(offset >= 0 for offset in self._offsets)

    def __iter__(self) -> Iterator[Record]:
        with open(self.path, "rb") as file:
            for offset in self._offsets:
                if offset >= 0:
                    file.seek(offset)
                    yield as_record(file.readline())

    def frame(self) -> pd.DataFrame:
        """A row a sample and epoch.

        Columns: id, epoch, input, target, answer, error, seconds, tokens (of prompt and completion), a column
        for each scorer, and one for each key of the metadata, as metadata.key. What could not be scored is
        NaN among numbers, None among labels.
        """
        rows = []
        for sample, epoch, answer, scores in self:
            tokens = answer.usage.get("total_tokens")
            cells = (sample.id, epoch, sample.input, sample.target, answer.text, answer.error)
            row = dict(zip(COLUMNS, (*cells, answer.seconds, tokens), strict=True))
            row |= {name: scores[name].value for name in self.scorers}
            rows.append(row | {f"metadata.{key}": value for key, value in sample.metadata.items()})
        frame = pd.DataFrame(rows, columns=None if rows else [*COLUMNS, *self.scorers])
        for name in self.scorers:
            missing = frame[name].isna()
            if missing.any() and not frame[name].map(lambda value: isinstance(value, str)).any():
                frame[name] = frame[name].astype(float)
        return frame

    def estimate(self, scorer: str) -> metrics.Estimate:
        """A scorer's mean over the samples, each the mean of its epochs, with its 95 % interval.

        Samples that share a "conversation" are counted as the clusters that they are; where each has one
        score, right or wrong, the interval is Wilson's. What could not be scored is left out: `failures`
        tells how much that is.
        """
        return self._overview[1][self.choose(scorer)]

    def summary(self) -> pd.DataFrame:
        """A row a scorer: its `estimate` as value, low and high, the samples in it (n), those without a score
        (missing), and why there is no value or no interval where there is none.
        """
        number = self.header["samples"]["number"]
        rows = [
            {
                "scorer": name,
                "value": one.value,
                "low": one.low,
                "high": one.high,
                "n": one.n,
                "missing": number - one.n,
                "why": one.why,
            }
            for name, one in self._overview[1].items()
        ]
        return pd.DataFrame(rows).set_index("scorer").astype({"value": float, "low": float, "high": float})

    @property
    def failures(self) -> pd.DataFrame:
        """What could not be answered or scored: id, epoch, what ("answer", or the scorer) and the reason."""
        rows = []
        for sample, epoch, answer, scores in self:
            failed = {"answer": answer.error} if answer.error else {}
            failed = failed or {name: one.explanation for name, one in scores.items() if one.value is None}
            rows += [(sample.id, epoch, what, why) for what, why in failed.items()]
        return pd.DataFrame(rows, columns=["id", "epoch", "what", "reason"])

    def report(self, path: str | os.PathLike) -> Path:
        """Write an HTML page with the summary and every transcript, to be filtered by right and wrong.

        Returns its path. The page needs nothing else, and shows what models wrote as text, never as HTML.
        """
        return evaluation_report.write(Path(path), self.name, self._repr_html_(), self)

    def choose(self, scorer: str | None, *others: Evaluation) -> str:
        """The scorer that is meant: the one named, or the only one of these runs. Raises ValueError."""
        common = [name for name in self.scorers if all(name in other.scorers for other in others)]
        if scorer in common or (scorer is None and len(common) == 1):
            return scorer or common[0]
        asked = "which scorer?" if scorer is None else f"there is no scorer {scorer!r}:"
        raise ValueError(f"{asked} choose one of {', '.join(common) or 'none, since these runs share none'}")

    def values(self) -> dict[str, comparison.Values]:
        """By sample: what was scored, for `compare` and the estimates."""
        found: dict[str, comparison.Values] = {}
        for sample, _, answer, scores in self:
            if sample.id not in found:
                target = hash(as_json(sample.target))
                found[sample.id] = comparison.Values(target, sample.id, sample.metadata.get("conversation"))
            found[sample.id].unanswered += bool(answer.error)
            for name, score in scores.items():
                if score.value is not None:
                    found[sample.id].scores.setdefault(name, []).append(score.value)
        return found

    @cached_property
    def _overview(self) -> tuple[str, dict[str, metrics.Estimate]]:
        """The run in a line, and an estimate for each scorer."""
        found = list(self.values().values())
        clusters = comparison.clusters_of(found)
        estimates = {
            name: comparison.estimate([values.mean(name) for values in found], clusters, name)
            for name in self.scorers
        }
        there, asked = len(self), len(self._offsets)
        said = f"{self.name}: {there - sum(one.unanswered for one in found)} of {asked} answered"
        return said + (f", {asked - there} not asked yet" if there < asked else ""), estimates

    def __repr__(self) -> str:
        said, estimates = self._overview
        width = max(map(len, self.scorers))
        return "\n".join([said, *(f"  {name:{width}}  {one}" for name, one in estimates.items())])

    def _repr_html_(self) -> str:
        said, estimates = self._overview
        return comparison.table(said, [(name, str(one)) for name, one in estimates.items()])
