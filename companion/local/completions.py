"""Chat completions, text completions and embeddings: from OpenAI's request to llama.cpp's, and back.

Nothing here is stored, but for the latest embeddings, in memory. A request that asks for `n` answers is
computed as n requests side by side, with seeds that follow each other. What is sampled is what the parameters
say: llama.cpp's own filters (top-k, min-p) are off.
"""

import asyncio
import json
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import cache
from itertools import groupby
from typing import Any

import aiohttp

from . import toolcalls
from .engine import CONTEXT, EMBEDDING_CONTEXT, Engine
from .wire import ApiError, ChatRequest, CompletionRequest, EmbeddingRequest, Penalised, ResponseFormat

CHAT, TEXT_COMPLETION = "/v1/chat/completions", "/v1/completions"
PROMPTS = {CHAT: "messages", TEXT_COMPLETION: "prompt", "/v1/embeddings": "input"}
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
SEEDS = 2**32 - 1  # llama.cpp draws a random seed where it is given 2**32 - 1
LONGEST_ANSWER = 1024  # tokens, where the request sets no limit: a small model may never stop by itself

# Reading an event costs a client about as much processor time as some of its tokens took. So one event holds
# what was written within PAUSE seconds for each open stream, and at most within LONGEST_PAUSE.
PAUSE, LONGEST_PAUSE = 0.04, 0.2
KEPT = 16 << 20  # letters of embeddings, with what was asked, that are kept for when it is asked again
TEXT = b'{"choices":[{"finish_reason":null,"index":0,"delta":{"content":"'  # how llama.cpp's events of text
TEXT_END = b'"}}],"created":'  # begin and go on after the text, in which every quotation mark is escaped


