"""Training examples: OpenAI's chat JSONL, checked, looked through, split, described and made.

An example is a dict as OpenAI's supervised fine-tuning takes it (the `FineTuneChatRequestInput` schema of
https://platform.openai.com/docs/api-reference/fine-tuning): {"messages": [...]}, and where tools are called
"tools" and "parallel_tool_calls". An assistant's message may carry "weight", 0 or 1: whether it is learnt.
Text only. This module trains nothing, and sends nothing but what `describe` lets its client count.
"""

from __future__ import annotations

import csv
import html
import json
import os
import random
import re
import reprlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pandas as pd
    from openai import OpenAI

Example = dict[str, Any]

LONGEST_LINE = 8 << 20  # bytes: far more than any context holds
NESTING = 64  # levels of JSON in an example
MOST_PROBLEMS = 1000  # that `validate` keeps

_KEYS = {"messages", "tools", "parallel_tool_calls"}
_MESSAGE_KEYS = {"role", "content", "name", "weight", "tool_calls", "tool_call_id"}
_ROLES = ("system", "developer", "user", "assistant", "tool")
_INSTEAD = {
    "functions": "write it as 'tools'",
    "function_call": "write it as 'tool_calls'",
    "prompt": "write prompt and completion as 'messages' with the roles user and assistant",
    "completion": "write prompt and completion as 'messages' with the roles user and assistant",
    "refusal": "write what the assistant says as its 'content'",
}
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_short = reprlib.Repr()
_short.maxstring = 80
_shown = _short.repr


@dataclass(frozen=True)
class Problem:
    """What is wrong with an example: its line, from 1 (0: the file as a whole), a code and a sentence."""

    line: int
    code: str
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}" if self.line else self.message


class DatasetError(ValueError):
    """Examples that cannot be used. Its message names `source` and the first of its `problems`."""

    def __init__(self, problems: Sequence[Problem], source: object = "the examples") -> None:
        self.problems, self.source = list(problems), source
        lines = [f"{source} cannot be used for training:", *map(str, self.problems[:5])]
        if len(self.problems) > 5:
            lines.append("companion.dataset.validate lists all problems")
        super().__init__("\n".join(lines))


# Files


def load(path: str | os.PathLike) -> list[Example]:
    """The examples of a JSONL file. Raises DatasetError where `validate` finds a problem."""
    if problems := validate(path):
        raise DatasetError(problems, path)
    return [json.loads(line) for line in Path(path).read_bytes().split(b"\n") if line]


def save(examples: Iterable[Example], path: str | os.PathLike) -> None:
    """Write examples as JSONL, replacing the file whole or not at all.

    Raises DatasetError, and writes nothing, where `validate` finds a problem.
    """
    examples = list(examples)
    if problems := validate(examples):
        raise DatasetError(problems)
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# Is it the format?


def validate(source: str | os.PathLike | Iterable[Example]) -> list[Problem]:
    """Every problem that keeps a file, or a list of examples, from being trained on; none: an empty list.

    Never raises on content. A file is read line by line, so that a large one takes no memory. Of more than
    1,000 problems the rest is counted in one last problem. An example of a list has the line that it would
    have in a file.

    Raises OSError for a path that cannot be read.
    """
    lines = _lines(source) if isinstance(source, str | os.PathLike) else _written(source)
    found = chain.from_iterable(_problems(line, raw) for line, raw in lines)
    kept = list(islice(found, MOST_PROBLEMS))
    more = sum(1 for _ in found)
    return [*kept, Problem(0, "more_problems", f"{more} more problems were found")] if more else kept


def _lines(path: str | os.PathLike) -> Iterator[tuple[int, bytes | Problem]]:
    """The lines of a file with their numbers, and what is wrong with the file as a whole."""
    number = 0
    with open(path, "rb") as file:
        while raw := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(raw) > LONGEST_LINE:
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(LONGEST_LINE)
                message = f"longer than {LONGEST_LINE >> 20} MiB: write one example a line"
                yield number, Problem(number, "line_too_long", message)
                continue
            if number == 1 and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                yield 0, Problem(0, "not_utf8", "the file is UTF-16: save it as UTF-8")
                return
            if number == 1 and raw.startswith(b"\xef\xbb\xbf"):
                message = "the file begins with a byte order mark: save it as UTF-8 without BOM"
                yield number, Problem(number, "bom", message)
                raw = raw[3:]
            yield number, raw
    if not number:
        yield 0, Problem(0, "empty_file", "there are no examples: write one JSON object a line")


