"""Function calling for models that only write text: how tools, calls and results are written, constrained and
read.

A call is written as <tool_call>{"name": …, "arguments": {…}}</tool_call>, the form of SmolLM2's larger
versions (arXiv:2502.02737) and of many open models; training writes its examples through `plain_messages`
too. With `tool_choice` "required" or a named function a grammar forces a call; with "auto" the model decides
by its first token, and once it has begun a call, the grammar sees it through. So a call that comes out always
parses.
"""

import json
import secrets
from typing import Any

from .wire import ApiError, Message, Tool

OPEN, CLOSE = "<tool_call>", "</tool_call>"
NAMED = ("properties", "$defs", "definitions")  # JSON schema's keywords that hold one schema for each name
LONGEST = 200  # characters of a string argument without a maxLength: a small model may never close its quotes


def plain_messages(
    messages: list[Message], tools: list[Tool], *, may_end_with_call: bool = False
) -> list[dict[str, str]]:
    """The conversation as plain texts with the roles system, user and assistant, tools and calls written out.

    may_end_with_call: whether calls that end the conversation may lack a result, as in an example to learn
    from. Raises ApiError for parts that are not text, for a tool result that answers no call, and for a call
    without one.
    """
    plain: list[dict[str, str]] = []
    if tools:
        plain.append({"role": "system", "content": _instructions(tools)})
    pending: set[str] = set()
    for place, message in enumerate(messages):
        param = f"messages[{place}]"
        text = _text(message, param)
        if message.role != "tool" and not message.tool_calls:
            _all_answered(pending)
        if message.role == "assistant":
            pending |= {call.id for call in message.tool_calls or []}
            text += "".join(
                _written(call.function.name, call.function.arguments) for call in message.tool_calls or []
            )
        elif message.role == "tool":
            if message.tool_call_id not in pending:
                raise ApiError(
                    f"Invalid parameter: {param} with role 'tool' must be a response to a preceding message "
                    f"with 'tool_calls' whose id is {message.tool_call_id!r}.",
                    param=f"{param}.tool_call_id",
                    code="invalid_value",
                )
            pending.remove(message.tool_call_id)
            text = f"<tool_response>{text}</tool_response>"
        role = {"developer": "system", "tool": "user"}.get(message.role, message.role)
        if role == "system" and plain and plain[-1]["role"] == "system":
            both = (text, plain[-1]["content"]) if place == 0 else (plain[-1]["content"], text)
            plain[-1]["content"] = "\n\n".join(both)
        elif message.role == "tool" and plain[-1]["role"] == "user":
            plain[-1]["content"] += "\n" + text
        else:
            plain.append({"role": role, "content": text})
    if not (may_end_with_call and messages[-1].role == "assistant"):
        _all_answered(pending)
    return plain


def _all_answered(pending: set[str]) -> None:
    if pending:
        raise ApiError(
            "An assistant message with 'tool_calls' must be followed by tool messages responding to each "
            f"'tool_call_id'. These had no response messages: {', '.join(sorted(pending))}.",
            param="messages",
            code="invalid_value",
        )


def _text(message: Message, param: str) -> str:
    if message.content is None:
        if message.role == "assistant" and message.tool_calls:
            return ""
        raise ApiError(
            f"Invalid value for '{param}.content': expected a string, got null.",
            param=f"{param}.content",
            code="invalid_type",
        )
    if isinstance(message.content, str):
        return message.content
    for number, part in enumerate(message.content):
        if part.type not in ("text", "input_text", "output_text") or part.text is None:
            raise ApiError(
                f"Invalid content type {part.type!r} in {param}: this model reads text only.",
                param=f"{param}.content[{number}].type",
                code="invalid_value",
            )
    return "\n".join(part.text for part in message.content)


def _instructions(tools: list[Tool]) -> str:
    listed = "\n".join(
        json.dumps(tool.function.model_dump(exclude_none=True, exclude={"strict"})) for tool in tools
    )
    return (
        f"You can call these functions:\n{listed}\n"
        f'To call one, answer with {OPEN}{{"name": ..., "arguments": {{...}}}}{CLOSE} and nothing else.'
    )


def _written(name: str, arguments: str) -> str:
    return f'{OPEN}{{"name": {json.dumps(name)}, "arguments": {arguments}}}{CLOSE}'


