"""The HTTP API: OpenAI's routes, on a loopback port, for one user.

`python -m companion.local.gateway` is what `companion.local.process` starts in the background and `companion
serve` in the foreground. Routes, bodies and errors follow https://platform.openai.com/docs/api-reference;
what an answer says is llama.cpp's work. Every route asks for the token.
"""

import argparse
import asyncio
import contextlib
import functools
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
from typing import TypeVar

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from . import completions, files, jobs, memory, process, responses, weights
from .engine import Engine, Engines
from .store import Store, StoreError
from .supervisor import Supervisor
from .wire import ApiError, ChatRequest, CompletionRequest, EmbeddingRequest, ResponsesRequest, decoded, parse

log = logging.getLogger("companion.endpoint")
CREATED = 1731369600  # SmolLM2's release, November 2024
LARGEST_BODY = 32 << 20  # bytes
REST = 15.0  # seconds between two looks at whether there is anything to do
Found = TypeVar("Found")


class State:
    """What the endpoint holds while it runs."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.store = Store()
        self.supervisor = Supervisor(self.store)
        self.engines = Engines(functools.partial(load, self.store, key=token))
        self.upstream = completions.Upstream()
        self.conversations = responses.Conversations()
        self.last_request = time.monotonic()
        self.open_requests = 0


def load(store: Store, name: str, key: str) -> Engine:
    """Start the engine of a model, the course's or a fine-tuned one. key: what it asks for in turn."""
    if tuned := store.model(name):
        base = weights.path(tuned.base, progress=False)
        return Engine(base, name, "chat", adapters=[tuned.adapter], key=key)
    _known(store, name)
    entry = weights.weights(name)
    return Engine(weights.path(name, progress=False), name, entry.kind, key=key)