class Upstream:
    """The HTTP connection to llama.cpp's servers, shared by all requests of this process."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None
        self._streams = 0
        self._kept: OrderedDict[str, str] = OrderedDict()  # by request, that of the latest use last

    def _post(self, engine: Engine, route: str, body: dict):
        if self._session is None:  # here, since a session belongs to the event loop that runs
            # A connection for each request: llama.cpp closes idle ones, even as the next request is sent.
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=None), connector=connector
            )
        return self._session.post(engine.address + route, json=body, headers=engine.headers)

    async def post(self, engine: Engine, route: str, body: dict) -> dict:
        """llama.cpp's answer; its errors are raised as OpenAI's."""
        async with self._post(engine, route, body) as reply:
            content = await reply.read()
        if reply.status != 200:
            raise _refused(reply.status, content, PROMPTS.get(route))
        return json.loads(content)

    async def post_once(self, engine: Engine, route: str, body: dict) -> dict:
        """As `post`, but what was answered lately is not computed again: for answers that do not vary.

        Whoever starts a chapter anew sends the same texts again, and so do all that search the same articles.
        """
        key = json.dumps([engine.address, route, body])
        found = self._kept.pop(key, None) or json.dumps(await self.post(engine, route, body))
        self._kept[key] = found
        while sum(len(asked) + len(answer) for asked, answer in self._kept.items()) > KEPT:
            self._kept.popitem(last=False)
        return json.loads(found)

    async def answer(self, engine: Engine, route: str, body: dict) -> dict:
        """llama.cpp's whole answer to a chat or text completion.

        It is read as a stream, since llama.cpp sees at once that the client of a stream has left, but that of
        a whole reply only when a second has passed in which it finished nothing for anyone. Logprobs are the
        exception: a stream leaves out those of a character's first bytes.
        """
        if body.get("logprobs"):
            return await self.post(engine, route, body)
        async with self._post(engine, route, body | STREAMED) as reply:
            content = await reply.read()
        if reply.status != 200:
            raise _refused(reply.status, content, PROMPTS[route])
        chunks = [json.loads(event) for event in _joined(_data(content.split(b"\n\n")))]
        text, finish = "", None
        for chunk in chunks:
            if "error" in chunk:
                raise ApiError(chunk["error"]["message"], status=500, type="server_error")
            for choice in chunk["choices"]:
                text += choice.get("text") or choice.get("delta", {}).get("content") or ""
                finish = choice["finish_reason"]
        choice = {"text": text, "message": {"content": text}, "finish_reason": finish}
        return chunks[-1] | {"object": "chat.completion", "choices": [choice]}

    @asynccontextmanager
    async def stream(self, engine: Engine, body: dict) -> AsyncIterator[AsyncIterator[bytes]]:
        """The data of llama.cpp's server-sent events, [DONE] left out; leaving frees the slot.

        The first piece of text comes at once; those after it that come quickly come together. Awaits the
        reply's head, so that a refusal is raised before anything is sent on.
        """
        async with self._post(engine, CHAT, body | STREAMED) as reply:
            if reply.status != 200:
                raise _refused(reply.status, await reply.read(), PROMPTS[CHAT])
            self._streams += 1
            try:
                yield _events(reply.content, lambda: min(PAUSE * self._streams, LONGEST_PAUSE))
            finally:
                self._streams -= 1
                reply.close()

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()


async def _events(content: aiohttp.StreamReader, pause: Callable[[], float]) -> AsyncIterator[bytes]:
    rest, first = b"", True
    async for piece in content.iter_any():
        *events, rest = (rest + piece).split(b"\n\n")
        found = _data(events)
        if found and first:
            if b'"role":' not in found[0][:100]:  # llama.cpp forgets it where the first tokens come at once
                found[0] = found[0].replace(b'"delta":{', b'"delta":{"role":"assistant",', 1)
            first = False
        for event in _joined(found):
            yield event
        if found and _text(found[-1]) is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(pause()):
                    await content.wait_eof()


def _data(events: list[bytes]) -> list[bytes]:
    return [event[6:] for event in events if event.startswith(b"data: ") and event != b"data: [DONE]"]


def _joined(events: list[bytes]) -> Iterator[bytes]:
    """The events, with texts that follow each other in one."""
    for is_text, group in groupby(events, lambda event: _text(event) is not None):
        if is_text:
            *before, last = group
            yield TEXT + b"".join(_text(event) for event in before) + last[len(TEXT) :]
        else:
            yield from group


def _text(event: bytes) -> bytes | None:
    """The text of an event that holds nothing else, escaped as in JSON; None for any other event."""
    start, found, _ = event.partition(TEXT_END)
    return start[len(TEXT) :] if found and start.startswith(TEXT) else None


def _refused(status: int, content: bytes, param: str | None) -> ApiError:
    try:
        error = json.loads(content)["error"]
    except (ValueError, KeyError):
        error = {"message": f"the engine answered {status}"}
    if error.get("type") == "exceed_context_size_error":
        return _too_long(error["n_ctx"], error["n_prompt_tokens"], param)
    if "too large to process" in error["message"]:  # llama.cpp's word for a text longer than its batch
        message = (
            f"This model's maximum context length is {EMBEDDING_CONTEXT} tokens. Please shorten the {param}."
        )
        return ApiError(message, param=param, code="context_length_exceeded")
    if status < 500:
        return ApiError(error["message"], param=param, code="invalid_value")
    return ApiError(error["message"], status=500, type="server_error")


def _too_long(limit: int, tokens: int, param: str | None) -> ApiError:
    return ApiError(
        f"This model's maximum context length is {limit} tokens. However, your {param} resulted in {tokens} "
        f"tokens. Please reduce the length of the {param}.",
        param=param,
        code="context_length_exceeded",
    )


# --- chat completions ---------------------------------------------------------------------------------------


def engine_body(request: ChatRequest) -> dict[str, Any]:
    """llama.cpp's request for one answer. Raises ApiError for what cannot be served."""
    for name, needed in (("top_logprobs", "logprobs"), ("stream_options", "stream")):
        if getattr(request, name) is not None and not getattr(request, needed):
            message = f"The '{name}' parameter is only allowed when '{needed}' is enabled."
            raise ApiError(message, param=name, code="invalid_value")
    for name in ("functions", "function_call", "audio"):
        if (request.model_extra or {}).get(name) is not None:
            raise ApiError(
                f"Unsupported parameter: '{name}'. Use 'tools'.", param=name, code="unsupported_parameter"
            )
    tools = request.tools or []
    if request.tool_choice not in (None, "none") and not tools:
        message = "'tool_choice' is only allowed when 'tools' are specified."
        raise ApiError(message, param="tool_choice", code="invalid_value")
    body = sampling(request) | {
        "model": request.model,
        "messages": toolcalls.plain_messages(request.messages, tools),
        "max_tokens": request.max_completion_tokens or request.max_tokens or LONGEST_ANSWER,
    }
    if request.logprobs:
        body["logprobs"] = True
        body["top_logprobs"] = request.top_logprobs or 1  # asked for none, llama.cpp gives no logprobs at all
    grammar = format_grammar(request.response_format) if request.response_format else None
    if call := toolcalls.call_grammar(tools, request.tool_choice):
        if grammar:
            message = "'tools' and 'response_format' cannot be combined here: ask for one of them."
            raise ApiError(message, param="response_format", code="unsupported_parameter")
        grammar = checked(call, "tools", "invalid_function_parameters")
    if grammar:
        body["grammar"] = grammar
    return body


