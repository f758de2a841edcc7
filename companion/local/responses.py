"""The Responses API, on top of chat completions: items in, items out.

Each request becomes a chat request; its answer becomes a message or a function call item. The last 256 stored
responses are kept in memory, so that `previous_response_id` continues a conversation while the endpoint runs.
Built-in tools, background mode and reasoning are not offered.
"""

import json
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from .wire import ApiError, ChatRequest, ResponsesRequest, parse

KEPT = 256
NEEDED = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
}


class Conversations:
    """What earlier responses said, by their id; the oldest are forgotten."""

    def __init__(self) -> None:
        self._messages: OrderedDict[str, list[dict]] = OrderedDict()

    def get(self, response_id: str) -> list[dict]:
        try:
            return self._messages[response_id]
        except KeyError:
            raise ApiError(
                f"Previous response with id {response_id!r} not found.",
                param="previous_response_id",
                code="previous_response_not_found",
            ) from None

    def keep(self, response: dict, request: ResponsesRequest, messages: list[dict]) -> None:
        """Remember a finished response, unless it said `store=False`. Instructions are not carried over."""
        if request.store is False:
            return
        self._messages[response["id"]] = messages + _as_messages(response["output"])
        while len(self._messages) > KEPT:
            self._messages.popitem(last=False)


def chat_request(request: ResponsesRequest, conversations: Conversations) -> tuple[ChatRequest, list[dict]]:
    """The chat request that answers a Responses request, and its messages without the instructions."""
    messages = conversations.get(request.previous_response_id) if request.previous_response_id else []
    if isinstance(request.input, str):
        messages = [*messages, {"role": "user", "content": request.input}]
    else:
        messages = messages + _as_messages([item.model_dump() for item in request.input])
    instructions = [{"role": "system", "content": request.instructions}] if request.instructions else []
    body: dict[str, Any] = {"model": request.model, "messages": instructions + messages}
    for name, value in (
        ("temperature", request.temperature),
        ("top_p", request.top_p),
        ("max_completion_tokens", request.max_output_tokens),
        ("stream", request.stream),
        ("seed", request.seed),
    ):
        if value is not None:
            body[name] = value
    if request.tools:
        body["tools"] = [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in request.tools
        ]
    if request.tool_choice is not None:
        choice = request.tool_choice
        body["tool_choice"] = (
            choice if isinstance(choice, str) else {"type": "function", "function": {"name": choice.name}}
        )
    if request.text and request.text.format:
        body["response_format"] = _response_format(request.text.format)
    if request.stream:
        body["stream_options"] = {"include_usage": True}
    with in_own_terms(request, messages):
        return parse(ChatRequest, body), messages


@contextmanager
def in_own_terms(request: ResponsesRequest, messages: list[dict]) -> Iterator[None]:
    """Errors about the chat request, said of the Responses request that it was made from."""
    try:
        yield
    except ApiError as error:
        said = error.body["error"]
        if not said["param"]:
            raise
        items = len(request.input) if isinstance(request.input, list) else 1
        before = len(messages) - items + bool(request.instructions)

        def own(text: str) -> str:
            text = re.sub(r"messages\[(\d+)\]", lambda found: f"input[{int(found[1]) - before}]", text)
            text = re.sub(r"response_format(\.json_schema)?", "text.format", text)
            return text.replace("tool_call_id", "call_id").replace("messages", "input")

        raise ApiError(
            own(str(error)), status=error.status, param=own(said["param"]), code=said["code"]
        ) from None


def _response_format(wanted) -> dict:
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    for name, value in (("name", wanted.name), ("schema", wanted.schema_)):
        if value is None:
            param = f"text.format.{name}"
            raise ApiError(
                f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
            )
    schema = {"name": wanted.name, "schema": wanted.schema_, "strict": wanted.strict}
    return {"type": "json_schema", "json_schema": schema}


def _as_messages(items: list[dict]) -> list[dict]:
    """Input or output items as chat messages."""
    messages: list[dict] = []
    for number, item in enumerate(items):
        kind = item.get("type", "message")
        for name in NEEDED[kind]:
            if item.get(name) is None:
                param = f"input[{number}].{name}"
                raise ApiError(
                    f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
                )
        if kind == "message":
            messages.append({"role": item["role"], "content": item["content"]})
        elif kind == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        else:
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
    return messages