class Door:
    """Lets in who has the token, and keeps count of who is inside."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self.app = app
        self.state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.state.token.encode()):
            message = (
                "Incorrect API key provided."
                if given
                else "You didn't provide an API key in a Bearer header."
            )
            message += " `companion serve` prints the key of this endpoint."
            return await _error(ApiError(message, status=401, code="invalid_api_key"))(scope, receive, send)
        self.state.open_requests += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.state.open_requests -= 1
            self.state.last_request = time.monotonic()


def create_app(token: str, lifespan=None) -> FastAPI:
    """The application. token: what a request must carry. lifespan: run around its life, if given."""
    app = FastAPI(title="companion", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    state = app.state.held = State(token)

    app.add_middleware(Door, state=state)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return _error(error)

    @app.exception_handler(StoreError)
    async def not_stored(request: Request, error: StoreError) -> Response:
        status, code = (507, "insufficient_storage") if error.full else (500, None)
        return _error(ApiError(str(error), status=status, type="server_error", code=code))

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path}"
        if error.status_code == 405:
            return _error(ApiError(f"Not allowed to {what}.", status=405, code="method_not_supported"))
        return _error(ApiError(f"Invalid URL ({what})", status=error.status_code, code="unknown_url"))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        log.exception("%s %s", request.method, request.url.path)
        return _error(
            ApiError(f"The endpoint failed: {type(error).__name__}.", status=500, type="server_error")
        )

    app.include_router(files.routes(state.store))
    app.include_router(jobs.routes(state.store, state.supervisor, _body))

    @app.get("/v1/models")
    def list_models() -> dict:
        return {"object": "list", "data": _models(state.store)}

    @app.get("/v1/models/{name:path}")
    def retrieve_model(name: str) -> dict:
        _known(state.store, name)
        return next(model for model in _models(state.store) if model["id"] == name)

    @app.delete("/v1/models/{name:path}")
    def delete_model(name: str) -> dict:
        _known(state.store, name)
        if name in weights.MODELS:
            message = f"The model '{name}' ships with the course and cannot be deleted."
            raise ApiError(message, status=403, param="model", code="model_not_deletable")
        jobs.delete_model(state.store, name)
        state.engines.drop(name)
        return {"id": name, "object": "model", "deleted": True}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = parse(ChatRequest, await _body(request))

        async def stream(stack: AsyncExitStack) -> AsyncIterator[bytes]:
            engine = await stack.enter_async_context(_engine(state, asked.model, "chat"))
            return await completions.chat_stream(state.upstream, engine, asked, stack)

        if asked.stream:
            return await _streamed(request, stream)
        async with _engine(state, asked.model, "chat") as engine:
            return await _whole(request, completions.chat(state.upstream, engine, asked))

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        asked = parse(CompletionRequest, await _body(request))
        async with _engine(state, asked.model, "chat") as engine:
            return await _whole(request, completions.completion(state.upstream, engine, asked))

    @app.post("/v1/embeddings")
    async def embed(request: Request) -> Response:
        asked = parse(EmbeddingRequest, await _body(request))
        async with _engine(state, asked.model, "embedding") as engine:
            return await _whole(request, completions.embeddings(state.upstream, engine, asked))

    @app.post("/v1/responses")
    async def respond(request: Request) -> Response:
        asked = parse(ResponsesRequest, await _body(request))
        chat_request, messages = responses.chat_request(asked, state.conversations)

        async def stream(stack: AsyncExitStack) -> AsyncIterator[bytes]:
            engine = await stack.enter_async_context(_engine(state, asked.model, "chat"))
            with responses.in_own_terms(asked, messages):
                chunks = await completions.chat_stream(state.upstream, engine, chat_request, stack)
            return responses.events(asked, state.conversations, messages, chunks)

        if asked.stream:
            return await _streamed(request, stream)

        async def answer() -> dict:
            found = responses.response(asked, await completions.chat(state.upstream, engine, chat_request))
            state.conversations.keep(found, asked, messages)
            return found

        async with _engine(state, asked.model, "chat") as engine:
            with responses.in_own_terms(asked, messages):
                return await _whole(request, answer())

    @app.post("/v1/responses/input_tokens")
    async def count_input(request: Request) -> Response:
        asked = parse(ResponsesRequest, await _body(request))
        chat_request, messages = responses.chat_request(asked, state.conversations)

        async with _engine(state, asked.model, "chat") as engine:
            with responses.in_own_terms(asked, messages):
                tokens = await completions.prompt_tokens(state.upstream, engine, chat_request)
        return JSONResponse({"object": "response.input_tokens", "input_tokens": tokens})

    return app


def _error(error: ApiError) -> Response:
    return JSONResponse(error.body, status_code=error.status)


def _models(store: Store) -> list[dict]:
    own = {"object": "model", "created": CREATED, "owned_by": "companion", "shutdown_date": None}
    return [own | {"id": name} for name in weights.MODELS] + store.models()


def _known(store: Store, name: str, kind: str | None = None) -> None:
    """Raise ApiError where there is no such model, or it is not of this kind."""
    entry = weights.MODELS.get(name)
    if not entry and not store.model(name):
        names = ", ".join(model["id"] for model in _models(store))
        message = f"The model '{name}' does not exist; this endpoint has {names}."
        raise ApiError(message, status=404, param="model", code="model_not_found")
    serves = entry.kind if entry else "chat"
    if kind and serves != kind:
        message = f"The model '{name}' is no {kind} model; it serves {serves}."
        raise ApiError(message, param="model", code="model_not_supported")


async def _body(request: Request):
    raw, size = bytearray(), 0
    async for (
        piece
    ) in request.stream():  # to its end, since a client that still writes would not read the refusal
        size += len(piece)
        raw += piece if size <= LARGEST_BODY else b""
    if size > LARGEST_BODY:
        raise ApiError(f"The body is {size} bytes long; at most {LARGEST_BODY} are taken.", status=413)
    return decoded(bytes(raw))


@asynccontextmanager
async def _engine(state: State, name: str, kind: str) -> AsyncIterator[Engine]:
    def ready() -> Engine:
        _known(state.store, name, kind)
        return state.engines.get(name)

    with state.engines.use(name):
        try:
            engine = await asyncio.to_thread(ready)
        except StoreError:  # a RuntimeError too, with an answer of its own
            raise
        except RuntimeError as error:  # WeightsError among them
            raise ApiError(str(error), status=503, type="server_error", code="model_not_available") from None
        yield engine


async def _whole(request: Request, answer: Awaitable[dict]) -> Response:
    found = await _while_there(request, answer)
    return Response(json.dumps(found, ensure_ascii=False), media_type="application/json")


async def _while_there(request: Request, work: Awaitable[Found]) -> Found:
    """What `work` finds. A client that goes away ends it, and frees its slots."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError("The client has gone.", status=499)
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Events(StreamingResponse):
    """Server-sent events. What they come from is closed with them, even where not one was sent."""

    def __init__(self, source: AsyncIterator[bytes], stack: AsyncExitStack) -> None:
        super().__init__(source, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self.stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.stack:
            await super().__call__(scope, receive, send)


async def _streamed(
    request: Request, start: Callable[[AsyncExitStack], Awaitable[AsyncIterator[bytes]]]
) -> Response:
    """Server-sent events; `start` may still refuse before the first one is sent."""
    stack = AsyncExitStack()
    try:
        return Events(await _while_there(request, start(stack)), stack)
    except BaseException:
        await stack.aclose()
        raise


def serve(
    *, host: str = "127.0.0.1", port: int = 0, token: str | None = None, idle: float = 0, shared: bool = True
) -> None:
    """Run the endpoint until it is stopped.

    port: 0 takes a free one. token: None draws one. idle: leave after so many seconds without a request, once
    no process that asked for a `client()` is alive; 0 never leaves. shared: let `companion.client()` find
    this endpoint. Raises ValueError for a port that does not exist, OSError where it is taken.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port {port} does not exist: take one from 1 to 65535, or 0 for a free one")
    sock = socket.socket()
    if os.name == "posix":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(256)
    except OSError as error:
        sock.close()
        raise OSError(
            f"the endpoint cannot listen on port {port} of {host} ({error.strerror or error}): give another "
            f"--port, or --port 0 for a free one"
        ) from error
    token = token or f"local-{secrets.token_urlsafe(24)}"
    base_url = f"http://{host}:{sock.getsockname()[1]}/v1"
    server: uvicorn.Server

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state: State = app.state.held
        warm = asyncio.create_task(asyncio.to_thread(_warm, state))
        watch = asyncio.create_task(_at_rest(state, idle, lambda: setattr(server, "should_exit", True)))
        state.supervisor.start()
        if shared:
            process.announce(process.Endpoint(base_url, token, os.getpid()))
        else:
            print(f"OPENAI_BASE_URL={base_url}\nOPENAI_API_KEY={token}", flush=True)
        yield
        watch.cancel()
        await asyncio.to_thread(state.supervisor.close)
        await warm
        await state.upstream.close()
        state.engines.close()

    config = uvicorn.Config(
        create_app(token, lifespan), log_level="warning", access_log=False, timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    server.run(sockets=[sock])


def _warm(state: State) -> None:
    """Load the chat model before it is first asked for; where that fails, the first request says why."""
    with contextlib.suppress(weights.WeightsError, RuntimeError):
        state.engines.get(next(name for name, entry in weights.MODELS.items() if entry.kind == "chat"))


async def _at_rest(state: State, idle: float, leave: Callable[[], None]) -> None:
    """Between requests: memory goes back to the system; after `idle` seconds models, then the process, go."""
    tidied = 0.0
    while True:
        await asyncio.sleep(min(idle / 4, REST) if idle else REST)
        if state.open_requests:
            continue
        if state.last_request > tidied:
            tidied = time.monotonic()
            await asyncio.to_thread(memory.trim)
        if not idle or time.monotonic() - state.last_request < idle:
            continue
        await asyncio.to_thread(state.engines.close)
        if not state.store.busy() and not process.leases():
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
