"""What a check cell of an exercise calls: does the learner's function do what was asked, and where not?

    with Check("shout", points=2) as check:
        check.equal("shout('hello')", shout("hello"), "HELLO", look="the string's method upper()")

A wrong answer and an answer that raises are reported, not raised. All checks of a cell pass, or it earns
nothing: partial credit is by check cell.

What is shown here is for the learner and proves nothing, since the learner's own kernel says it. So the cell
also emits what the learner's code returned, under the MIME type `MIME`, and a grader outside compares that
with what the solution's code returned, by `difference`. Give `equal` and `record` what the code returned,
therefore, and not `True`: a verdict is easy to guess. No expected value is emitted.
"""

from __future__ import annotations

import hashlib
import html
import json
import linecache
import math
import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

MIME = "application/vnd.companion.result+json"
LONGEST_TEXT, LONGEST_LIST, MOST_VALUES, DEEPEST = 10_000, 1_000, 10_000, 40
_SHOWN = 300  # characters of a value, in what the learner reads
_SEED = os.environ.get("COMPANION_GRADING_SEED", "")  # now: a learner's code may change the environment later

Request = dict[str, Any]
Answer = str | dict[str, float]


class Check:
    """The checks of one cell, as a `with` block that ends by showing what passed.

    question: what the learner is told is being checked, usually the function's name.
    points: what the cell is worth; the cell's nbgrader metadata says the same number.
    """

    def __init__(self, question: str, points: int) -> None:
        self.question, self.points = question, points
        self.values: list[dict[str, Any]] = []
        self.findings: list[tuple[bool, list[str]]] = []  # passed, and the lines that say what
        self.error: str | None = None

    def record(self, what: str, got: Any, tolerance: float = 0.0) -> None:
        """Emit a value and say nothing about it: for inputs whose answer the learner should not see.

        tolerance: how far the numbers in it may be from the solution's, as an absolute difference.
        """
        self.values.append({"what": what, "value": clean(got), "tolerance": tolerance})

    def equal(self, what: str, got: Any, expected: Any, *, tolerance: float = 0.0, look: str = "") -> None:
        """Check that `got` is `expected`: the same as JSON, so that a tuple may be a list.

        what: what was asked, such as the call, in words that are unique in this cell.
        look: what to look at where the answer is wrong.
        """
        self.record(what, got, tolerance)
        got, expected = self.values[-1]["value"], clean(expected)
        found = difference(got, expected, tolerance)
        lines = [what]
        if found:
            lines += [f"expected: {show(expected)}", f"came: {show(got)}", f"difference: {found}"]
            lines += [f"look at: {look}"] if look else []
        self.findings.append((not found, lines))

    @property
    def passed(self) -> bool:
        return self.error is None and all(passed for passed, _ in self.findings)

    def __enter__(self) -> Check:
        return self

    def __exit__(self, kind, error, trace) -> bool:
        if error is not None:
            if not isinstance(error, (Exception, SystemExit)):
                return False  # the learner pressed stop
            self.error, lines = _describe(error, trace)
            self.findings.append((False, lines))
        from IPython.display import display

        display(self)
        return True

    def _headline(self) -> str:
        good = sum(passed for passed, _ in self.findings)
        points = f"{self.points if self.passed else 0} of {self.points} points"
        return f"{self.question}: {points}, {good} of {len(self.findings)} checks passed"

    def __repr__(self) -> str:
        text = [self._headline()]
        for passed, (what, *more) in self.findings:
            text += [f"{_mark(passed)}: {what}", *(f"    {line}" for line in more)]
        return "\n".join(text)

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, Any]:
        items = []
        for passed, (what, *more) in self.findings:
            below = "".join(f"<br>&emsp;{html.escape(line)}" for line in more)
            items.append(f"<li><strong>{_mark(passed)}</strong>: {html.escape(what)}{below}</li>")
        headline = f"<p><strong>{html.escape(self._headline())}</strong></p>"
        result = {"version": 1, "question": self.question, "passed": self.passed, "values": self.values}
        return {
            MIME: result | ({"error": self.error} if self.error else {}),
            "text/html": f'{headline}<ul style="list-style: none">{"".join(items)}</ul>',
            "text/plain": repr(self),
        }


def _mark(passed: bool) -> str:
    return "✓ passed" if passed else "✗ not yet"