def sampling(request: Penalised) -> dict[str, Any]:
    """The sampling parameters that both APIs share, with OpenAI's defaults."""
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stop) > 4:
        message = f"Invalid 'stop': at most 4 sequences, got {len(stop)}."
        raise ApiError(message, param="stop", code="array_above_max_length")
    if not all(stop):
        raise ApiError("Invalid 'stop': a sequence must not be empty.", param="stop", code="invalid_value")
    body: dict[str, Any] = {
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repeat_last_n": CONTEXT,
        "stop": stop,
    }
    if request.seed is not None:
        body["seed"] = request.seed % SEEDS
    for name in ("presence_penalty", "frequency_penalty"):
        if (value := getattr(request, name)) is not None:
            body[name] = value
    if bias := request.logit_bias:
        if not all(re.fullmatch("[0-9]{1,9}", token) for token in bias):
            message = "Invalid key in 'logit_bias': keys are token ids."
            raise ApiError(message, param="logit_bias", code="invalid_value")
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
            toolcalls.check_strict(schema, f"response_format {wanted.json_schema.name!r}", "response_format")
    schema = {**schema, "x-guidance": {"whitespace_flexible": False}}
    return checked(
        f"%llguidance {{}}\nstart: %json {json.dumps(schema)}", "response_format", "invalid_json_schema"
    )


def checked(grammar: str, param: str, code: str) -> str:
    """The grammar itself. llama.cpp passes over one that it cannot use; here it is an error."""
    from llguidance import LLMatcher

    matcher = LLMatcher(_byte_tokens(), grammar, log_level=0)
    if matcher.is_error():
        reason = matcher.get_error().splitlines()[0].split("failed to compile JSON schema: ")[-1]
    elif too_many := [n for n in re.findall(r'"(?:min|max)Items": (\d+)', grammar) if int(n) > CONTEXT]:
        reason = f"no array can have {too_many[0]} items in a context of {CONTEXT} tokens"
    elif matcher.compute_bitmask() and matcher.is_stopped():
        reason = "no text satisfies it"
    else:
        return grammar
    raise ApiError(f"Invalid schema for {param}: {reason}.", param=param, code=code)


@cache
def _byte_tokens():
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def several(body: dict, n: int) -> list[dict]:
    """The same request n times, each with a seed of its own where a seed is set."""
    return [
        body | ({"seed": (body["seed"] + number) % SEEDS} if "seed" in body else {}) for number in range(n)
    ]


async def chat(upstream: Upstream, engine: Engine, request: ChatRequest) -> dict:
    """A whole chat completion, as the SDK's `ChatCompletion` reads it."""
    bodies = several(engine_body(request), request.n or 1)
    answers = await asyncio.gather(*(upstream.answer(engine, CHAT, body) for body in bodies))
    first = answers[0]
    first["choices"] = [
        _choice(answer["choices"][0], number, request) for number, answer in enumerate(answers)
    ]
    first["usage"] = _added([answer["usage"] for answer in answers])
    first.pop("timings", None)
    return first