def _written(examples: Iterable[Example]) -> Iterator[tuple[int, bytes | Problem]]:
    """Examples as the lines they would be in a file."""
    number = 0
    for number, example in enumerate(examples, start=1):
        try:
            yield number, json.dumps(example, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            yield number, Problem(number, "not_json", f"cannot be written as JSON: {error}")
    if not number:
        yield 0, Problem(0, "empty_file", "there are no examples")


def _problems(line: int, raw: bytes | Problem) -> Iterator[Problem]:
    if isinstance(raw, Problem):
        yield raw
        return
    try:
        example = _parse(raw)
        yield from (Problem(line, code, message) for code, message in _check_example(example))
    except _Refused as refused:
        yield Problem(line, *refused.args)


class _Refused(Exception):
    """Code and message of what keeps a line from being looked at any further."""


def _parse(raw: bytes) -> Any:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"not UTF-8 (byte {error.start + 1} is 0x{raw[error.start]:02x}): save the file as UTF-8"
        raise _Refused("not_utf8", message) from None
    if not text.strip():
        raise _Refused("blank_line", "a blank line: delete it")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_number, parse_float=_number)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        if text.count("{") + text.count("[") > NESTING and _depth(value) > NESTING:
            raise RecursionError
    except RecursionError:
        raise _Refused("too_deep", f"nested deeper than {NESTING} levels") from None
    except UnicodeEncodeError:
        raise _Refused("not_unicode", "holds half of a character (a lone \\ud800 to \\udfff)") from None
    except ValueError as error:
        at = f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        message = f"not JSON{at}: {getattr(error, 'msg', error)}"
        if text.lstrip().startswith("["):
            message += "; write one object a line, not an array of them"
        raise _Refused("not_json", message) from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise _Refused("duplicate_key", f"the key {_shown(twice)} stands twice in one object")
    return found


def _no_number(name: str) -> None:
    raise _Refused("not_json", f"not JSON: {name} is no number in JSON")


def _number(written: str) -> float:
    if (number := float(written)) in (float("inf"), float("-inf")):
        _no_number(written)
    return number


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return depth - 1


Found = Iterator[tuple[str, str]]  # codes and messages


def _check_example(example: Any) -> Found:
    if not isinstance(example, dict):
        yield "not_an_object", f"must be an object with 'messages', not {_type(example)}"
        return
    yield from _check_keys(example, _KEYS, "the example")
    if not isinstance(example.get("parallel_tool_calls", True), bool):
        yield "invalid_type", "'parallel_tool_calls' must be true or false"
    tools: set[str] = set()
    if "tools" in example:
        yield from _check_tools(example["tools"], tools)
    messages = example.get("messages")
    if "messages" not in example:
        yield "no_messages", "'messages' is missing"
    elif not isinstance(messages, list):
        yield "invalid_type", f"'messages' must be an array, not {_type(messages)}"
    elif not messages:
        yield "no_messages", "'messages' is empty"
    else:
        yield from _check_messages(messages, tools)


def _check_messages(messages: list, tools: set[str]) -> Found:
    open_calls: dict[str, str] = {}  # ids of calls without a result yet, and where they were made
    for i, message in enumerate(messages):
        place = f"messages[{i}]"
        if not isinstance(message, dict):
            yield "invalid_type", f"{place} must be an object, not {_type(message)}"
            continue
        role = message.get("role")
        yield from _check_keys(message, _MESSAGE_KEYS, place)
        if role == "function":
            yield "unknown_role", f"{place} has the old role 'function': use 'tool' with a 'tool_call_id'"
        elif role not in _ROLES:
            given = f"not {_shown(role)}" if "role" in message else "but it is missing"
            yield "unknown_role", f"the role of {place} must be one of {', '.join(_ROLES)}, {given}"
        if role != "tool" and open_calls:
            yield from _unanswered(open_calls)
        if "name" in message and not isinstance(message["name"], str):
            yield "invalid_type", f"{place}.name must be a string, not {_type(message['name'])}"
        if "weight" in message:
            yield from _check_weight(message, place)
        calls = message.get("tool_calls")
        if calls is not None and role != "assistant":
            yield "misplaced_tool_calls", f"{place}: only the assistant makes tool calls, not {_shown(role)}"
        elif calls is not None:
            yield from _check_calls(calls, f"{place}.tool_calls", tools, open_calls)
        if role == "tool":
            call = message.get("tool_call_id")
            if not isinstance(call, str) or open_calls.pop(call, None) is None:
                yield (
                    "unknown_tool_call",
                    f"{place}.tool_call_id must be the id of a call just before it, not {_shown(call)}",
                )
        elif "tool_call_id" in message:
            yield "misplaced_tool_call_id", f"{place}: only a message of the role tool has a 'tool_call_id'"
        may_be_empty = role == "tool" or (role == "assistant" and bool(calls))
        yield from _check_content(message.get("content"), place, may_be_empty)
    said = [message for message in messages if isinstance(message, dict)]
    answers = [message for message in said if message.get("role") == "assistant"]
    if not answers:
        yield "no_assistant", "there is no message of the assistant to learn from"
    elif said[-1] is not answers[-1]:
        yield "last_not_assistant", "the last message must be the assistant's: leave out what follows it"
    if answers and all(message.get("weight", 1) == 0 for message in answers):
        yield "nothing_to_learn", "every message of the assistant has the weight 0: nothing would be learnt"