def _describe(error: BaseException, trace) -> tuple[str, list[str]]:
    """The error in one line, and the lines for the learner: what was running, and where it stopped."""
    line = linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno).strip()
    frames = [trace.tb_frame]
    while trace := trace.tb_next:
        frames.append(trace.tb_frame)
    # Of the frames, the learner's own are those that share the check cell's namespace.
    where = [frame.f_code.co_name for frame in frames[1:] if frame.f_globals is frames[0].f_globals]
    try:
        message = next(iter(str(error).splitlines()), "")
    except Exception:
        message = "an error whose message cannot be read"
    summary = _short(f"{type(error).__name__}: {message}")
    lines = [f"stopped at: {line}" if line else "stopped by an error"]
    if isinstance(error, NotImplementedError):
        lines.append("look at: the answer cell still holds its placeholder; put your code there and run it")
    else:
        lines.append(f"error: {summary}" + (f" (in {where[-1]})" if where else ""))
        if isinstance(error, NameError) and not where:
            lines.append("look at: run the cells above this one first")
    return summary, lines


# Values


def clean(value: Any) -> Any:
    """A copy of `value` that is JSON and of limited size; never raises.

    Tuples become lists, numpy's values Python's, pydantic's objects dicts. Anything else, and what is too
    long or too deep, becomes a dict with its type in angle brackets, such as {"<float>": "nan"}; a text that
    is cut keeps the hash of the whole. Items after the first `LONGEST_LIST` are counted and not kept.
    """
    left = MOST_VALUES

    def visit(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        kind = f"<{type(value).__name__}>"
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return _text(value)
        if isinstance(value, int) and value.bit_length() <= 64:
            return int(value)
        if isinstance(value, float):
            # Twelve digits: those after them differ between processors, and none of them ever counts.
            return float(f"{value:.12g}") if math.isfinite(value) else {"<float>": str(float(value))}
        if depth == DEEPEST or left < 0:
            return {kind: "not kept: too deep, or too many values before it"}
        if hasattr(type(value), "model_dump"):
            value = value.model_dump(exclude_none=True)
        elif hasattr(type(value), "tolist") and getattr(value, "size", 1) <= MOST_VALUES:
            return visit(value.tolist(), depth + 1)
        if isinstance(value, dict):
            pairs = list(value.items())
            kept = {_key(key): visit(item, depth + 1) for key, item in pairs[:LONGEST_LIST]}
            return kept | _rest(len(pairs))
        if isinstance(value, (list, tuple)):
            kept = [visit(item, depth + 1) for item in value[:LONGEST_LIST]]
            return kept + ([_rest(len(value))] if len(value) > LONGEST_LIST else [])
        if isinstance(value, (set, frozenset)):
            return {kind: sorted((visit(item, depth + 1) for item in value), key=json.dumps)[:LONGEST_LIST]}
        return {kind: _text(re.sub(r" at 0x[0-9a-f]+", "", hex(value) if kind == "<int>" else repr(value)))}

    try:
        return visit(value, 0)
    except Exception as error:  # a learner's own __repr__, __len__ or __iter__ may do anything
        return {f"<{type(value).__name__}>": f"cannot be read: {type(error).__name__}"}


def _text(value: str) -> Any:
    value = "".join(value).encode("utf-8", "backslashreplace").decode()
    if len(value) <= LONGEST_TEXT:
        return value
    digest = hashlib.sha256(value.encode()).hexdigest()
    return {"<str>": value[:LONGEST_TEXT], "length": len(value), "sha256": digest}


def _key(key: Any) -> str:
    text = key if type(key) is str else f"<{type(key).__name__}> {key!r}"
    return text[:LONGEST_TEXT].encode("utf-8", "backslashreplace").decode()


def _rest(length: int) -> dict[str, str]:
    return {"<more>": f"{length - LONGEST_LIST} more, not kept"} if length > LONGEST_LIST else {}


def difference(got: Any, expected: Any, tolerance: float = 0.0, where: str = "") -> str:
    """The first difference between two values of `clean`, in words; empty where there is none.

    tolerance: the largest absolute difference of two numbers; rounding of the last digits never counts.
    """
    at = f" at {where}" if where else ""
    names = _kind(got), _kind(expected)
    if names[0] != names[1]:
        return f"{names[0]} instead of {names[1]}{at}"
    if isinstance(expected, dict):
        if missing := [key for key in expected if key not in got]:
            return f"{missing[0]!r} is missing{at}"
        if extra := [key for key in got if key not in expected]:
            return f"{_short(repr(extra[0]))} is not asked for{at}"
        pairs = [(f"{where}[{key!r}]", got[key], expected[key]) for key in expected]
    elif isinstance(expected, list):
        if len(got) != len(expected):
            return f"the length is {len(got)} instead of {len(expected)}{at}"
        pairs = [(f"{where}[{i}]", *pair) for i, pair in enumerate(zip(got, expected, strict=True))]
    elif got == expected or (names[1] == "a number" and math.isclose(got, expected, abs_tol=tolerance)):
        return ""
    else:
        return f"{show(got)} instead of {show(expected)}{at}"
    return next((found for name, *pair in pairs if (found := difference(*pair, tolerance, name))), "")


def _kind(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, dict) and (marked := re.fullmatch(r"<(\w+)>", next(iter(value), ""))):
        return f"a value of type {marked[1]}"
    kinds = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "a dict"}
    return next((name for kind, name in kinds.items() if isinstance(value, kind)), type(value).__name__)