def _choice(choice: dict, index: int, request: ChatRequest) -> dict:
    text = choice["message"]["content"] or ""
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    finish = choice["finish_reason"]
    if request.tools and toolcalls.begins_call(text):
        message["content"] = None  # also where max_tokens cut it off: half a call is no call, and no text
        if call := toolcalls.read_call(text):
            message["tool_calls"] = [call]
            finish = "tool_calls"
    logprobs = _logprobs(choice, request)
    return {"index": index, "message": message, "finish_reason": finish, "logprobs": logprobs}


def _logprobs(choice: dict, request: ChatRequest) -> dict | None:
    if not choice.get("logprobs"):
        return None
    content = [
        _token(item)
        | {"top_logprobs": [_token(t) for t in item["top_logprobs"][: request.top_logprobs or 0]]}
        for item in choice["logprobs"]["content"]
    ]
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


async def prompt_tokens(upstream: Upstream, engine: Engine, request: ChatRequest) -> int:
    """How many tokens the prompt of a chat request has: what its usage will say."""
    messages = {"messages": engine_body(request)["messages"]}
    prompt = (await upstream.post(engine, "/apply-template", messages))["prompt"]
    text = {"content": prompt, "add_special": True, "parse_special": True}
    return len((await upstream.post(engine, "/tokenize", text))["tokens"])


async def chat_stream(
    upstream: Upstream, engine: Engine, request: ChatRequest, stack: AsyncExitStack
) -> AsyncIterator[bytes]:
    """The events of a streamed chat completion, `data: …` lines ready to send, as `ChatCompletionChunk` reads
    them.

    Raises ApiError before the first event where the request is refused.
    """
    bodies = several(engine_body(request), request.n or 1)
    usage = bool(request.stream_options and request.stream_options.include_usage)
    first = await stack.enter_async_context(AsyncExitStack())
    source = await first.enter_async_context(upstream.stream(engine, bodies[0]))
    if len(bodies) == 1 and not request.tools:
        return _relayed(source, usage, request)

    async def begun() -> AsyncIterator[bytes]:
        async with first:
            async for data in source:
                yield data

    async def another(body: dict) -> AsyncIterator[bytes]:
        async with upstream.stream(engine, body) as data_of_this:
            async for data in data_of_this:
                yield data

    return _merged([begun(), *(another(body) for body in bodies[1:])], usage, request)


async def _relayed(source: AsyncIterator[bytes], usage: bool, request: ChatRequest) -> AsyncIterator[bytes]:
    async for data in source:
        if not request.logprobs and data.startswith(TEXT):
            yield b"data: " + data + b"\n\n"  # nearly every event: a piece of text, already in OpenAI's form
        elif chunk := _chunk(json.loads(data), 0, usage, request):
            yield _event(chunk)
    yield b"data: [DONE]\n\n"


def _chunk(chunk: dict, index: int, usage: bool, request: ChatRequest) -> dict | None:
    """A chunk without what is llama.cpp's own; None for a usage that was not asked for."""
    if "error" in chunk:
        return {"error": {"type": "server_error", "param": None, "code": None} | chunk["error"]}
    if not chunk["choices"]:
        if not usage:
            return None
        chunk["usage"] = _added([chunk["usage"]])
    for choice in chunk["choices"]:
        choice["index"] = index
        choice["logprobs"] = _logprobs(choice, request)
        if choice["delta"].get("role"):
            choice["delta"]["content"] = choice["delta"].get("content") or ""
    chunk.pop("timings", None)
    return chunk


def _event(chunk: dict) -> bytes:
    return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _merged(
    sources: list[AsyncIterator[bytes]], usage: bool, request: ChatRequest
) -> AsyncIterator[bytes]:
    """Several answers as one stream; a tool call is held back until it is whole."""
    queue: asyncio.Queue[tuple[int, dict | None]] = asyncio.Queue()
    frame: dict[str, Any] = {}

    async def drain(index: int, source: AsyncIterator[bytes]) -> None:
        try:
            chunks = (json.loads(data) async for data in source)
            async for chunk in _with_calls(chunks) if request.tools else chunks:
                await queue.put((index, chunk))
        except ApiError as error:
            await queue.put((index, error.body))
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
            elif chunk := _chunk(chunk, index, usage, request):
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
            elif not toolcalls.begins_call(held):
                yield _copied(chunk, {"content": held}, None)
            yield _copied(chunk, {}, choice["finish_reason"])
        elif choice["delta"].get("role"):
            yield _copied(chunk, {"role": "assistant", "content": None}, None)
        elif not toolcalls.begins_call(held):
            holding = False
            yield _copied(chunk, {"content": held}, None)


