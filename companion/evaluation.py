"""Is it better, and how sure are we? Samples put to a solver, its answers scored, two runs compared.

    run = evaluate("smollm2-135m-instruct", samples, scorers, log="run.jsonl")
    compare(load("baseline.jsonl"), run)

A run is a JSONL file: a header, and a line for each sample and epoch as soon as it is scored. An interrupted
run goes on from there, and what was answered is not asked again. Every sample is kept: one that could not be
answered or scored says why. The transcripts stay in the file, so a run of any length takes little memory.

A solver runs in this process, in threads: one that hangs is given up, but a thread cannot be ended.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
import numbers
import os
import sys
import tempfile
import threading
import time
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from companion import backend, comparison, evaluation_report, metrics
from companion.comparison import Comparison as Comparison
from companion.comparison import compare as compare

Message = dict[str, Any]

LONGEST = 1_000_000  # characters of an answer or a transcript that are kept
LONGEST_NOTE = 4_000  # of an error or an explanation
COLUMNS = ("id", "epoch", "input", "target", "answer", "error", "seconds", "tokens")
_RESERVED = {"model", "messages", "stream", "stream_options", "n"}
_FORMAT = "companion evaluation 1"
_POLL = 0.05  # seconds between two looks at the clock


@dataclass(frozen=True)
class Sample:
    """A question with its right answer.

    Args:
        input: a text, or a list of messages as the API takes them.
        target: what a scorer compares the answer with; anything that JSON can hold, None where there is none.
        id: what a sample is known by from run to run; made from input and target if None.
        metadata: more about it. Samples with the same "conversation" are not independent of each other, and
            the intervals allow for that.
    """

    input: str | list[Message]
    target: Any = None
    id: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What a solver gave for a sample: a text, or the reason (`error`) why there is none.

    `messages` is the transcript with the input, `tool_calls` what was called on the way, each with its "name"
    and "arguments" (the JSON that the model wrote), `usage` the tokens as the API counts them
    ("prompt_tokens", "completion_tokens", "total_tokens"), `seconds` how long the solver took.
    """

    text: str | None
    messages: list[Message] = field(default_factory=list)
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)
    seconds: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Score:
    """What a scorer says of an answer: True, False, a number, or a label; higher is better.

    A value of None: it could not be scored, and `explanation` says why. `answer` is what the scorer read out
    of the answer's text.
    """

    value: float | bool | str | None
    answer: str | None = None
    explanation: str | None = None


class Record(NamedTuple):
    """A line of the log: the sample, the epoch (from 0), the answer, and a score for each scorer."""

    sample: Sample
    epoch: int
    answer: Answer
    scores: dict[str, Score]


Solver = Callable[..., Any]
Scorer = Callable[[Answer, Sample], Score | float | bool | None]


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
        **request: sent with each request: temperature, max_tokens, response_format, …

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
    asked = _prepare(solver, timeout, request)
    named = _named(scorers)
    samples, ids, digest = _checked(samples, limit)
    header = {
        "format": _FORMAT,
        "name": name or asked.name,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "solver": asked.described,
        "samples": {"number": len(samples), "sha256": digest},
        "scorers": list(named),
        "request": request,
        "epochs": epochs,
        "seed": seed,
    }
    header = json.loads(_json(header))
    if log is None:
        handle, path = tempfile.mkstemp(prefix="companion-evaluation-", suffix=".jsonl")
        os.close(handle)
    else:
        path = os.fspath(log)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(path) if log is not None else nullcontext():
            file = _open(path, header)
            _Run(asked, samples, ids, named, file, epochs, seed, timeout).go(concurrency, progress, log)
    except BaseException:
        if log is None:
            os.unlink(path)
        raise
    run = Evaluation(file.path, file.header, file.offsets)
    if log is None:
        weakref.finalize(run, _unlink, path)
    return run


def load(path: str | os.PathLike) -> Evaluation:
    """A run from its log, finished or not. Raises ValueError for a file that is no log of `evaluate`."""
    file = _read(os.fspath(path))
    return Evaluation(file.path, file.header, file.offsets)


# --- what is asked ------------------------------------------------------------------------------------------


@dataclass
class _Asked:
    """A solver made ready: `ask(input, seed)`; `repeats` says that the same question has the same answer."""

    name: str
    described: dict[str, Any]
    ask: Callable[[Any, int | None], Any]
    connect: Callable[[], Any] = lambda: None
    repeats: bool = False


