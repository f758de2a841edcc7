"""The format of training examples: OpenAI's chat JSONL, and every reason why a line of it cannot be used.

The rules are those of the `FineTuneChatRequestInput` schema of
https://platform.openai.com/docs/api-reference/fine-tuning. Both sides of the API check by them: `dataset`
before a file is sent, the endpoint before it trains.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

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
        wrong = [i for i, part in enumerate(content) if not _istext_of(part)]
        for i in wrong:
            kind = content[i].get("type") if isinstance(content[i], dict) else _type(content[i])
            wanted = '{"type": "text", "text": "..."}, since only text is read'
            yield "invalid_content", f"{place}.content[{i}] must be {wanted}, not {_shown(kind)}"
        if not wrong and not may_be_empty and not text_of({"content": content}).strip():
            yield "no_content", f"the content of {place} is empty"
    elif not isinstance(content, str):
        yield "invalid_content", f"the content of {place} must be a string, not {_type(content)}"
    elif not content.strip() and not may_be_empty:
        yield "no_content", f"the content of {place} is empty"


def _istext_of(part: Any) -> bool:
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


def text_of(message: Mapping[str, Any]) -> str:
    """What a message says, of several parts one below the other; empty where it says nothing."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