def response(request: ResponsesRequest, completion: dict) -> dict:
    """The Response object that a finished chat completion amounts to."""
    choice, usage = completion["choices"][0], completion["usage"]
    message = choice["message"]
    complete = choice["finish_reason"] != "length"
    status = "completed" if complete else "incomplete"
    if calls := message.get("tool_calls"):
        output = [_call_item(call, status) for call in calls]
    else:
        output = [_message_item(_new("msg"), message["content"] or "", status)]
    return _frame(request, _new("resp"), completion["created"], status) | {
        "incomplete_details": None if complete else {"reason": "max_output_tokens"},
        "output": output,
        "usage": _usage(usage),
    }


async def events(
    request: ResponsesRequest,
    conversations: Conversations,
    messages: list[dict],
    chunks: AsyncIterator[bytes],
) -> AsyncIterator[bytes]:
    """A chat stream as the events of the Responses API, in the API's order, each with its sequence number."""
    frame = _frame(request, _new("resp"), int(time.time()), "in_progress")
    number = -1

    def event(kind: str, **fields: Any) -> bytes:
        nonlocal number
        number += 1
        body = {"type": kind, "sequence_number": number, **fields}
        return f"event: {kind}\ndata: {json.dumps(body, ensure_ascii=False)}\n\n".encode()

    yield event("response.created", response=frame)
    yield event("response.in_progress", response=frame)
    item: dict | None = None
    text, status, usage = "", "completed", None
    where: dict[str, Any] = {}
    async for data in chunks:
        if data == b"data: [DONE]\n\n":
            continue
        chunk = json.loads(data[6:])
        if "error" in chunk:
            failed = frame | {
                "status": "failed",
                "error": {"code": "server_error", "message": chunk["error"]["message"]},
            }
            yield event("response.failed", response=failed)
            return
        usage = chunk.get("usage") or usage
        if not chunk["choices"]:
            continue
        choice = chunk["choices"][0]
        for call in choice["delta"].get("tool_calls", ()):
            item = _call_item(call, "in_progress") | {"arguments": ""}
            where = {"item_id": item["id"], "output_index": 0}
            arguments = call["function"]["arguments"]
            yield event("response.output_item.added", output_index=0, item=item)
            yield event("response.function_call_arguments.delta", **where, delta=arguments)
            item |= {"arguments": arguments}
            yield event(
                "response.function_call_arguments.done", **where, name=item["name"], arguments=arguments
            )
        delta = choice["delta"].get("content")
        if item is None and (delta or choice["finish_reason"]):  # an empty answer is a message, too
            item = _message_item(_new("msg"), "", "in_progress") | {"content": []}
            where = {"item_id": item["id"], "output_index": 0, "content_index": 0}
            yield event("response.output_item.added", output_index=0, item=item)
            yield event("response.content_part.added", **where, part=_text_part(""))
        if delta:
            text += delta
            yield event("response.output_text.delta", **where, delta=delta, logprobs=[])
        if choice["finish_reason"] == "length":
            status = "incomplete"
    if item["type"] == "message":
        yield event("response.output_text.done", **where, text=text, logprobs=[])
        yield event("response.content_part.done", **where, part=_text_part(text))
        item = _message_item(item["id"], text, status)
    else:
        item |= {"status": "completed"}
    yield event("response.output_item.done", output_index=0, item=item)
    done = frame | {
        "status": status,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "output": [item],
        "usage": _usage(usage) if usage else None,
    }
    conversations.keep(done, request, messages)
    yield event(f"response.{status}", response=done)


def _frame(request: ResponsesRequest, response_id: str, created: int, status: str) -> dict:
    text_format = request.text.format if request.text else None
    choice = request.tool_choice
    return {
        "id": response_id,
        "object": "response",
        "created_at": created,
        "status": status,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "model": request.model,
        "output": [],
        "parallel_tool_calls": False,
        "previous_response_id": request.previous_response_id,
        "store": request.store is not False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {
            "format": text_format.model_dump(by_alias=True, exclude_none=True)
            if text_format
            else {"type": "text"}
        },
        "tool_choice": "auto"
        if choice is None
        else choice
        if isinstance(choice, str)
        else choice.model_dump(),
        "tools": [
            {"parameters": None, "strict": False} | tool.model_dump(exclude_none=True)
            for tool in request.tools or []
        ],
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": "disabled",
        "usage": None,
        "metadata": request.metadata or {},
    }


def _message_item(item_id: str, text: str, status: str) -> dict:
    return {
        "id": item_id,
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [_text_part(text)],
    }


def _text_part(text: str) -> dict:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call_item(call: dict, status: str) -> dict:
    function = call["function"]
    return {
        "id": _new("fc"),
        "type": "function_call",
        "call_id": call["id"],
        "name": function["name"],
        "arguments": function["arguments"],
        "status": status,
    }


def _usage(usage: dict) -> dict:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "cache_write_tokens": 0,
        },
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }


def _new(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"