def _prepare(solver: Any, timeout: float | None, request: dict[str, Any]) -> _Asked:
    if taken := _RESERVED & request.keys():
        raise ValueError(f"{', '.join(sorted(taken))}: evaluate sets this itself, take it out of the request")
    wait = {} if timeout is None else {"timeout": timeout}
    if isinstance(solver, str):
        model = _Model(solver, request | wait)
        return _Asked(solver, {"model": solver}, model, model.connect, repeats=True)
    if callable(getattr(solver, "ask", None)) and isinstance(getattr(solver, "messages", None), list):
        described = {
            "chat": solver.model,
            "system": _fresh(solver).messages,
            "tools": solver._schemas,
            "max_steps": solver.max_steps,
            "max_context_tokens": solver.max_context_tokens,
            "options": solver.options,
        }

        def ask(input: str | list[Message], seed: int | None) -> Answer:
            *before, last = _messages(input)
            if last["role"] != "user":
                raise ValueError(f"the last message of the input must be the user's, not {last['role']!r}")
            chat = _fresh(solver)
            chat.messages += before
            reply = chat.ask(last["content"], **request, **wait, **_seeded(seed))
            return replace(_answered(reply), messages=chat.messages)

        connect = (lambda: None) if solver.client else backend.client
        return _Asked(f"Chat({solver.model})", described, ask, connect)
    if not callable(solver):
        raise ValueError(f"a solver is a model's name, a Chat or a function, not {solver!r}")
    name = getattr(solver, "__name__", type(solver).__name__)
    if request:
        raise ValueError(f"{', '.join(request)}: only models and Chats take request options, {name} does not")
    try:
        takes_seed = "seed" in inspect.signature(solver).parameters
    except (ValueError, TypeError):
        takes_seed = False
    described = {"function": name}
    with suppress(OSError, TypeError):  # its source is not known
        described["source"] = hashlib.sha256(inspect.getsource(solver).encode()).hexdigest()[:12]
    if takes_seed:
        return _Asked(name, described, lambda input, seed: solver(input, seed=seed))
    return _Asked(name, described, lambda input, seed: solver(input))


class _Model:
    """Asks a model by its name, over a connection that is looked up again once it broke."""

    def __init__(self, name: str, request: dict[str, Any]):
        self.name, self.request, self.client = name, request, None

    def connect(self) -> Any:
        client = self.client = self.client or backend.client()
        return client

    def __call__(self, input: str | list[Message], seed: int | None) -> Any:
        from openai import APIConnectionError

        create = self.connect().chat.completions.create
        try:
            return create(model=self.name, messages=_messages(input), **self.request, **_seeded(seed))
        except APIConnectionError:
            self.client = None
            raise


def _fresh(chat: Any) -> Any:
    """A copy of a Chat, before its first turn."""
    fresh = copy.copy(chat)
    fresh.messages, fresh.context, fresh.usage = list(chat.messages), [], type(chat.usage)()
    fresh.clear()
    return fresh


def _seeded(seed: int | None) -> dict[str, int]:
    return {} if seed is None else {"seed": seed}


def _messages(input: str | list[Message]) -> list[Message]:
    return [{"role": "user", "content": input}] if isinstance(input, str) else list(input)


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
        content = _json([sample.input, sample.target])
        id = hashlib.sha256(content).hexdigest()[:16] if sample.id is None else str(sample.id)
        if id in ids:
            raise ValueError(f"samples {ids[id]} and {number} have the same id {id!r}: give each its own")
        ids[id] = number
        digest.update(_json([id, sample.metadata]) + content)
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


