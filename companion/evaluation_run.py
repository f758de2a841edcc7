"""The run of an evaluation: a solver made ready, and the threads that ask it, score and write.

A solver runs in this process: one that hangs is given up, but its thread cannot be ended.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import json
import math
import numbers
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from companion import backend
from companion.evaluation_log import Answer, Message, Record, Sample, Score, as_json, as_line, messages_of

Solver = Callable[..., Any]
Scorer = Callable[[Answer, Sample], Score | float | bool | None]

LONGEST = 1_000_000  # characters of an answer or a transcript that are kept
LONGEST_NOTE = 4_000  # of an error or an explanation
_RESERVED = {"model", "messages", "stream", "stream_options", "n"}
_POLL = 0.05  # seconds between two looks at the clock


@dataclass
class Asked:
    """A solver made ready: `ask(input, seed)`; `repeats` says that the same question has the same answer."""

    name: str
    described: dict[str, Any]
    ask: Callable[[Any, int | None], Any]
    connect: Callable[[], Any] = lambda: None
    repeats: bool = False


def prepare(solver: Any, timeout: float | None, request: dict[str, Any]) -> Asked:
    """Make a solver ready; the arguments are those of `evaluate`. Raises ValueError for what is no solver."""
    if taken := _RESERVED & request.keys():
        raise ValueError(f"{', '.join(sorted(taken))}: evaluate sets this itself, take it out of the request")
    wait = {} if timeout is None else {"timeout": timeout}
    if isinstance(solver, str):
        model = _Model(solver, request | wait)
        return Asked(solver, {"model": solver}, model, model.connect, repeats=True)
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
            *before, last = messages_of(input)
            if last["role"] != "user":
                raise ValueError(f"the last message of the input must be the user's, not {last['role']!r}")
            chat = _fresh(solver)
            chat.messages += before
            reply = chat.ask(last["content"], **request, **wait, **_seeded(seed))
            return replace(_answered(reply), messages=chat.messages)

        connect = (lambda: None) if solver.client else backend.client
        return Asked(f"Chat({solver.model})", described, ask, connect)
    if not callable(solver):
        raise ValueError(f"a solver is a model's name, a Chat or a function, not {solver!r}")
    name = getattr(solver, "__name__", type(solver).__name__)
    if request:
        raise ValueError(f"{', '.join(request)}: only models and Chats take request options, {name} does not")
    try:
        takes_seed = "seed" in inspect.signature(solver).parameters
    except (ValueError, TypeError):
        takes_seed = False
    described = _described(solver)
    if takes_seed:
        return Asked(name, described, lambda input, seed: solver(input, seed=seed))
    return Asked(name, described, lambda input, seed: solver(input))


def _described(solver: Callable[..., Any]) -> dict[str, Any]:
    """What a log knows a function by: its name, its source, and what `functools.partial` has filled in."""
    if isinstance(solver, functools.partial):
        given = {"args": solver.args, "keywords": solver.keywords}
        return _described(solver.func) | {"given": json.loads(as_json(given))}
    described = {"function": getattr(solver, "__name__", type(solver).__name__)}
    plain = inspect.isroutine(solver) or inspect.isclass(solver)
    with suppress(OSError, TypeError):  # its source is not known
        source = inspect.getsource(solver if plain else type(solver))
        described["source"] = hashlib.sha256(source.encode()).hexdigest()[:12]
    return described


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
            return create(model=self.name, messages=messages_of(input), **self.request, **_seeded(seed))
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
    if (messages or calls or usage) and len(as_json([messages, calls, usage])) > LONGEST:
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


class _Task:
    """A question and the samples that ask it, of which each leaves once it is written."""

    def __init__(self, positions: Iterable[int], epoch: int, answer: Answer | None = None):
        self.positions, self.epoch, self.answer = deque(positions), epoch, answer
        self.since = time.monotonic()
        self.scores: dict[str, Score] = {}  # of the sample that is being scored
        self.given_up = False


class Run:
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
        """Ask and score what the log does not hold yet. log: its name as the caller wrote it."""
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
                key = hashlib.sha256(as_json(messages_of(sample.input))).digest()
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
        line = as_line(task.positions[0], Record(sample, task.epoch, task.answer, task.scores))
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
