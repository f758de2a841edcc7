"""The log of an evaluation: what is kept of each sample, and the JSONL file it is kept in.

The file's first line says what was asked for, each other line is a `Record`, written as soon as it is there.
A line that a kill has cut is passed over, and written over. Nothing here asks or scores.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

Message = dict[str, Any]

FORMAT = "companion evaluation 1"


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


def messages_of(input: str | list[Message]) -> list[Message]:
    """A sample's input as messages."""
    return [{"role": "user", "content": input}] if isinstance(input, str) else list(input)


@dataclass
class Log:
    """A log and where in it each record begins (-1: nowhere), by sample and then by epoch."""

    path: str
    header: dict[str, Any]
    offsets: array
    answered: bytearray
    end: int  # of the last whole line

    @contextmanager
    def appending(self) -> Iterator[None]:
        """Inside, lines can be appended."""
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
        """The record at a place: position times epochs, plus epoch."""
        with open(self.path, "rb") as file:
            file.seek(self.offsets[place])
            return as_record(file.readline())


def resumed(path: str, header: dict[str, Any]) -> Log:
    """The log to go on with, written anew where there is none. Raises ValueError if it is another's."""
    if not os.path.exists(path) or not os.path.getsize(path):
        new = Path(f"{path}.{os.getpid()}.tmp")
        try:
            new.write_bytes(as_json(header) + b"\n")
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)
    file = read(path)
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


def read(path: str) -> Log:
    """A log's header and where its records are; lines that are no whole record are passed over."""
    with open(path, "rb") as lines:
        first = lines.readline()
        try:
            header = json.loads(first)
            if header["format"] != FORMAT:
                raise ValueError
            number, epochs = header["samples"]["number"], header["epochs"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path} is no log of companion.evaluate: its first line is {first[:60]!r}"
            ) from None
        file = Log(path, header, array("q", [-1]) * (number * epochs), bytearray(number * epochs), len(first))
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


def as_line(position: int, record: Record) -> bytes:
    """A record as its line, of the sample that stands at `position` among all."""
    sample, epoch, answer, scores = record
    if answer.messages == _transcript(sample, answer):
        answer = replace(answer, messages=[])
    return (
        as_json(
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


def as_record(line: bytes) -> Record:
    """The record that a line holds."""
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
    messages = messages_of(sample.input)
    if answer.text is not None:
        messages.append({"role": "assistant", "content": answer.text})
    return messages


def as_json(value: Any) -> bytes:
    """A value as JSON in UTF-8; what JSON has no form for is written as a text."""
    # Half a character, which a model can write, is kept as it is: json.loads reads it again.
    text = json.dumps(value, ensure_ascii=False, default=_plain)
    return text.encode("utf-8", "surrogatepass")


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)  # a set's own order changes from one Python process to the next
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _short(what: str, header: dict[str, Any]) -> str:
    value = header.get(what)
    if what == "samples":
        return f"{value['number']} with the hash {value['sha256'][:8]}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:100]}…"


@contextmanager
def locked(path: str) -> Iterator[None]:
    """Keep other processes from the log: what two write at once is asked twice."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(f"{path}.lock", timeout=0):
            try:
                yield
            finally:
                unlink(f"{path}.lock")
    except Timeout:
        raise RuntimeError(
            f"another process is writing to {path}: wait for it, or take another log"
        ) from None


def unlink(path: str) -> None:
    """Remove a file, if it can be."""
    with suppress(OSError):
        os.unlink(path)