def _answered(given: Any) -> Answer:
    """What a solver returned, as an Answer of limited size."""
    if isinstance(given, Answer):
        answer = given
        if answer.text is None and not answer.tool_calls and not answer.error:
            answer = replace(answer, error="the solver gave an Answer without a text")
    elif isinstance(given, str):
        answer = Answer(given)
    elif given is None:
        answer = Answer(None, error="the solver returned None")
    elif getattr(given, "choices", None):  # a ChatCompletion
        message = given.choices[0].message
        calls = [
            {"name": c.function.name, "arguments": c.function.arguments} for c in message.tool_calls or ()
        ]
        text = message.content or message.refusal or ""
        answer = Answer(text, tool_calls=calls, usage=given.usage)
    elif hasattr(given, "text") and hasattr(given, "tool_calls"):  # a Chat's Reply
        answer = Answer(given.text, tool_calls=[asdict(call) for call in given.tool_calls], usage=given.usage)
    else:
        said = f"the solver returned {type(given).__name__} ({given!r:.80}), which is no answer"
        answer = Answer(None, error=said)
    text = answer.text if answer.text is None or isinstance(answer.text, str) else str(answer.text)
    if text is not None and len(text) > LONGEST:
        text = f"{text[:LONGEST]}… [cut: it had {len(text):,} characters]"
    messages, calls, usage = list(answer.messages or ()), list(answer.tool_calls or ()), _tokens(answer.usage)
    if (messages or calls or usage) and len(_json([messages, calls, usage])) > LONGEST:
        messages, calls = [], []
    error = answer.error and str(answer.error)[:LONGEST_NOTE]
    return replace(answer, text=text, messages=messages, tool_calls=calls, usage=usage, error=error)


def _tokens(usage: Any) -> dict[str, int]:
    """Tokens as the API counts them, of a completion's or a Chat's usage."""
    if not usage or isinstance(usage, dict):
        return usage or {}
    names = ("prompt", "completion") if hasattr(usage, "prompt") else ("prompt_tokens", "completion_tokens")
    prompt, completion = (getattr(usage, name) for name in names)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _scored(given: Any) -> Score:
    """What a scorer returned, as a Score whose value is a bool, a finite number, a text or None."""
    score = given if isinstance(given, Score) else Score(given)
    value, why = score.value, score.explanation
    if hasattr(value, "item"):  # numpy's
        value = value.item()
    if isinstance(value, numbers.Real) and not isinstance(value, bool | int):
        value = float(value)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        value, why = None, why or f"the scorer gave {value}"
    elif not isinstance(value, bool | int | float | str):
        value, why = (
            None,
            f"the scorer gave {type(value).__name__} ({value!r:.80}), which is no value of a Score",
        )
    read = None if score.answer is None else str(score.answer)[:LONGEST_NOTE]
    return Score(value, read, None if why is None else str(why)[:LONGEST_NOTE])


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:LONGEST_NOTE]
    except Exception:
        return type(error).__name__


# --- the run ------------------------------------------------------------------------------------------------


class _Task:
    """A question and the samples that ask it, of which each leaves once it is written."""

    def __init__(self, positions: Iterable[int], epoch: int, answer: Answer | None = None):
        self.positions, self.epoch, self.answer = deque(positions), epoch, answer
        self.since = time.monotonic()
        self.scores: dict[str, Score] = {}  # of the sample that is being scored
        self.given_up = False