def _check_keys(value: dict, known: set[str], place: str) -> Found:
    for key in sorted(value.keys() - known):
        yield "unknown_key", f"{place} has an unknown key {_shown(key)}: {_INSTEAD.get(key, 'leave it out')}"


def _check_weight(message: dict, place: str) -> Found:
    weight = message["weight"]
    if message.get("role") != "assistant":
        yield "misplaced_weight", f"{place}: only messages of the assistant have a weight"
    elif type(weight) is not int or weight not in (0, 1):
        yield "invalid_weight", f"{place}.weight must be 0 or 1, not {_shown(weight)}"


def _check_content(content: Any, place: str, may_be_empty: bool) -> Found:
    if content is None or content == "" or content == []:
        if not may_be_empty:
            state = "missing" if content is None else "empty"
            yield "no_content", f"the content of {place} is {state}"
    elif isinstance(content, list):
        wrong = [i for i, part in enumerate(content) if not _is_text(part)]
        for i in wrong:
            kind = content[i].get("type") if isinstance(content[i], dict) else _type(content[i])
            wanted = '{"type": "text", "text": "..."}, since only text is read'
            yield "invalid_content", f"{place}.content[{i}] must be {wanted}, not {_shown(kind)}"
        if not wrong and not may_be_empty and not _text({"content": content}).strip():
            yield "no_content", f"the content of {place} is empty"
    elif not isinstance(content, str):
        yield "invalid_content", f"the content of {place} must be a string, not {_type(content)}"
    elif not content.strip() and not may_be_empty:
        yield "no_content", f"the content of {place} is empty"


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _check_tools(tools: Any, names: set[str]) -> Found:
    if not isinstance(tools, list) or not tools:
        yield "invalid_tools", "'tools' must be an array with a tool in it; leave it out where there is none"
        return
    for i, tool in enumerate(tools):
        place = f"tools[{i}]"
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict):
            yield "invalid_tools", f'{place} must be {{"type": "function", "function": {{"name": ...}}}}'
            continue
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            yield (
                "invalid_tools",
                f"{place}.function.name must be 1 to 64 letters, digits, _ or -, not {_shown(name)}",
            )
        elif name in names:
            yield "invalid_tools", f"two tools are named {_shown(name)}: rename one"
        else:
            names.add(name)
        if not isinstance(function.get("description", ""), str):
            yield "invalid_tools", f"{place}.function.description must be a string"
        if not isinstance(function.get("parameters", {}), dict):
            yield "invalid_tools", f"{place}.function.parameters must be a JSON schema of an object"