def _copied(chunk: dict, delta: dict, finish: str | None) -> dict:
    return chunk | {"choices": [chunk["choices"][0] | {"delta": delta, "finish_reason": finish}]}


# --- text completions and embeddings ------------------------------------------------------------------------


async def completion(upstream: Upstream, engine: Engine, request: CompletionRequest) -> dict:
    """A text completion, as the SDK's `Completion` reads it.

    With `echo` and `max_tokens=0` the prompt comes back cut into its tokens: `logprobs.tokens` and
    `.text_offset`.
    """
    if request.echo or request.max_tokens == 0:
        if not request.echo or request.max_tokens != 0 or request.logprobs:
            message = "Unsupported: 'echo' goes with max_tokens=0 and logprobs=0 here, and only it does."
            raise ApiError(message, param="echo", code="unsupported_parameter")
        return await _echo(upstream, engine, request)
    body = sampling(request) | {
        "model": request.model,
        "prompt": request.prompt,
        "max_tokens": 16 if request.max_tokens is None else request.max_tokens,
    }
    if request.logprobs is not None:
        body["logprobs"] = max(request.logprobs, 1)
    answer = await upstream.answer(engine, TEXT_COMPLETION, body)
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
    choice = {
        "index": 0,
        "text": choice["text"],
        "finish_reason": choice["finish_reason"],
        "logprobs": logprobs,
    }
    return _completion(request, choice, _added([answer["usage"]]))


def _shown(item: dict) -> str:
    """A token as text; one that is part of a character is written as OpenAI writes it, bytes:\\xf0\\x9f."""
    try:
        return bytes(item["bytes"]).decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in item["bytes"])


async def _echo(upstream: Upstream, engine: Engine, request: CompletionRequest) -> dict:
    found = await upstream.post(
        engine, "/tokenize", {"content": request.prompt, "with_pieces": True, "add_special": False}
    )
    tokens, offsets, data = [], [], b""
    for token in found["tokens"]:
        piece = token["piece"]
        piece = piece.encode() if isinstance(piece, str) else bytes(piece)
        tokens.append(_shown({"bytes": list(piece)}))
        offsets.append(len(data.decode(errors="ignore")))
        data += piece
    logprobs = {"tokens": tokens, "text_offset": offsets, "token_logprobs": None, "top_logprobs": None}
    usage = {"prompt_tokens": len(tokens), "completion_tokens": 0, "total_tokens": len(tokens)}
    return _completion(
        request, {"index": 0, "text": request.prompt, "finish_reason": "length", "logprobs": logprobs}, usage
    )


def _completion(request: CompletionRequest, choice: dict, usage: dict) -> dict:
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
    texts = (
        request.input
        if isinstance(request.input, list) and request.input and not isinstance(request.input[0], int)
        else [request.input]
    )
    if len(texts) > 2048:
        raise ApiError(
            f"Invalid 'input': at most 2048 texts, got {len(texts)}.",
            param="input",
            code="array_above_max_length",
        )
    if any(len(text) == 0 for text in texts):
        raise ApiError("Invalid 'input': a text must not be empty.", param="input", code="invalid_value")
    if request.dimensions not in (None, 384):
        raise ApiError(
            f"This model does not support 'dimensions' other than 384, got {request.dimensions}.",
            param="dimensions",
            code="invalid_value",
        )
    body = {"model": request.model, "input": texts, "encoding_format": request.encoding_format or "float"}
    answer = await upstream.post_once(engine, "/v1/embeddings", body)
    data = [
        {"object": "embedding", "index": item["index"], "embedding": item["embedding"]}
        for item in answer["data"]
    ]
    usage = {key: answer["usage"][key] for key in ("prompt_tokens", "total_tokens")}
    return {"object": "list", "model": request.model, "data": data, "usage": usage}
