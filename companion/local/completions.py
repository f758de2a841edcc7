"""Chat completions, text completions and embeddings: from OpenAI's request to llama.cpp's, and back.

Nothing here is stored. A request that asks for `n` answers is computed as n requests side by side, with seeds that
follow each other. What is sampled is what the parameters say: llama.cpp's own filters (top-k, min-p) are off.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import httpx

from . import toolcalls
from .engine import CONTEXT, EMBEDDING_CONTEXT, Engine
from .wire import ApiError, ChatRequest, CompletionRequest, EmbeddingRequest, ResponseFormat

LONGEST_ANSWER = 1024  # tokens, where the request sets no limit: a small model may never stop by itself


class Upstream:
    """The HTTP connection to llama.cpp's servers, shared by all requests of this process."""

    def __init__(self) -> None:
        self.http = httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None))

    async def post(self, engine: Engine, route: str, body: dict) -> dict:
        """llama.cpp's answer; its errors are raised as OpenAI's."""
        reply = await self.http.post(engine.address + route, json=body)
        if reply.status_code != 200:
            raise _refused(reply.status_code, reply.content)
        return reply.json()

    async def events(self, engine: Engine, body: dict, stack: AsyncExitStack) -> AsyncIterator[bytes]:
        """The data of llama.cpp's server-sent events, [DONE] left out; closing `stack` frees the slot.

        Awaits the reply's head, so that a refusal is raised before anything is sent on.
        """
        reply = await stack.enter_async_context(
            self.http.stream("POST", engine.address + "/v1/chat/completions", json=body)
        )
        if reply.status_code != 200:
            raise _refused(reply.status_code, await reply.aread())
        return _events(reply)


async def _events(reply: httpx.Response) -> AsyncIterator[bytes]:
    rest = b""
    async for piece in reply.aiter_raw():
        *events, rest = (rest + piece).split(b"\n\n")
        for event in events:
            if event.startswith(b"data: ") and event != b"data: [DONE]":
                yield event[6:]


def _refused(status: int, content: bytes) -> ApiError:
    try:
        error = json.loads(content)["error"]
    except (ValueError, KeyError):
        error = {"message": f"the engine answered {status}"}
    if error.get("type") == "exceed_context_size_error":
        return too_long(error["n_ctx"], error["n_prompt_tokens"])
    if "too large to process" in error["message"]:  # llama.cpp's word for a text that is longer than its batch
        return ApiError(
            f"This model's maximum context length is {EMBEDDING_CONTEXT} tokens. Please shorten the input.",
            param="input",
            code="context_length_exceeded",
        )
    if status < 500:
        return ApiError(error["message"])
    return ApiError(error["message"], status=500, type="server_error")


def too_long(limit: int, tokens: int) -> ApiError:
    return ApiError(
        f"This model's maximum context length is {limit} tokens. However, your messages resulted in {tokens} tokens. "
        "Please reduce the length of the messages.",
        param="messages",
        code="context_length_exceeded",
    )


# --- chat completions -------------------------------------------------------------------------------------------------


def engine_body(request: ChatRequest) -> dict[str, Any]:
    """llama.cpp's request for one answer. Raises ApiError for what cannot be served."""
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(
            "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.", param="top_logprobs", code="invalid_value"
        )
    for name in ("functions", "function_call", "audio"):
        if (request.model_extra or {}).get(name) is not None:
            raise ApiError(f"Unsupported parameter: '{name}'. Use 'tools'.", param=name, code="unsupported_parameter")
    tools = [] if request.tool_choice == "none" else request.tools or []
    if request.tool_choice not in (None, "none") and not tools:
        raise ApiError("'tool_choice' is only allowed when 'tools' are specified.", param="tool_choice")
    body = sampling(request) | {
        "model": request.model,
        "messages": toolcalls.plain_messages(request.messages, tools),
        "max_tokens": request.max_completion_tokens or request.max_tokens or LONGEST_ANSWER,
    }
    if request.logprobs:
        body["logprobs"] = True
        body["top_logprobs"] = request.top_logprobs or 0
    grammar = format_grammar(request.response_format) if request.response_format else None
    if call := toolcalls.call_grammar(tools, request.tool_choice):
        if grammar:
            raise ApiError("'tools' and 'response_format' cannot be combined here: ask for one of them.", param="response_format")
        grammar = checked(call, "tools", "invalid_function_parameters")
    if grammar:
        body["grammar"] = grammar
    return body