def show(value: Any) -> str:
    """A value of `clean`, short enough to be read: numbers have six digits."""

    def rounded(value: Any) -> Any:
        if isinstance(value, list):
            return [rounded(item) for item in value]
        if isinstance(value, dict):
            return {key: rounded(item) for key, item in value.items()}
        return float(f"{value:.6g}") if isinstance(value, float) else value

    return _short(repr(rounded(value)))


def _short(text: str) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text):,} characters in all)"


def drawn(name: str) -> random.Random:
    """Where hidden inputs come from: `draw = drawn("check-shout")`, then `draw.randint(1, 9)` and so on.

    name: the check cell's grade_id, so that no cell's inputs depend on which cells ran before. Seeded with it
    and with the environment's COMPANION_GRADING_SEED, which a grader sets anew for each grading; without
    that, the inputs are always the same.
    """
    return random.Random(f"{_SEED}:{name}")


# The model


@contextmanager
def scripted(answer: Answer | Callable[[Request], Answer]) -> Iterator[list[Request]]:
    """Within the block no request leaves: chat and text completions of every OpenAI client are scripted.

    So a check is quick, needs no network, and tells what the learner's code sent and made of the reply.

    answer: a text for the model to say, or for text completions the next tokens with their log-probabilities,
        of which the request gets as many as it asks for; or a function of the request that returns either.

    Yields the list of requests, each a dict of the arguments as they were when the request was made.
    """
    from unittest.mock import patch

    from openai.resources.chat.completions import Completions as Chat
    from openai.resources.completions import Completions as Text
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

    requests: list[Request] = []

    def take(**request: Any) -> Answer:
        requests.append(clean(request))
        if request.get("stream"):
            raise ValueError("this check answers as a whole: leave `stream` out")
        return answer(requests[-1]) if callable(answer) else answer

    def chat(self, *, model: str, messages: Any, **rest: Any) -> ChatCompletion:
        found = take(model=model, messages=messages, **rest)
        if not isinstance(found, str):
            raise TypeError("this check scripts text completions: use client.completions.create")
        message = {"role": "assistant", "content": found}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        made = {"id": "chatcmpl-1", "object": "chat.completion", "created": 0, "model": model}
        return ChatCompletion.model_validate(made | {"choices": [choice]})

    def text(self, *, model: str, prompt: str, logprobs: int | None = None, **rest: Any) -> Completion:
        found = take(model=model, prompt=prompt, logprobs=logprobs, **rest)
        choice: dict[str, Any] = {"index": 0, "text": found, "finish_reason": "length", "logprobs": None}
        if isinstance(found, dict):
            best = max(found, key=found.__getitem__)
            kept = sorted(found, key=found.__getitem__)[-logprobs:] if logprobs else []
            choice["text"] = best
            if logprobs is not None:
                top = {token: value for token, value in found.items() if token in kept}
                values = {"tokens": [best], "token_logprobs": [found[best]], "top_logprobs": [top]}
                choice["logprobs"] = values | {"text_offset": [len(prompt)]}
        made = {"id": "cmpl-1", "object": "text_completion", "created": 0, "model": model}
        return Completion.model_validate(made | {"choices": [choice]})

    with patch.object(Chat, "create", chat), patch.object(Text, "create", text):
        yield requests
