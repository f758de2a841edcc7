"""A conversation that remembers, streams, calls tools and stays within its token budget.

It counts no tokens itself: the endpoint's `usage` does. It keeps no conversation beyond the object's life.
Tools run in this process as the model asks, with no sandbox and no question back: pass only functions that
may be called with whatever a stranger writes.
"""

from __future__ import annotations

import html
import inspect
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from companion import backend

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletion, ChatCompletionMessage

Message = dict[str, Any]
Tool = Callable[..., Any] | tuple[dict[str, Any], Callable[..., Any]]

# What Chat sets itself; and of several choices (`n`) only one could be remembered.
_RESERVED = {"messages", "tools", "stream", "stream_options", "n"}
_ROLE_COLOURS = {"user": "#2f81d7", "assistant": "#2da05a", "tool": "#b7791f"}


@dataclass(frozen=True)
class Usage:
    """Tokens of the prompts and of the completions, as the endpoint counted them, and the requests made."""

    prompt: int = 0
    completion: int = 0
    requests: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt + other.prompt, self.completion + other.completion, self.requests + other.requests
        )


@dataclass(frozen=True)
class ToolCall:
    """A call that the model made: the tool's name, the arguments as the model wrote them, and the answer."""

    name: str
    arguments: str
    result: str


@dataclass(frozen=True)
class Reply:
    """What came back for one turn.

    `text` is the model's answer, `usage` what the whole turn took, `tool_calls` what was called on the way,
    and `finish_reason` why the model stopped: "stop", or "length" where it was cut off at
    `max_completion_tokens`.
    """

    text: str
    usage: Usage
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str = "stop"

    def __str__(self) -> str:
        return self.text

    def _repr_pretty_(self, printer, cycle) -> None:
        printer.text(self.text)

    def _repr_html_(self) -> str:
        notes = [f"called {call.name}({call.arguments})" for call in self.tool_calls]
        if self.finish_reason == "length":
            notes.append("cut off: the reply reached its token limit")
        small = (f"<div><small>{html.escape(note)}</small></div>" for note in notes)
        return _text_html(self.text) + "".join(small)