def sampling(request: ChatRequest | CompletionRequest) -> dict[str, Any]:
    """The sampling parameters that both APIs share, with OpenAI's defaults."""
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stop) > 4:
        raise ApiError(f"Invalid 'stop': at most 4 sequences, got {len(stop)}.", param="stop", code="array_above_max_length")
    body: dict[str, Any] = {
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repeat_last_n": CONTEXT,
        "stop": stop,
    }
    if request.seed is not None:
        body["seed"] = request.seed % 2**32
    for name in ("presence_penalty", "frequency_penalty"):
        if (value := getattr(request, name, None)) is not None:
            body[name] = value
    if bias := getattr(request, "logit_bias", None):
        if not all(token.isdigit() for token in bias):
            raise ApiError("Invalid key in 'logit_bias': keys are token ids.", param="logit_bias", code="invalid_value")
        body["logit_bias"] = [[int(token), value if value > -100 else False] for token, value in bias.items()]
    return body


def format_grammar(wanted: ResponseFormat) -> str | None:
    """The llguidance grammar of a `response_format`; None for plain text."""
    if wanted.type == "text":
        return None
    if wanted.type == "json_object":
        schema: dict[str, Any] = {"type": "object"}
    elif wanted.json_schema is None:
        raise ApiError(
            "Missing required parameter: 'response_format.json_schema'.",
            param="response_format.json_schema",
            code="missing_required_parameter",
        )
    else:
        schema = wanted.json_schema.schema_
        if wanted.json_schema.strict:
            _check_strict(schema, wanted.json_schema.name, ())
    schema = {**schema, "x-guidance": {"whitespace_flexible": False}}
    return checked(f"%llguidance {{}}\nstart: %json {json.dumps(schema)}", "response_format", "invalid_json_schema")


def checked(grammar: str, param: str, code: str) -> str:
    """The grammar itself. llama.cpp passes over one that it cannot use and answers freely; here it is an error."""
    from llguidance import LLMatcher

    if problem := LLMatcher.validate_grammar(grammar):
        reason = problem.splitlines()[0].split("failed to compile JSON schema: ")[-1]
        raise ApiError(f"Invalid schema for {param}: {reason}.", param=param, code=code)
    return grammar


def _check_strict(schema: Any, name: str, context: tuple) -> None:
    """The rules of `strict`: every object closes itself and requires all of its properties."""
    if isinstance(schema, list):
        for number, part in enumerate(schema):
            _check_strict(part, name, (*context, str(number)))
    if not isinstance(schema, dict):
        return
    properties = schema.get("properties", {}) if isinstance(schema.get("properties", {}), dict) else {}
    if schema.get("type") == "object" or properties:
        problem = None
        if schema.get("additionalProperties") is not False:
            problem = "'additionalProperties' is required to be supplied and to be false"
        elif missing := [key for key in properties if key not in schema.get("required", [])]:
            problem = f"'required' is required to include every key in properties. Missing {missing[0]!r}"
        if problem:
            raise ApiError(
                f"Invalid schema for response_format {name!r}: In context={context}, {problem}.",
                param="response_format",
                code="invalid_json_schema",
            )
    for key, value in schema.items():
        if key not in ("enum", "const", "default", "examples"):
            _check_strict(value, name, (*context, key))


def several(body: dict, n: int) -> list[dict]:
    """The same request n times, each with a seed of its own where a seed is set."""
    return [body | ({"seed": (body["seed"] + number) % 2**32} if "seed" in body else {}) for number in range(n)]


async def chat(upstream: Upstream, engine: Engine, request: ChatRequest) -> dict:
    """A whole chat completion, as the SDK's `ChatCompletion` reads it."""
    bodies = several(engine_body(request), request.n or 1)
    answers = await asyncio.gather(*(upstream.post(engine, "/v1/chat/completions", body) for body in bodies))
    first = answers[0]
    first["choices"] = [
        _choice(answer["choices"][0], number, bool(request.tools)) for number, answer in enumerate(answers)
    ]
    first["usage"] = _added([answer["usage"] for answer in answers])
    first.pop("timings", None)
    return first


def _choice(choice: dict, index: int, tools: bool) -> dict:
    text = choice["message"]["content"] or ""
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    finish = choice["finish_reason"]
    if tools and text.startswith(toolcalls.OPEN):
        if call := toolcalls.read_call(text):
            message |= {"content": None, "tool_calls": [call]}
            finish = "tool_calls"
        else:  # cut off by max_tokens: half a call is no call
            message["content"] = None
    return {"index": index, "message": message, "finish_reason": finish, "logprobs": _logprobs(choice)}


def _logprobs(choice: dict) -> dict | None:
    if not choice.get("logprobs"):
        return None
    content = [_token(item) | {"top_logprobs": [_token(t) for t in item["top_logprobs"]]} for item in choice["logprobs"]["content"]]
    return {"content": content, "refusal": None}


