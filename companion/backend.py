"""Which side of the wall: an `openai.OpenAI` client of the local endpoint, or of a hosted service.

Local unless the environment says COMPANION_BACKEND=openai, even where an API key lies there, so that nobody
pays without having asked to. With COMPANION_BACKEND=openai the SDK's own variables hold: OPENAI_API_KEY and
OPENAI_BASE_URL.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openai import OpenAI

CHAT_MODEL = "smollm2-135m-instruct"
EMBEDDING_MODEL = "all-minilm-l6-v2"
_HOSTED = ("OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID")  # what the SDK reads
_clients: dict[tuple[str | None, ...], OpenAI] = {}


def is_local() -> bool:
    """Whether `client()` is bound to this machine. Raises ValueError for an unknown COMPANION_BACKEND."""
    side = os.environ.get("COMPANION_BACKEND", "local") or "local"
    if side not in ("local", "openai"):
        raise ValueError(f"COMPANION_BACKEND={side} is unknown: use 'local' (the default) or 'openai'")
    return side == "local"


def client() -> OpenAI:
    """An `openai.OpenAI`, ready to use; cheap to call again.

    Local: starts the endpoint where none runs (and fetches the models, 176 MB, the first time). Hosted: what
    `openai.OpenAI()` makes of the environment. Raises `companion.local.process.EndpointError` or
    `companion.local.weights.WeightsError` (both RuntimeError) where there is nothing to talk to.
    """
    import openai

    if not is_local():
        key = tuple(os.environ.get(name) for name in _HOSTED)
        if key not in _clients:
            _clients[key] = openai.OpenAI()
        return _clients[key]
    from companion.local import process

    endpoint = process.ensure()
    key = (endpoint.base_url, endpoint.token)
    if key not in _clients:
        _clients[key] = openai.OpenAI(
            base_url=endpoint.base_url, api_key=endpoint.token, max_retries=0, timeout=600
        )
    return _clients[key]


def chat_model() -> str:
    """The name of the chat model that chapters use: the course's own, or on a hosted service OPENAI_MODEL."""
    return _model("OPENAI_MODEL", CHAT_MODEL)


def embedding_model() -> str:
    """The name of the embedding model: the course's own, or on a hosted service OPENAI_EMBEDDING_MODEL."""
    return _model("OPENAI_EMBEDDING_MODEL", EMBEDDING_MODEL)


def _model(variable: str, own: str) -> str:
    if is_local():
        return own
    if named := os.environ.get(variable):
        return named
    served = client()
    if own in (model.id for model in served.models.list()):
        return own
    raise ValueError(
        f"{served.base_url} does not serve {own}: set {variable} to the model you want to use and pay for"
    )