def _check_calls(calls: Any, place: str, tools: set[str], open_calls: dict[str, str]) -> Found:
    if not isinstance(calls, list) or not calls:
        yield "invalid_tool_call", f"{place} must be an array with at least one call"
        return
    for i, call in enumerate(calls):
        here = f"{place}[{i}]"
        function = call.get("function") if isinstance(call, dict) and call.get("type") == "function" else None
        if not isinstance(function, dict):
            wanted = '{"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}'
            yield "invalid_tool_call", f"{here} must be {wanted}"
            continue
        if not isinstance(call.get("id"), str) or not call["id"]:
            yield "invalid_tool_call", f"{here}.id must be a string with something in it"
        elif call["id"] in open_calls:
            yield "invalid_tool_call", f"{here}.id: two calls have the id {_shown(call['id'])}"
        else:
            open_calls[call["id"]] = here
        name, arguments = function.get("name"), function.get("arguments")
        if not isinstance(name, str):
            yield "invalid_tool_call", f"{here}.function.name must be a string, not {_type(name)}"
        elif name not in tools:
            yield "undefined_tool", f"{here} calls {_shown(name)}, which is not in the example's 'tools'"
        if not isinstance(arguments, str):
            fix = "write the object as a JSON string" if isinstance(arguments, dict) else "write JSON"
            yield "invalid_arguments", f"{here}.function.arguments is {_type(arguments)}: {fix}"
            continue
        try:
            if isinstance(_parse(arguments.encode()), dict):
                continue
            reason = "is JSON, but no object"
        except _Refused as refused:
            reason = f"is {refused.args[1]}"
        yield "invalid_arguments", f"{here}.function.arguments must be the JSON of an object; it {reason}"


def _unanswered(open_calls: dict[str, str]) -> Found:
    for call, place in open_calls.items():
        yield (
            "unanswered_tool_call",
            f"{place} ({_shown(call)}) has no message of the role tool as its result",
        )
    open_calls.clear()


def _type(value: Any) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "an array"}
    return names.get(type(value), "an object" if isinstance(value, dict) else "null")


# Is it good?