def _token(item: dict) -> dict:
    return {"token": item["token"], "logprob": item["logprob"], "bytes": item["bytes"]}


def _added(usages: list[dict]) -> dict:
    prompt, completion = usages[0]["prompt_tokens"], sum(usage["completion_tokens"] for usage in usages)
    cached = usages[0].get("prompt_tokens_details", {}).get("cached_tokens", 0)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


async def chat_stream(upstream: Upstream, engine: Engine, request: ChatRequest, stack: AsyncExitStack) -> AsyncIterator[bytes]:
    """The events of a streamed chat completion, `data: …` lines ready to send, as `ChatCompletionChunk` reads them.

    Raises ApiError before the first event where the request is refused.
    """
    bodies = [body | {"stream": True, "stream_options": {"include_usage": True}} for body in several(engine_body(request), request.n or 1)]
    sources = [await upstream.events(engine, body, stack) for body in bodies]
    usage = bool(request.stream_options and request.stream_options.include_usage)
    if len(sources) == 1 and not request.tools:
        return _relayed(sources[0], usage)
    return _merged(sources, usage, bool(request.tools))


async def _relayed(source: AsyncIterator[bytes], usage: bool) -> AsyncIterator[bytes]:
    async for data in source:
        if data.startswith(b'{"choices":[{"finish_reason":null,"index":0,"delta":{"content":"'):
            yield b"data: " + data + b"\n\n"  # nearly every event: a piece of text, already in OpenAI's form
        elif chunk := _chunk(json.loads(data), 0, usage):
            yield _event(chunk)
    yield b"data: [DONE]\n\n"


def _chunk(chunk: dict, index: int, usage: bool) -> dict | None:
    """A chunk without what is llama.cpp's own; None for a usage that was not asked for."""
    if "error" in chunk:
        return {"error": {"type": "server_error", "param": None, "code": None} | chunk["error"]}
    if not chunk["choices"]:
        if not usage:
            return None
        chunk["usage"] = _added([chunk["usage"]])
    for choice in chunk["choices"]:
        choice["index"] = index
        choice["logprobs"] = _logprobs(choice)
        if choice["delta"].get("role"):
            choice["delta"]["content"] = choice["delta"].get("content") or ""
    chunk.pop("timings", None)
    return chunk


def _event(chunk: dict) -> bytes:
    return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _merged(sources: list[AsyncIterator[bytes]], usage: bool, tools: bool) -> AsyncIterator[bytes]:
    """Several answers as one stream; a tool call is held back until it is whole."""
    queue: asyncio.Queue[tuple[int, dict | None]] = asyncio.Queue()
    frame: dict[str, Any] = {}

    async def drain(index: int, source: AsyncIterator[bytes]) -> None:
        try:
            chunks = (json.loads(data) async for data in source)
            async for chunk in _with_calls(chunks) if tools else chunks:
                await queue.put((index, chunk))
        finally:
            await queue.put((index, None))

    tasks = [asyncio.create_task(drain(index, source)) for index, source in enumerate(sources)]
    usages: list[dict] = []
    open_ = len(tasks)
    try:
        while open_:
            index, chunk = await queue.get()
            if chunk is None:
                open_ -= 1
                continue
            frame = frame or {key: chunk[key] for key in ("id", "created", "model", "object") if key in chunk}
            if "error" not in chunk and not chunk["choices"]:
                usages.append(chunk["usage"])
            elif chunk := _chunk(chunk, index, usage):
                yield _event(chunk | frame)
        if usage and usages:
            yield _event(frame | {"choices": [], "usage": _added(usages)})
        yield b"data: [DONE]\n\n"
    finally:
        for task in tasks:
            task.cancel()


async def _with_calls(chunks: AsyncIterator[dict]) -> AsyncIterator[dict]:
    held, holding = "", True
    async for chunk in chunks:
        choice = chunk["choices"][0] if chunk.get("choices") else None
        if choice is None or not holding:
            yield chunk
            continue
        held += choice["delta"].get("content") or ""
        if choice["finish_reason"]:
            call = toolcalls.read_call(held)
            if call:
                choice["delta"] = {"tool_calls": [{"index": 0} | call]}
                yield _copied(chunk, choice["delta"], None)
                choice["finish_reason"] = "tool_calls"
            elif not held.startswith(toolcalls.OPEN):
                yield _copied(chunk, {"content": held}, None)
            yield _copied(chunk, {}, choice["finish_reason"])
        elif choice["delta"].get("role"):
            yield _copied(chunk, {"role": "assistant", "content": None}, None)
        elif not (toolcalls.OPEN.startswith(held) or held.startswith(toolcalls.OPEN)):
            holding = False
            yield _copied(chunk, {"content": held}, None)