def call_grammar(tools: list[Tool], choice: Any) -> str | None:
    """The llguidance grammar that `tool_choice` asks for; None where the model may not call.

    choice: None (auto), "auto", "none", "required" or a named function, as in the API.
    """
    if not tools or choice == "none":
        return None
    if choice not in (None, "auto", "required"):
        named = [tool for tool in tools if tool.function.name == choice.function.name]
        if not named:
            message = f"Tool choice {choice.function.name!r} not found in 'tools' parameter."
            raise ApiError(message, param="tool_choice", code="invalid_value")
        tools = named
    start = "call" if choice not in (None, "auto") else "call | text\ntext: /[^<](.|\\n)*/ | /<[^t](.|\\n)*/"
    return f"%llguidance {{}}\nstart: {start}\ncall: " + "\n    | ".join(_call(tool) for tool in tools)


def _call(tool: Tool) -> str:
    # Each schema stands in a %json of its own, so that its "#/$defs/…" are found where it says.
    name = json.dumps(tool.function.name)
    schema = _bounded(_arguments(tool)) | {"x-guidance": {"whitespace_flexible": False}}
    begin, end = json.dumps(f'{OPEN}{{"name": {name}, "arguments": '), json.dumps(f"}}{CLOSE}")
    return f"{begin} %json {json.dumps(schema)} {end}"


def _arguments(tool: Tool) -> dict:
    schema = tool.function.parameters or {"type": "object", "properties": {}}
    if schema.get("type", "object") != "object":
        raise ApiError(
            f"Invalid schema for function {tool.function.name!r}: the parameters must be of type 'object', "
            f"got {schema['type']!r}.",
            param="tools",
            code="invalid_function_parameters",
        )
    if tool.function.strict:
        check_strict(schema, f"function {tool.function.name!r}", "tools")
    return {"type": "object", "additionalProperties": False, **schema}


def check_strict(schema: Any, owner: str, param: str, context: tuple = ()) -> None:
    """The rules of `strict`: every object closes itself and requires all its properties. Raises ApiError."""
    if isinstance(schema, list):
        for number, part in enumerate(schema):
            check_strict(part, owner, param, (*context, str(number)))
    if not isinstance(schema, dict):
        return
    properties = schema["properties"] if isinstance(schema.get("properties"), dict) else {}
    required = schema["required"] if isinstance(schema.get("required"), list) else []
    if schema.get("type") == "object" or properties:
        problem = None
        if schema.get("additionalProperties") is not False:
            problem = "'additionalProperties' is required to be supplied and to be false"
        elif missing := [key for key in properties if key not in required]:
            problem = f"'required' is required to include every key in properties. Missing {missing[0]!r}"
        if problem:
            raise ApiError(
                f"Invalid schema for {owner}: In context={context}, {problem}.",
                param=param,
                code="invalid_function_parameters" if param == "tools" else "invalid_json_schema",
            )
    for key, value in schema.items():
        # What these hold are names with a schema each, whatever the names are.
        for name, part in value.items() if key in NAMED and isinstance(value, dict) else ():
            check_strict(part, owner, param, (*context, key, name))
        if key not in ("enum", "const", "default", "examples", *NAMED):
            check_strict(value, owner, param, (*context, key))


def _bounded(schema: Any) -> Any:
    """The schema with a bound on every string and array that has none."""
    if isinstance(schema, list):
        return [_bounded(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    bounded = {
        key: {name: _bounded(part) for name, part in value.items()}
        if key in NAMED and isinstance(value, dict)
        else value
        if key in ("enum", "const", "default", "examples")
        else _bounded(value)
        for key, value in schema.items()
    }
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if "string" in kinds and not {"enum", "const", "pattern", "format", "maxLength"} & schema.keys():
        bounded["maxLength"] = LONGEST
    if "array" in kinds:
        bounded.setdefault("maxItems", 16)
    return bounded


def begins_call(text: str) -> bool:
    """Whether `text` is a call, or the beginning of one."""
    return text != "" and (OPEN.startswith(text) or text.startswith(OPEN))


def read_call(text: str) -> dict | None:
    """The tool call, in OpenAI's form, that `text` is; None where it is words or an unfinished call."""
    if not (text.startswith(OPEN) and text.endswith(CLOSE)):
        return None
    try:
        call = json.loads(text[len(OPEN) : -len(CLOSE)])
        function = {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
    except (ValueError, KeyError, TypeError):
        return None
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