_PERSONAL = {  # code: (what it is, in words; where it may stand). Rather miss one than cry wolf.
    "email_address": ("e-mail address", re.compile(r"\b[\w.+-]+@(?:[\w-]+\.)+[A-Za-z]{2,}\b")),
    "card_number": (
        "card number",
        re.compile(
            r"(?<![\w-])(?:[3-6]\d{3}([ -]?)\d{4}\1\d{4}\1\d{1,7}|3[47]\d\d([ -]?)\d{6}\2\d{5})(?![\w-])"
        ),
    ),
    "iban": ("IBAN", re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")),
    "phone_number": (
        "phone number",
        re.compile(
            r"(?<![\w.-])(?:\+\d{1,3}(?:[ -]?\(0\))?(?:[ -]?\d{2,5}){2,4}"  # international
            r"|07\d{3}[ -]?\d{3}[ -]?\d{3}|\(?0[12]\d{2,3}\)?[ -]\d{3}[ -]?\d{3,4})(?![\w-])"  # British
        ),
    ),
    "postcode": (
        "British postcode",
        re.compile(r"\b(?:[A-PR-UWYZ][A-HK-Y]?\d[\dA-HJKMNPR-Y]?) \d[ABD-HJLNP-UW-Z]{2}\b"),
    ),
}


def review(examples: Sequence[Example]) -> list[Problem]:
    """What a person should look at before training: nothing here keeps examples from being used.

    - Personal data: e-mail addresses, card numbers (Luhn's check), IBANs (ISO 7064's), phone numbers and
      British postcodes, found by their form. Names and addresses are not found.
    - "duplicate": the same messages as an earlier example. "near_duplicate": what the user says has a cosine
      of 0.9 or more with an earlier example's, by its three-letter pieces. "conflicting_answers": the
      same conversation as in an earlier example, but another last answer.
    - "few_examples": fewer than 10, which fine-tuning jobs refuse.

    Codes of personal data are email_address, card_number, iban, phone_number and postcode.
    """
    found = [
        Problem(line, code, message)
        for line, example in enumerate(examples, start=1)
        for code, message in _personal_data(example)
    ]
    same: dict[str, int] = {}
    asked: dict[str, int] = {}
    told: set[int] = set()
    for line, example in enumerate(examples, start=1):
        messages = [{**message, "weight": None} for message in example["messages"]]
        first = same.setdefault(_words(json.dumps(messages, sort_keys=True)), line)
        before = asked.setdefault(
            _words(json.dumps([messages[:-1], example.get("tools")], sort_keys=True)), line
        )
        if first != line:
            found.append(Problem(line, "duplicate", f"the same messages as line {first}: leave one out"))
            told.add(line)
        elif before != line:
            message = f"the same question as line {before}, but another answer: decide for one"
            found.append(Problem(line, "conflicting_answers", message))
            told.add(line)
    nearest: dict[int, int] = {}
    for i, j in _twins([_question(example) for example in examples]):
        nearest[j + 1] = min(i + 1, nearest.get(j + 1, i + 1))
    for line, first in nearest.items():
        if line not in told:
            found.append(Problem(line, "near_duplicate", f"says nearly the same as line {first}"))
    if 0 < len(examples) < 10:
        message = f"{len(examples)} examples: a job takes 10 or more, and 50 are a good start"
        found.append(Problem(0, "few_examples", message))
    return sorted(found, key=lambda problem: problem.line)


def _personal_data(example: Example) -> Found:
    text = "\n".join(_said(message) for message in example["messages"])
    for code, (name, pattern) in _PERSONAL.items():
        hits = (match[0] for match in pattern.finditer(text))
        if code == "card_number":
            hits = filter(_is_card, hits)
        elif code == "iban":
            hits = filter(None, map(_iban_in, hits))
        elif code == "phone_number":
            hits = (hit for hit in hits if 9 <= sum(map(str.isdigit, hit)) <= 15)
        if hits := list(dict.fromkeys(hits)):
            shown = ", ".join(f"{hit[:2]}…{hit[-1]}" for hit in hits[:3])
            some = f"a {name}" if len(hits) == 1 else f"{len(hits)} different {name}s"
            some = some.replace("a e-", "an e-").replace("a IBAN", "an IBAN").replace("addresss", "addresses")
            yield code, f"holds {some} ({shown}): replace it unless it is invented"


def _is_card(written: str) -> bool:
    digits = [int(c) for c in written if c.isdigit()]
    doubled = sum(sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
    return len(digits) >= 13 and len(set(digits)) > 1 and (sum(digits[-1::-2]) + doubled) % 10 == 0


def _iban_in(written: str) -> str | None:
    """The IBAN that a text begins with: words in capitals may have been caught at its end."""
    while len(iban := written.replace(" ", "")) >= 15:
        if int("".join(str(int(c, 36)) for c in iban[4:] + iban[:4])) % 97 == 1:
            return written
        written = written.rpartition(" ")[0]
    return None


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _said(message: Mapping[str, Any]) -> str:
    calls = (call["function"]["arguments"] for call in message.get("tool_calls") or ())
    return "\n".join([_text(message), *calls])


def _question(example: Example) -> str:
    """What the user says in it; where no user does, what is said at all but for instructions."""
    messages = example["messages"]
    asked = [_text(message) for message in messages if message["role"] == "user"]
    return "\n".join(asked or [_said(m) for m in messages if m["role"] not in ("system", "developer")])


def _twins(texts: Sequence[str], least: float = 0.9) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of texts of the same words or whose three-letter pieces have a cosine of `least`.

    A piece that stands in a text n times weighs 1 + log n. A wrong letter in a short question keeps 0.9;
    another question on the same matter has 0.5 to 0.8. (Rarer pieces are given no more weight, as TF-IDF
    would: that makes a typo the most telling part of a text.) Of texts of the same words, each is paired with
    the first only.
    """
    import numpy as np
    from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
    from sklearn.random_projection import SparseRandomProjection

    first: dict[str, int] = {}
    pairs = [(i, j) for j, text in enumerate(texts) if (i := first.setdefault(_words(text), j)) != j]
    places = list(first.values())
    if len(places) < 2:
        return pairs
    counts = CountVectorizer(analyzer="char_wb", ngram_range=(3, 3), dtype=np.float32).fit_transform(first)
    if len(places) >= 20:  # what nearly all say, such as an instruction, makes none of them alike
        shares = np.bincount(counts.indices, minlength=counts.shape[1]) / len(places)
        counts = counts[:, shares <= 0.9]
    vectors = TfidfTransformer(use_idf=False, sublinear_tf=True).fit_transform(counts)
    # Candidates by a projection to a few dimensions, whose cosines are off by 0.01 near 0.9; then exactly.
    if vectors.shape[1] > 256:
        rough = SparseRandomProjection(256, dense_output=True, random_state=0).fit_transform(vectors)
        rough /= np.maximum(np.linalg.norm(rough, axis=1, keepdims=True), 1e-12)
    else:
        rough = vectors.toarray()
    for start in range(0, len(places), 1000):
        near = rough[start : start + 1000] @ rough[start:].T >= least - 0.06
        for i, j in np.argwhere(near) + start:
            if i < j and vectors[i].multiply(vectors[j]).sum() >= least:
                pairs.append((places[i], places[j]))
    return pairs


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


# Parts


class Parts(NamedTuple):
    """The examples to train on, to watch the training with, and to judge the result by."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


def split(
    examples: Sequence[Example],
    validation: float = 0.15,
    test: float = 0.0,
    *,
    stratify: Callable[[Example], Any] | Sequence[Any] | None = None,
    seed: int = 0,
) -> Parts:
    """Part examples into train, validation and test; each keeps their order.

    Examples whose users say the same or nearly the same (see `review`) stay on one side, so that no part
    gives another's answers away.

    Args:
        examples: as `load` gives them.
        validation: the share of examples, from 0 to 1, to watch the training with.
        test: the share to judge the result by.
        stratify: a label for each example, or a function that gives it: parts get the same share of each.
        seed: which of the many such splits.

    Raises:
        ValueError: shares below 0 or that leave nothing to train on, or not one label for each example.
    """
    shares = (1 - validation - test, validation, test)
    if min(validation, test) < 0 or shares[0] <= 0:
        raise ValueError(
            f"validation={validation} and test={test} must be shares that leave some to train on"
        )
    labels = [stratify(example) for example in examples] if callable(stratify) else stratify
    labels = [None] * len(examples) if labels is None else list(labels)
    if len(labels) != len(examples):
        raise ValueError(f"stratify has {len(labels)} labels for {len(examples)} examples")
    groups = _groups(len(examples), _twins([_question(example) for example in examples]))
    random.Random(seed).shuffle(groups)
    groups.sort(key=lambda group: str(labels[group[0]]))
    # Dealt out in turn to the part that lags most behind its share: so shares hold for each run of a label.
    parts: tuple[list[int], ...] = ([], [], [])
    dealt = 0
    for group in groups:
        dealt += len(group)
        behind = [
            share * dealt - len(part) if share else -1 for share, part in zip(shares, parts, strict=True)
        ]
        parts[behind.index(max(behind))].extend(group)
    return Parts(*([examples[i] for i in sorted(part)] for part in parts))


def _groups(size: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Numbers below `size`, those joined by pairs together."""
    leaders = list(range(size))

    def leader(i: int) -> int:
        while leaders[i] != i:
            leaders[i] = i = leaders[leaders[i]]
        return i

    for i, j in pairs:
        leaders[leader(j)] = leader(i)
    groups = defaultdict(list)
    for i in range(size):
        groups[leader(i)].append(i)
    return list(groups.values())


# What is in it, and what would it take?


@dataclass(frozen=True)
class Description:
    """What `describe` found. None stands for what was not asked for or cannot be said.

    `roles` counts messages, `turns` the user's messages in each example, `tokens` the tokens of each example,
    `too_long` the lines of those longer than `context`; `training_tokens` are those of all epochs, `minutes`
    an estimate, `cost` in the currency of the price.
    """

    examples: int
    roles: dict[str, int]
    turns: tuple[int, ...] = field(repr=False)
    n_epochs: int
    context: int
    tokens: tuple[int, ...] | None = field(default=None, repr=False)
    minutes: float | None = None
    price_per_million: float | None = None

    @property
    def too_long(self) -> list[int] | None:
        """The lines of the examples that have more tokens than the context."""
        return None if self.tokens is None else [i for i, n in enumerate(self.tokens, 1) if n > self.context]

    @property
    def training_tokens(self) -> int | None:
        """The tokens of all epochs."""
        return None if self.tokens is None else self.n_epochs * sum(self.tokens)

    @property
    def cost(self) -> float | None:
        """What training costs at the price, in its currency."""
        if self.training_tokens is None or self.price_per_million is None:
            return None
        return self.training_tokens * self.price_per_million / 1e6

    def __str__(self) -> str:
        return "\n".join(f"{name}: {value}" for name, value in self._rows())

    def _repr_pretty_(self, printer, cycle) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        left = 'style="text-align:left"'
        rows = (
            f'<tr><th scope="row" {left}>{html.escape(name)}</th><td {left}>{html.escape(value)}</td></tr>'
            for name, value in self._rows()
        )
        return f"<table><caption>Training examples</caption><tbody>{''.join(rows)}</tbody></table>"

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "examples", f"{self.examples:,}"
        yield "messages", ", ".join(f"{n:,} {role}" for role, n in self.roles.items())
        yield "user turns in an example", _spread(self.turns)
        if self.tokens is not None:
            yield "tokens in an example", _spread(self.tokens)
            lines = ", ".join(map(str, self.too_long[:10])) + (", …" if len(self.too_long) > 10 else "")
            yield (
                f"longer than {self.context:,} tokens",
                f"{len(self.too_long)} (lines {lines})" if lines else "0",
            )
            epochs = "1 epoch" if self.n_epochs == 1 else f"{self.n_epochs} epochs"
            yield f"training tokens in {epochs}", f"{self.training_tokens:,}"
        if self.minutes is not None:
            yield "minutes of training, about", f"{self.minutes:.1f}"
        if self.cost is not None:
            yield f"cost at {self.price_per_million:g} a million tokens", f"{self.cost:.2f}"


def describe(
    examples: Sequence[Example],
    client: OpenAI | None = None,
    model: str | None = None,
    *,
    n_epochs: int = 3,
    price_per_million: float | None = None,
    context: int = 2048,
) -> Description:
    """Say what is in a set of examples, and what training on it would take.

    Tokens are the model's own, counted by the endpoint (POST /v1/responses/input_tokens), a few more or less
    than in training, where the template differs by an example's end. Minutes are an estimate. They come from
    the speed of the endpoint's last job that succeeded, its waiting included. Where there is none, they
    assume 0.5 GFLOP a token, as LoRA on the course's model takes, at 35 % of the speed at which this
    machine multiplies matrices (numpy, float32).

    Args:
        examples: as `load` gives them.
        client: an `openai.OpenAI`; without one nothing that needs tokens is said.
        model: whose tokens; needed with a client.
        n_epochs: how often each example will be seen.
        price_per_million: of a million training tokens on a hosted service.
        context: the most tokens that an example may have.

    Raises:
        ValueError: a client without a model.
        openai.OpenAIError: what the endpoint refused.
    """
    if client and not model:
        raise ValueError("model is missing: whose tokens should be counted?")
    roles = Counter(message["role"] for example in examples for message in example["messages"])
    turns = tuple(sum(message["role"] == "user" for message in e["messages"]) for e in examples)
    tokens = minutes = None
    if client:
        with ThreadPoolExecutor(8) as pool:
            tokens = tuple(pool.map(lambda example: _count(example, client, model), examples))
        minutes = n_epochs * sum(tokens) / _tokens_per_second(client) / 60
    return Description(
        len(examples), dict(roles), turns, n_epochs, context, tokens, minutes, price_per_million
    )


def _spread(values: Sequence[int]) -> str:
    ordered = sorted(values) or [0]
    if ordered[0] == ordered[-1]:
        return f"{ordered[0]:,}"
    return f"{ordered[0]:,} to {ordered[-1]:,}, median {ordered[len(ordered) // 2]:,}"


def _count(example: Example, client: OpenAI, model: str) -> int:
    items: list[dict[str, Any]] = []
    for message in example["messages"]:
        text, calls = _text(message), message.get("tool_calls") or []
        if message["role"] == "tool":
            answered = {"type": "function_call_output", "call_id": message["tool_call_id"], "output": text}
            items.append(answered)
        elif text:
            items.append({"role": message["role"], "content": text})
        items += [{"type": "function_call", "call_id": call["id"], **call["function"]} for call in calls]
    # A conversation that ends with calls is an example, but no request: it wants their results.
    for call in example["messages"][-1].get("tool_calls") or []:
        items.append({"type": "function_call_output", "call_id": call["id"], "output": ""})
    tools = [{"type": "function", **tool["function"]} for tool in example.get("tools", [])]
    extra = {"tools": tools} if tools else {}
    return client.responses.input_tokens.count(model=model, input=items, **extra).input_tokens


def _tokens_per_second(client: OpenAI) -> float:
    import numpy as np
    from openai import NotFoundError

    try:
        for job in client.fine_tuning.jobs.list():
            if job.status == "succeeded" and job.trained_tokens and job.finished_at > job.created_at:
                return job.trained_tokens / (job.finished_at - job.created_at)
    except NotFoundError:  # a server without fine-tuning
        pass
    matrix = np.ones((1024, 1024), dtype=np.float32)
    times = []
    for _ in range(4):
        begun = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - begun)
    return 0.35 * 2 * 1024**3 / min(times) / 5e8


# From a company's data


def from_table(
    frame: pd.DataFrame, text: str, label: str | Sequence[str], *, system: str | None = None
) -> list[Example]:
    """An example for each row: the user says the text, the assistant answers with the label.

    Args:
        frame: any table.
        text: the column of what the user says.
        label: the column of the answer; or several, for an answer in JSON with their names, in their order,
            without spaces and with null for what is missing.
        system: instructions that stand before each, the same that the tuned model is then asked with.

    Raises:
        ValueError: a column that is not there, or a text or a single label that is missing in some row.
    """
    columns = [label] if isinstance(label, str) else list(label)
    if absent := [column for column in (text, *columns) if column not in frame]:
        raise ValueError(f"there is no column {absent[0]!r}: the table has {', '.join(map(str, frame))}")
    examples = []
    for row, (said, *values) in enumerate(zip(frame[text], *(frame[c] for c in columns), strict=True)):
        values = [_plain(value) for value in values]
        answer = _compact(dict(zip(columns, values, strict=True)))
        if isinstance(label, str):
            answer = "" if values[0] is None else str(values[0]).strip()
        for column, value in ((text, _plain(said)), (columns[0], answer)):
            if value is None or not str(value).strip():
                raise ValueError(
                    f"row {row} (counted from 0) has nothing in the column {column!r}: drop it first"
                )
        examples.append(_example([("user", str(said)), ("assistant", answer)], system))
    return examples


def from_csv(
    path: str | os.PathLike, text: str, label: str | Sequence[str], *, system: str | None = None
) -> list[Example]:
    """An example for each row of a CSV file, as `from_table` makes them of a table's.

    path: a file in UTF-8 with a header, its columns parted by commas, semicolons or tabs. All values are
    taken as texts, a label like "None" or "007" too. text, label and system are those of `from_table`, which
    says what is raised; ValueError, too, for a file that is no such table, OSError for one that is not there.
    """
    import pandas as pd

    wanted = {text, label} if isinstance(label, str) else {text, *label}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            separator = max(
                ",;\t", key=lambda one: len(wanted & set(next(csv.reader([first], delimiter=one), [])))
            )
            file.seek(0)
            rows = csv.reader(file, delimiter=separator)
            header = next(rows, [])
            table = []
            for row in filter(None, rows):
                if len(row) != len(header):
                    raise ValueError(
                        f"{path}, line {rows.line_num}: {len(row)} values in {len(header)} columns; "
                        f"a text that holds {separator!r} must stand in quotation marks"
                    )
                table.append([value or None for value in row])
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}") from None
    if not table:
        raise ValueError(f"{path} is empty: a header and a row for each example are needed")
    return from_table(pd.DataFrame(table, columns=header), text, label, system=system)


def from_tickets(frame: pd.DataFrame, *, system: str | None = None) -> list[Example]:
    """Triage of Fernway's tickets: {"intent":…,"urgency":…,"order_id":… or null} to subject and text.

    frame: as `companion.shop.tickets` gives it, or with the columns subject, text, intent, urgency and slots.
    system: as in `from_table`.
    """
    letters = frame["subject"].fillna("") + "\n\n" + frame["text"]
    orders = [slots.get("order_id") for slots in frame["slots"]]
    told = frame[["intent", "urgency"]].assign(text=letters.str.strip(), order_id=orders)
    return from_table(told, "text", ["intent", "urgency", "order_id"], system=system)


def from_dialogues(dialogues: Iterable[Mapping[str, Any]], *, system: str | None = None) -> list[Example]:
    """An example for each conversation, all turns of the assistant learnt.

    dialogues: records with "messages", each with role and content, as `companion.shop.dialogues` gives them.
    What follows the assistant's last turn is left out. system: as in `from_table`.
    """
    examples = []
    for dialogue in dialogues:
        said = [(message["role"], message["content"]) for message in dialogue["messages"]]
        while said and said[-1][0] != "assistant":
            said.pop()
        examples.append(_example(said, system))
    return examples


def _example(said: list[tuple[str, str]], system: str | None) -> Example:
    said = ([("system", system)] if system else []) + said
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def _plain(value: Any) -> Any:
    """A table's value as JSON has it; None where it is missing."""
    import pandas as pd

    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, list | dict) and pd.isna(value):
        return None
    return value if isinstance(value, str | int | float | list | dict) else str(value)


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