def _copied(chunk: dict, delta: dict, finish: str | None) -> dict:
    return chunk | {"choices": [chunk["choices"][0] | {"delta": delta, "finish_reason": finish}]}


# --- text completions and embeddings ----------------------------------------------------------------------------------


async def completion(upstream: Upstream, engine: Engine, request: CompletionRequest) -> dict:
    """A text completion, as the SDK's `Completion` reads it.

    With `echo` and `max_tokens=0` the prompt comes back cut into its tokens: `logprobs.tokens` and `.text_offset`.
    """
    if request.echo or request.max_tokens == 0:
        if not request.echo or request.max_tokens != 0 or request.logprobs:
            raise ApiError("Unsupported: 'echo' goes with max_tokens=0 and logprobs=0 here, and only it does.", param="echo")
        return await _echo(upstream, engine, request)
    body = sampling(request) | {
        "model": request.model,
        "prompt": request.prompt,
        "max_tokens": 16 if request.max_tokens is None else request.max_tokens,
    }
    if request.logprobs is not None:
        body["logprobs"] = max(request.logprobs, 1)
    answer = await upstream.post(engine, "/v1/completions", body)
    choice = answer["choices"][0]
    items = (choice.get("logprobs") or {}).get("content", [])
    logprobs = None
    if request.logprobs is not None:
        starts = [sum(len(item["token"]) for item in items[:number]) for number in range(len(items))]
        logprobs = {
            "tokens": [item["token"] for item in items],
            "token_logprobs": [item["logprob"] for item in items],
            "top_logprobs": [{_shown(t): t["logprob"] for t in item["top_logprobs"]} for item in items],
            "text_offset": [len(request.prompt) + start for start in starts],
        }
    choice = {"index": 0, "text": choice["text"], "finish_reason": choice["finish_reason"], "logprobs": logprobs}
    return _completion(request, choice, _added([answer["usage"]]))


def _shown(item: dict) -> str:
    """A token as text; one that is part of a character is written as OpenAI writes it, bytes:\\xf0\\x9f."""
    try:
        return bytes(item["bytes"]).decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in item["bytes"])


async def _echo(upstream: Upstream, engine: Engine, request: CompletionRequest) -> dict:
    found = await upstream.post(engine, "/tokenize", {"content": request.prompt, "with_pieces": True, "add_special": False})
    tokens, offsets, data = [], [], b""
    for token in found["tokens"]:
        piece = token["piece"]
        piece = piece.encode() if isinstance(piece, str) else bytes(piece)
        tokens.append(_shown({"bytes": list(piece)}))
        offsets.append(len(data.decode(errors="ignore")))
        data += piece
    logprobs = {"tokens": tokens, "text_offset": offsets, "token_logprobs": None, "top_logprobs": None}
    usage = {"prompt_tokens": len(tokens), "completion_tokens": 0, "total_tokens": len(tokens)}
    return _completion(request, {"index": 0, "text": request.prompt, "finish_reason": "length", "logprobs": logprobs}, usage)


def _completion(request: CompletionRequest, choice: dict, usage: dict) -> dict:
    import secrets

    return {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": request.model,
        "choices": [choice],
        "usage": usage,
    }


async def embeddings(upstream: Upstream, engine: Engine, request: EmbeddingRequest) -> dict:
    """Embeddings of unit length, as the SDK's `CreateEmbeddingResponse` reads them."""
    texts = request.input if isinstance(request.input, list) and request.input and not isinstance(request.input[0], int) else [request.input]
    if len(texts) > 2048:
        raise ApiError(f"Invalid 'input': at most 2048 texts, got {len(texts)}.", param="input", code="array_above_max_length")
    if any(len(text) == 0 for text in texts):
        raise ApiError("Invalid 'input': a text must not be empty.", param="input", code="invalid_value")
    if request.dimensions not in (None, 384):
        raise ApiError(f"This model does not support 'dimensions' other than 384, got {request.dimensions}.", param="dimensions")
    body = {"model": request.model, "input": texts, "encoding_format": request.encoding_format or "float"}
    answer = await upstream.post(engine, "/v1/embeddings", body)
    data = [{"object": "embedding", "index": item["index"], "embedding": item["embedding"]} for item in answer["data"]]
    usage = {key: answer["usage"][key] for key in ("prompt_tokens", "total_tokens")}
    return {"object": "list", "model": request.model, "data": data, "usage": usage}