class _Run:
    """Threads that take tasks, ask, score, and write each record themselves, under one lock.

    The calling thread only watches the clock and the bar: so Ctrl-C, which stops no other thread, never stops
    a record in the middle of being written.
    """

    def __init__(self, asked, samples, ids, scorers, file, epochs, seed, timeout):
        self.asked, self.samples, self.ids, self.scorers = asked, samples, ids, scorers
        self.file, self.epochs, self.seed, self.timeout = file, epochs, seed, timeout
        self.left = len(file.offsets) - sum(file.answered)
        self.failed = 0  # records of this run without an answer
        self.tasks = self._tasks()
        self.busy: set[_Task] = set()
        self.lock, self.finished = threading.Lock(), threading.Event()
        self.error: BaseException | None = None

    def go(self, concurrency: int, progress: bool, log: Any) -> None:
        if not self.left:
            return
        from tqdm import tqdm

        self.asked.connect()
        total, was = len(self.file.offsets), self.left
        with (
            self.file.appending(),
            tqdm(
                total=total, initial=total - was, unit=" samples", dynamic_ncols=True, disable=not progress
            ) as bar,
        ):
            try:
                for _ in range(min(concurrency, self.left)):
                    threading.Thread(target=self._work, daemon=True).start()
                while not self.finished.wait(_POLL):
                    self._give_up_the_late()
                    bar.update(total - self.left - bar.n)
                    if self.failed:
                        bar.set_postfix_str(f"{self.failed} without an answer", refresh=False)
                bar.update(total - self.left - bar.n)
            except KeyboardInterrupt:
                how = f"the same call, with log={str(log)!r}, goes on from there"
                if log is None:
                    how = "none is kept, since there was no log="
                print(f"stopped after {total - self.left} of {total} samples: {how}", file=sys.stderr)
                raise
            finally:
                with self.lock:  # after this, a thread that comes back writes nothing
                    self.finished.set()
        if self.error is not None:
            raise self.error

    def _tasks(self) -> Iterator[_Task]:
        """What is still to be asked; the answer is there already where another sample asked the same."""
        same: dict[bytes, list[int]] = {}
        if self.asked.repeats:
            for position, sample in enumerate(self.samples):
                key = hashlib.sha256(_json(_messages(sample.input))).digest()
                same.setdefault(key, []).append(position)
        for epoch in range(self.epochs):
            for group in same.values() if same else zip(range(len(self.samples))):
                answered = [self.file.answered[position * self.epochs + epoch] for position in group]
                todo = [position for position, there in zip(group, answered, strict=True) if not there]
                known = [position for position, there in zip(group, answered, strict=True) if there]
                if todo:
                    record = self.file.record(known[0] * self.epochs + epoch) if known else None
                    yield _Task(todo, epoch, record and record.answer)

    def _take(self) -> _Task | None:
        with self.lock:
            task = None if self.finished.is_set() else next(self.tasks, None)
            if task:
                task.since = time.monotonic()
                self.busy.add(task)
            return task

    def _work(self, task: _Task | None = None) -> None:
        """What a thread does: its first task, if given, and then those that are left."""
        try:
            while task := task or self._take():
                self._do(task)
                with self.lock:
                    self.busy.discard(task)
                if task.given_up:  # another thread has taken this one's place
                    return
                task = None
        except BaseException as error:  # the log could not be written
            with self.lock:
                self.error = self.error or error
                self.finished.set()

    def _do(self, task: _Task) -> None:
        if task.answer is None:
            answer = self._ask(task)
            if task.given_up:
                return
            task.answer = answer
        while task.positions:
            sample = replace(self.samples[task.positions[0]], id=self.ids[task.positions[0]])
            task.since = time.monotonic()
            for name, scorer in self.scorers.items():
                if name not in task.scores:
                    task.scores[name] = self._score(scorer, task.answer, sample)
            if not self._write(task, sample):
                return

    def _ask(self, task: _Task) -> Answer:
        input = self.samples[task.positions[0]].input
        start = time.perf_counter()
        try:
            answer = _answered(self.asked.ask(input, None if self.seed is None else self.seed + task.epoch))
        except BaseException as error:  # SystemExit and the like are the solver's too
            answer = Answer(None, error=_describe(error))
        return replace(answer, seconds=round(time.perf_counter() - start, 6))

    def _score(self, scorer: Scorer, answer: Answer, sample: Sample) -> Score:
        if answer.error:
            return Score(None, explanation="no answer")
        try:
            return _scored(scorer(answer, sample))
        except BaseException as error:
            return Score(None, explanation=_describe(error))

    def _write(self, task: _Task, sample: Sample) -> bool:
        """Write the record of a task's next sample, unless the task was given up or the run has ended."""
        line = _line(task.positions[0], Record(sample, task.epoch, task.answer, task.scores))
        with self.lock:
            if task.given_up or self.finished.is_set():
                return False
            position = task.positions.popleft()
            self.file.append(line, position * self.epochs + task.epoch, not task.answer.error)
            task.scores = {}
            self.failed += bool(task.answer.error)
            self.left -= 1
            if not self.left:
                self.finished.set()
            return True

    def _give_up_the_late(self) -> None:
        """Let a new thread go on where one hangs: it writes what is there, and takes the next tasks."""
        if self.timeout is None:
            return
        now = time.monotonic()
        with self.lock:
            late = [task for task in self.busy if now - task.since > self.timeout]
            for task in late:
                task.given_up = True
                self.busy.discard(task)
                instead = _Task(task.positions, task.epoch, task.answer)
                if task.answer is None:
                    instead.answer = Answer(
                        None, error=f"no answer within {self.timeout:g} s", seconds=self.timeout
                    )
                else:
                    missing = Score(None, explanation=f"no score within {self.timeout:g} s")
                    instead.scores = dict.fromkeys(self.scorers, missing) | task.scores
                self.busy.add(instead)
                threading.Thread(target=self._work, args=(instead,), daemon=True).start()


# --- the log ------------------------------------------------------------------------------------------------


