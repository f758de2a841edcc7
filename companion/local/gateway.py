"""The HTTP API: OpenAI's routes, on a loopback port, for one user.

`python -m companion.local.gateway` is what `companion.local.process` starts in the background and `companion serve` in
the foreground. Routes, bodies and errors follow https://platform.openai.com/docs/api-reference; what an answer says is
llama.cpp's work. Every route asks for the token.
"""

import argparse
import asyncio
import contextlib
import hmac
import json
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from . import completions, process, responses, weights
from .engine import Engine, Engines
from .wire import ApiError, ChatRequest, CompletionRequest, EmbeddingRequest, ResponsesRequest, parse

log = logging.getLogger("companion.endpoint")
CREATED = 1731369600  # SmolLM2's release, November 2024
LARGEST_BODY = 32 << 20  # bytes


class State:
    """What the endpoint holds while it runs."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.engines = Engines(load)
        self.upstream = completions.Upstream()
        self.conversations = responses.Conversations()
        self.last_request = time.monotonic()
        self.open_requests = 0


def load(name: str) -> Engine:
    """Start the engine of a model of the course."""
    entry = weights.weights(name)
    return Engine(weights.path(name, progress=False), name, entry.kind)


def create_app(token: str, lifespan=None) -> FastAPI:
    """The application. token: what `Authorization: Bearer` must carry. lifespan: run around its life, if given."""
    app = FastAPI(title="companion", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    state = app.state.held = State(token)

    @app.middleware("http")
    async def authorised(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if not hmac.compare_digest(given.encode(), state.token.encode()):
            message = "You didn't provide an API key." if not given else "Incorrect API key provided."
            return _error(ApiError(f"{message} `companion serve` prints the key of this endpoint.", status=401, code="invalid_api_key"))
        return await call_next(request)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return _error(error)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path}"
        if error.status_code == 405:
            return _error(ApiError(f"Not allowed to {what}.", status=405, code="method_not_supported"))
        return _error(ApiError(f"Invalid URL ({what})", status=error.status_code, code="unknown_url"))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        log.exception("%s %s", request.method, request.url.path)
        return _error(ApiError(f"The endpoint failed: {type(error).__name__}.", status=500, type="server_error"))

    @app.get("/v1/models")
    async def list_models() -> dict:
        return {"object": "list", "data": [_model(name) for name in weights.MODELS]}

    @app.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> dict:
        _known(name)
        return _model(name)

    @app.delete("/v1/models/{name:path}")
    async def delete_model(name: str) -> dict:
        _known(name)
        raise ApiError(f"The model '{name}' ships with the course and cannot be deleted.", status=403, code="model_not_deletable")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = parse(ChatRequest, await _body(request))
        engine = await _engine(state, asked.model, "chat")
        if not asked.stream:
            return await _whole(state, request, completions.chat(state.upstream, engine, asked))
        return await _streamed(state, lambda stack: completions.chat_stream(state.upstream, engine, asked, stack))

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        asked = parse(CompletionRequest, await _body(request))
        engine = await _engine(state, asked.model, "chat")
        return await _whole(state, request, completions.completion(state.upstream, engine, asked))

    @app.post("/v1/embeddings")
    async def embed(request: Request) -> Response:
        asked = parse(EmbeddingRequest, await _body(request))
        engine = await _engine(state, asked.model, "embedding")
        return await _whole(state, request, completions.embeddings(state.upstream, engine, asked))

    @app.post("/v1/responses")
    async def respond(request: Request) -> Response:
        asked = parse(ResponsesRequest, await _body(request))
        engine = await _engine(state, asked.model, "chat")
        chat_request, messages = responses.chat_request(asked, state.conversations)

        async def answer() -> dict:
            found = responses.response(asked, await completions.chat(state.upstream, engine, chat_request))
            state.conversations.keep(found, asked, messages)
            return found

        async def stream(stack: AsyncExitStack) -> AsyncIterator[bytes]:
            with_usage = parse(ChatRequest, chat_request.model_dump(by_alias=True, exclude_none=True) | {"stream_options": {"include_usage": True}})
            chunks = await completions.chat_stream(state.upstream, engine, with_usage, stack)
            return responses.events(asked, state.conversations, messages, chunks)

        return await (_streamed(state, stream) if asked.stream else _whole(state, request, answer()))

    return app


def _error(error: ApiError) -> Response:
    return JSONResponse(error.body, status_code=error.status)


def _known(name: str) -> None:
    if name not in weights.MODELS:
        raise ApiError(
            f"The model '{name}' does not exist; this endpoint has {', '.join(weights.MODELS)}.",
            status=404,
            param="model",
            code="model_not_found",
        )


def _model(name: str) -> dict:
    return {"id": name, "object": "model", "created": CREATED, "owned_by": "companion", "shutdown_date": None}


async def _body(request: Request):
    try:
        raw = await request.body()
        if len(raw) > LARGEST_BODY:
            raise ApiError(f"The body is {len(raw)} bytes long; at most {LARGEST_BODY} are taken.", status=413)
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise ApiError("We could not parse the JSON body of your request.", code="invalid_json") from None


async def _engine(state: State, name: str, kind: str) -> Engine:
    _known(name)
    if weights.MODELS[name].kind != kind:
        raise ApiError(
            f"The model '{name}' is no {kind} model; it serves {weights.MODELS[name].kind}.", param="model", code="model_not_supported"
        )
    state.last_request = time.monotonic()
    try:
        return await asyncio.to_thread(state.engines.get, name)
    except weights.WeightsError as error:
        raise ApiError(str(error), status=503, type="server_error", code="model_not_available") from None


@contextlib.contextmanager
def _counted(state: State):
    state.open_requests += 1
    try:
        yield
    finally:
        state.open_requests -= 1
        state.last_request = time.monotonic()


async def _whole(state: State, request: Request, answer: Awaitable[dict]) -> Response:
    """The answer, computed while the client waits for it: one that goes away ends the work and frees its slots."""
    with _counted(state):
        work = asyncio.ensure_future(answer)
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return Response(json.dumps(work.result(), ensure_ascii=False), media_type="application/json")
            return Response(status_code=499)
        finally:
            work.cancel()
            gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _streamed(state: State, start: Callable[[AsyncExitStack], Awaitable[AsyncIterator[bytes]]]) -> Response:
    """Server-sent events; `start` may still refuse before the first one is sent."""
    stack = AsyncExitStack()
    stack.enter_context(_counted(state))
    try:
        source = await start(stack)
    except BaseException:
        await stack.aclose()
        raise

    async def send() -> AsyncIterator[bytes]:
        async with stack:
            async for event in source:
                yield event

    return StreamingResponse(send(), media_type="text/event-stream", headers={"cache-control": "no-cache"})


def serve(*, host: str = "127.0.0.1", port: int = 0, token: str | None = None, idle: float = 0, shared: bool = True) -> None:
    """Run the endpoint until it is stopped.

    port: 0 takes a free one. token: None draws one. idle: leave after so many seconds without a request, once no
    process that asked for a `client()` is alive; 0 never leaves. shared: let `companion.client()` find this endpoint.
    Raises OSError where the port is taken.
    """
    sock = socket.socket()
    if os.name == "posix":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
    sock.listen(256)
    token = token or f"local-{secrets.token_urlsafe(24)}"
    base_url = f"http://{host}:{sock.getsockname()[1]}/v1"
    server: uvicorn.Server

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state: State = app.state.held
        warm = asyncio.create_task(asyncio.to_thread(_warm, state))
        watch = asyncio.create_task(_leave_when_idle(state, idle, lambda: setattr(server, "should_exit", True)))
        if shared:
            process.announce(process.Endpoint(base_url, token, os.getpid()))
        else:
            print(f"OPENAI_BASE_URL={base_url}\nOPENAI_API_KEY={token}", flush=True)
        yield
        watch.cancel()
        await warm
        await state.upstream.http.aclose()
        state.engines.close()

    config = uvicorn.Config(create_app(token, lifespan), log_level="warning", access_log=False, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    server.run(sockets=[sock])


def _warm(state: State) -> None:
    """Load the chat model before it is first asked for; where that fails, the first request says why."""
    with contextlib.suppress(weights.WeightsError, RuntimeError):
        state.engines.get(next(name for name, entry in weights.MODELS.items() if entry.kind == "chat"))


async def _leave_when_idle(state: State, idle: float, leave: Callable[[], None]) -> None:
    while idle:
        await asyncio.sleep(min(idle / 4, 15))
        if state.open_requests or time.monotonic() - state.last_request < idle:
            continue
        await asyncio.to_thread(state.engines.close)
        if not process.leases():
            leave()
            return


def main() -> None:
    """The background endpoint's command line; people use `companion serve`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--token", default=os.environ.get("COMPANION_ENDPOINT_TOKEN"))
    parser.add_argument("--idle", type=float, default=process.IDLE)
    given = parser.parse_args()
    try:
        serve(port=given.port, token=given.token, idle=given.idle)
    except OSError:
        if not given.port:
            raise
        serve(token=given.token, idle=given.idle)  # the port of the last time is taken now


if __name__ == "__main__":
    sys.exit(main())