class Chat:
    """A conversation with a chat model, through the Chat Completions API.

    `messages` is the history as the API takes it; a turn is added whole, once it succeeded. `context` is what
    the model saw in the last request, `usage` what all requests took, including those of turns that failed
    later. (A stream that is given up reports no usage, so it is missing there.)

    Args:
        system: instructions that stand before the conversation and are never dropped.
        model: a model's name; the backend's default chat model if None.
        client: an `openai.OpenAI`; the backend's if None.
        tools: what the model may call: functions with type hints and a docstring, from which the JSON schema
            is made, or (schema, function) pairs, the schema as the API takes it: `{"type": "function",
            "function": …}`. What a tool returns is sent as text, or as JSON if it is no string; what it
            raises is sent as an error, so that the model can go on.
        max_steps: requests to the model in one turn, at most.
        max_context_tokens: the most tokens that a prompt may have. Where it would be longer, the oldest turns
            are left out of it, whole; system messages and the newest turn always stay. How long a prompt will
            be is estimated from its characters, at the most tokens per character that a reply's usage has
            shown so far. So the first prompt is sent as it is, and one of a denser text can be a little over.
        prices: cost of a million tokens, (input, output), for `cost`.
        **options: passed with each request: temperature, max_completion_tokens, seed, response_format, …

    Raises:
        ValueError: for a tool that is no function, two tools of one name, or an option that Chat sets itself.
    """

    def __init__(
        self,
        system: str | None = None,
        *,
        model: str | None = None,
        client: OpenAI | None = None,
        tools: Sequence[Tool] = (),
        max_steps: int = 5,
        max_context_tokens: int = 1536,
        prices: tuple[float, float] | None = None,
        **options: Any,
    ):
        if system is not None:
            _check_text(system, "system")
        for name, value in (("max_steps", max_steps), ("max_context_tokens", max_context_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value!r}")
        self._schemas: list[dict[str, Any]] = []
        self._functions: dict[str, Callable[[str], Any]] = {}
        for tool in tools:
            schema, function = _read_tool(tool)
            name = schema["function"]["name"]
            if name in self._functions:
                raise ValueError(f"two tools are named {name!r}: rename one")
            self._schemas.append(schema)
            self._functions[name] = function
        self._check_options(options)
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self.context: list[Message] = []
        self.max_steps = max_steps
        self.max_context_tokens = max_context_tokens
        self.prices = prices
        self.options = options
        self.usage = Usage()
        self._tokens_per_character = 0.0
        self.model = model or backend.chat_model()
        self.client = client

    def ask(self, text: str, **options: Any) -> Reply:
        """Send `text` as the user's next message, run the tools the model asks for, and return its reply.

        Args:
            text: what the user says.
            **options: for this turn only, over those of the chat. A `tool_choice` that forces a call holds
                for the turn's first request, so that the model can answer afterwards.

        Raises:
            ValueError: `text` is no string or empty, or an option cannot be used here.
            RuntimeError: the model still asked for tools after `max_steps` requests.
            openai.OpenAIError: whatever the endpoint refused.

        After any of these the conversation is as it was; what tools did outside of it is done.
        """
        _check_text(text, "text")
        *_, reply = self._take_turn(text, self._check_options(options), stream=False)
        return reply

    def stream(self, text: str, **options: Any) -> Iterator[str]:
        """Like `ask`, but yield the reply's text in pieces, as they come.

        The turn is remembered once the stream was read to its end. Raises what `ask` raises, and RuntimeError
        where the endpoint stops before the reply is complete.
        """
        _check_text(text, "text")
        turn = self._take_turn(text, self._check_options(options), stream=True)
        return (piece for piece in turn if isinstance(piece, str))

    def clear(self) -> None:
        """Forget the conversation; the system's messages and the usage stay."""
        self.messages[:] = [message for message in self.messages if _is_system(message)]

    @property
    def cost(self) -> float | None:
        """What `usage` costs at `prices`, in their currency and without discounts; None without prices."""
        if self.prices is None:
            return None
        per_input, per_output = self.prices
        return (self.usage.prompt * per_input + self.usage.completion * per_output) / 1_000_000

    def __repr__(self) -> str:
        lines = [f"Chat(model={self.model!r}, {len(self.messages)} messages)"]
        return "\n".join(lines + [f"{m['role']}: {_message_text(m)}" for m in self.messages])

    def _repr_html_(self) -> str:
        body = "".join(message_html(message) for message in self.messages) or "<em>no messages yet</em>"
        return f'<section aria-label="Conversation">{body}</section>'

    def _take_turn(self, text: str, options: dict[str, Any], stream: bool) -> Iterator[str | Reply]:
        """Yield pieces of text, if streamed, and last the reply."""
        turn: list[Message] = [{"role": "user", "content": text}]
        calls: list[ToolCall] = []
        spent = Usage()
        request = {"model": self.model, **self.options, **options}
        if self._schemas:
            request["tools"] = self._schemas
        for _ in range(self.max_steps):
            self.context = context = self._fit([*self.messages, *turn])
            completion = yield from self._complete({**request, "messages": context}, stream)
            spent += self._count(completion, context)
            choice = completion.choices[0]
            answer = _read_message(choice.message)
            turn.append(answer)
            if "tool_calls" not in answer:
                self.messages += turn
                yield Reply(answer["content"], spent, tuple(calls), choice.finish_reason)
                return
            if stream and answer["content"]:
                yield "\n\n"
            for call in answer["tool_calls"]:
                calls.append(self._call(**call["function"]))
                turn.append({"role": "tool", "tool_call_id": call["id"], "content": calls[-1].result})
            if request.get("tool_choice") not in (None, "none"):
                request["tool_choice"] = "auto"
        raise RuntimeError(
            f"the model still asked for tools after {self.max_steps} requests, last for {calls[-1].name!r}; "
            "nothing was added to the conversation. Raise max_steps, or say clearer what the tools are for."
        )

    def _complete(self, request: dict[str, Any], stream: bool) -> Generator[str, None, ChatCompletion]:
        """Make one request, yield its text in pieces if streamed, and return the completion."""
        # Looked up each time: a local endpoint that was left alone has gone, and starts again elsewhere.
        create = (self.client or backend.client()).chat.completions.create
        if not stream:
            return create(**request)
        from openai.lib.streaming.chat import ChatCompletionStreamState

        state = ChatCompletionStreamState()
        finished = False
        with create(**request, stream=True, stream_options={"include_usage": True}) as chunks:
            for chunk in chunks:
                state.handle_chunk(chunk)
                for choice in chunk.choices:
                    finished = finished or bool(choice.finish_reason)
                    if choice.delta.content:
                        yield choice.delta.content
        if not finished:
            raise RuntimeError("the endpoint stopped before the reply was complete: ask again")
        return state.current_completion_snapshot

    def _count(self, completion: ChatCompletion, context: list[Message]) -> Usage:
        """Add a completion's usage to the total, and learn from it how many tokens a character can take."""
        usage = Usage(requests=1)
        if completion.usage:
            usage = Usage(completion.usage.prompt_tokens, completion.usage.completion_tokens, 1)
            measured = usage.prompt / self._characters(context)
            self._tokens_per_character = max(measured, self._tokens_per_character)
        self.usage += usage
        return usage

    def _fit(self, messages: list[Message]) -> list[Message]:
        """Leave out whole turns, oldest first, until the prompt is within its budget.

        A turn starts at a user's message, so that a tool's result never stands without its call.
        """
        starts = [0, *(i for i, message in enumerate(messages) if message["role"] == "user")]
        for start in starts:
            kept = [message for i, message in enumerate(messages) if i >= start or _is_system(message)]
            if self._tokens_per_character * self._characters(kept) <= self.max_context_tokens:
                break
        return kept

    def _characters(self, messages: list[Message]) -> int:
        # As JSON, since roles, calls and schemas take tokens too.
        return len(json.dumps([messages, self._schemas], ensure_ascii=False))

    def _call(self, name: str, arguments: str) -> ToolCall:
        from pydantic_core import ValidationError, to_json

        try:
            if name not in self._functions:
                raise LookupError(f"there is no tool {name!r}, only {', '.join(self._functions) or 'none'}")
            result = self._functions[name](arguments or "{}")
            result = result if isinstance(result, str) else to_json(result, fallback=str).decode()
        except ValidationError as error:
            problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            result = f"Error: {'; '.join(problems)}"
        except Exception as error:
            result = f"Error: {type(error).__name__}: {error}"
        return ToolCall(name, arguments, result)

    def _check_options(self, options: dict[str, Any]) -> dict[str, Any]:
        if taken := _RESERVED & options.keys():
            raise ValueError(f"Chat sets {', '.join(sorted(taken))} itself: for that, use the client")
        choice = options.get("tool_choice")
        forced = choice["function"]["name"] if isinstance(choice, dict) and "function" in choice else None
        if forced is not None and forced not in self._functions:
            raise ValueError(f"tool_choice names {forced!r}, but the tools are {list(self._functions)}")
        return options


def message_html(message: Message) -> str:
    """Show a message as HTML: its role in words and its text, escaped, in the colours of the page around."""
    colour = _ROLE_COLOURS.get(message["role"], "#888888")
    return (
        f'<div style="margin:.5em 0;padding:.1em .8em;border-left:.25em solid {colour}">'
        f"<strong>{html.escape(message['role'])}</strong>{_text_html(_message_text(message))}</div>"
    )


def _text_html(text: str) -> str:
    return f'<div style="white-space:pre-wrap;overflow-wrap:anywhere">{html.escape(text.strip())}</div>'


def _message_text(message: Message) -> str:
    lines = [str(message.get("content") or "")]
    for call in message.get("tool_calls") or ():
        lines.append(f"calls {call['function']['name']}({call['function']['arguments']})")
    return "\n".join(line for line in lines if line)


def _is_system(message: Message) -> bool:
    return message["role"] in ("system", "developer")


def _check_text(text: Any, name: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name} must be a string with something in it, not {text!r}")


def _read_message(message: ChatCompletionMessage) -> Message:
    """Give a reply's message as the API takes it back, without what only replies have."""
    read: Message = {"role": "assistant", "content": message.content or message.refusal or ""}
    if message.tool_calls:
        parts = {"id": True, "type": True, "function": {"name", "arguments"}}
        read["tool_calls"] = [call.model_dump(include=parts) for call in message.tool_calls]
    return read


def _read_tool(tool: Tool) -> tuple[dict[str, Any], Callable[[str], Any]]:
    """Give a tool's schema, and a function that takes the arguments as the model wrote them, in JSON."""
    if isinstance(tool, tuple):
        try:
            schema, function = tool
            schema["function"]["name"]
        except (ValueError, KeyError, TypeError) as error:
            wanted = "({'type': 'function', 'function': {'name': …}}, function)"
            raise ValueError(f"a tool of two parts is {wanted}, not {tool!r}") from error
        return schema, lambda arguments: function(**json.loads(arguments))
    if not callable(tool) or not hasattr(tool, "__name__"):
        raise ValueError(f"a tool is a function or a (schema, function) pair, not {tool!r}")
    from pydantic import PydanticUserError, TypeAdapter

    try:
        adapter = TypeAdapter(tool)
        parameters = adapter.json_schema()
    except PydanticUserError as error:
        raise ValueError(f"no JSON schema can be made for {tool.__name__}: {error.message}") from error
    if parameters.get("type") != "object":
        raise ValueError(f"{tool.__name__} takes arguments by position only, but a model passes them by name")
    for parameter in parameters.get("properties", {}).values():
        parameter.pop("title", None)
    described = {"name": tool.__name__, "description": inspect.getdoc(tool) or "", "parameters": parameters}
    return {"type": "function", "function": described}, adapter.validate_json