@dataclass
class _File:
    """A log and where in it each record begins (-1: nowhere), by sample and then by epoch."""

    path: str
    header: dict[str, Any]
    offsets: array
    answered: bytearray
    end: int  # of the last whole line

    @contextmanager
    def appending(self) -> Iterator[None]:
        with open(self.path, "r+b") as self._out:
            self._out.truncate(self.end)  # a line that a kill has cut
            self._out.seek(self.end)
            yield

    def append(self, line: bytes, place: int, answered: bool) -> None:
        """Hand a line to the system, which keeps it even if this process is killed."""
        self._out.write(line)
        self._out.flush()
        self.offsets[place], self.answered[place] = self.end, answered
        self.end += len(line)

    def record(self, place: int) -> Record:
        with open(self.path, "rb") as file:
            file.seek(self.offsets[place])
            return _record(file.readline())


def _open(path: str, header: dict[str, Any]) -> _File:
    """The log to go on with, written anew where there is none. Raises ValueError if it is another's."""
    if not os.path.exists(path) or not os.path.getsize(path):
        new = Path(f"{path}.{os.getpid()}.tmp")
        try:
            new.write_bytes(_json(header) + b"\n")
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)
    file = _read(path)
    asked = ("solver", "samples", "scorers", "request", "epochs", "seed")
    differ = [
        f"{what}: {_short(what, file.header)} there, {_short(what, header)} now"
        for what in asked
        if file.header.get(what) != header[what]
    ]
    if differ:
        raise ValueError(
            f"{path} holds another evaluation ({'; '.join(differ)}): take another log, or move this one away"
        )
    return file


def _read(path: str) -> _File:
    """A log's header and where its records are; lines that are no whole record are passed over."""
    with open(path, "rb") as lines:
        first = lines.readline()
        try:
            header = json.loads(first)
            if header["format"] != _FORMAT:
                raise ValueError
            number, epochs = header["samples"]["number"], header["epochs"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path} is no log of companion.evaluate: its first line is {first[:60]!r}"
            ) from None
        file = _File(
            path, header, array("q", [-1]) * (number * epochs), bytearray(number * epochs), len(first)
        )
        offset = len(first)
        for line in lines:
            if line.endswith(b"\n"):
                with suppress(ValueError, KeyError, TypeError, IndexError):
                    found = json.loads(line)
                    place = found["position"] * epochs + found["epoch"]
                    file.offsets[place], file.answered[place] = offset, not found["answer"]["error"]
                file.end = offset + len(line)
            offset += len(line)
    return file


def _line(position: int, record: Record) -> bytes:
    sample, epoch, answer, scores = record
    if answer.messages == _transcript(sample, answer):
        answer = replace(answer, messages=[])
    return (
        _json(
            {
                "position": position,
                "id": sample.id,
                "epoch": epoch,
                "input": sample.input,
                "target": sample.target,
                "metadata": sample.metadata,
                "answer": vars(answer),
                "scores": {name: vars(score) for name, score in scores.items()},
            }
        )
        + b"\n"
    )


def _record(line: bytes) -> Record:
    found = json.loads(line)
    sample = Sample(found["input"], found["target"], found["id"], found["metadata"])
    answer = Answer(**found["answer"])
    if not answer.messages:
        answer = replace(answer, messages=_transcript(sample, answer))
    return Record(
        sample, found["epoch"], answer, {name: Score(**one) for name, one in found["scores"].items()}
    )


def _transcript(sample: Sample, answer: Answer) -> list[Message]:
    """The input and the answer, where the solver told no more."""
    messages = _messages(sample.input)
    if answer.text is not None:
        messages.append({"role": "assistant", "content": answer.text})
    return messages


def _json(value: Any) -> bytes:
    # Half a character, which a model can write, is kept as it is: json.loads reads it again.
    text = json.dumps(value, ensure_ascii=False, default=_plain)
    return text.encode("utf-8", "surrogatepass")


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _short(what: str, header: dict[str, Any]) -> str:
    value = header.get(what)
    if what == "samples":
        return f"{value['number']} with the hash {value['sha256'][:8]}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:100]}…"


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Keep other processes from the log: what two write at once is asked twice."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(f"{path}.lock", timeout=0):
            try:
                yield
            finally:
                _unlink(f"{path}.lock")
    except Timeout:
        raise RuntimeError(
            f"another process is writing to {path}: wait for it, or take another log"
        ) from None


def _unlink(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)


# --- the results --------------------------------------------------------------------------------------------


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
                    yield _record(file.readline())

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
                target = hash(_json(sample.target))
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
