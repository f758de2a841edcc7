"""The routes of /v1/fine_tuning/jobs: what may be asked of a job, and what a job says of itself.

Routes write what is wanted to the store; `companion.local.supervisor` makes it so. Supervised fine-tuning of
the chat models of the course is offered; other methods and integrations are refused.
"""

import asyncio
import re
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable, Iterable
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr

from . import weights
from .store import ACTIVE, UNFINISHED, Store, new_id, reported
from .supervisor import Supervisor, drop_data, take_data
from .wire import ApiError, parse
from .wire import Request as Body

NEEDED = ("torch", "transformers", "peft")  # what the extra `train` installs
SWITCHES = {  # from which statuses to which, and the word for it
    "cancel": (UNFINISHED, "cancelled", "cancelled"),
    "pause": (("queued", "running"), "paused", "paused"),
    "resume": (("paused",), "queued", "resumed"),
}


class Hyperparameters(BaseModel):
    """OpenAI's three, and the number of evaluations without gain after which training stops."""

    model_config = ConfigDict(extra="allow")
    n_epochs: Literal["auto"] | Annotated[StrictInt, Field(ge=1, le=50)] | None = None
    batch_size: Literal["auto"] | Annotated[StrictInt, Field(ge=1, le=256)] | None = None
    learning_rate_multiplier: Literal["auto"] | Annotated[StrictFloat, Field(ge=0.001, le=100)] | None = None
    early_stopping_patience: Annotated[StrictInt, Field(ge=1, le=1000)] | None = None


class Supervised(BaseModel):
    hyperparameters: Hyperparameters | None = None


class Method(BaseModel):
    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None


class JobRequest(Body):
    """POST /v1/fine_tuning/jobs."""

    training_file: StrictStr
    validation_file: StrictStr | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    suffix: StrictStr | None = Field(default=None, pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    seed: StrictInt | None = Field(default=None, ge=0, le=2**31 - 1)
    metadata: dict[str, StrictStr] | None = None
    integrations: list[Any] | None = None


class PageQuery(BaseModel):
    """What the lists may be asked for."""

    after: str | None = None
    limit: int = Field(default=20, ge=1, le=1000)


def routes(store: Store, supervisor: Supervisor, body: Callable[[Request], Awaitable[Any]]) -> APIRouter:
    """The routes, on this store. body: reads the JSON of a request."""
    router = APIRouter(prefix="/v1/fine_tuning/jobs")

    @router.post("")
    async def create(request: Request) -> dict:
        asked = parse(JobRequest, await body(request))
        job = await asyncio.to_thread(create_job, store, asked)
        supervisor.wake()
        return job

    @router.get("")
    def list_jobs(request: Request) -> dict:
        query = request.query_params
        named = ((re.fullmatch(r"metadata\[(.*)\]", name), value) for name, value in query.multi_items())
        metadata = {found[1]: value for found, value in named if found}
        return _page(
            request,
            lambda page: store.jobs(
                None if query.get("metadata") == "null" else metadata, page.after, page.limit
            ),
        )

    @router.get("/{job_id}")
    def retrieve(job_id: str) -> dict:
        return _known(store, job_id)

    @router.get("/{job_id}/events")
    def list_events(request: Request, job_id: str) -> dict:
        _known(store, job_id)
        return _page(request, lambda page: store.events(job_id, page.after, page.limit))

    @router.get("/{job_id}/checkpoints")
    def list_checkpoints(request: Request, job_id: str) -> dict:
        _known(store, job_id)
        return _page(request, lambda page: store.checkpoints(job_id, page.after, page.limit))

    def changed(job_id: str, switch: str) -> dict:
        _known(store, job_id)
        job = switch_job(store, job_id, switch)
        supervisor.wake()
        return job

    @router.post("/{job_id}/cancel")
    def cancel(job_id: str) -> dict:
        return changed(job_id, "cancel")

    @router.post("/{job_id}/pause")
    def pause(job_id: str) -> dict:
        return changed(job_id, "pause")

    @router.post("/{job_id}/resume")
    def resume(job_id: str) -> dict:
        return changed(job_id, "resume")

    return router


def _page(request: Request, found: Callable[[PageQuery], dict]) -> dict:
    asked = parse(PageQuery, dict(request.query_params))
    try:
        return found(asked)
    except LookupError:
        raise ApiError(f"There is no object {asked.after!r}.", param="after", code="invalid_value") from None


def _known(store: Store, job_id: str) -> dict:
    if job := store.job(job_id):
        return job
    message = f"Could not find fine tune: {job_id}"
    raise ApiError(message, status=404, param="fine_tune_id", code="fine_tune_not_found")


def create_job(store: Store, asked: JobRequest) -> dict:
    """A new job, whose files are validated next. Raises ApiError for what is not offered."""
    numbers = _hyperparameters(asked)
    _check_model(asked.model)
    _check_metadata(asked.metadata or {})
    if asked.integrations:
        message = "Unsupported parameter: 'integrations'. Read the events of the job, or its result file."
        raise ApiError(message, param="integrations", code="unsupported_parameter")
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        message = f"Training needs {', '.join(missing)}: run `pip install 'companion[train]'` first."
        raise ApiError(message, code="training_not_installed")
    job_id = new_id("ftjob-")
    job = {
        "object": "fine_tuning.job",
        "id": job_id,
        "created_at": int(time.time()),
        "error": None,
        "fine_tuned_model": None,
        "finished_at": None,
        "hyperparameters": numbers,
        "model": asked.model,
        "organization_id": "org-personal",
        "result_files": [],
        "seed": secrets.randbelow(2**31) if asked.seed is None else asked.seed,
        "status": "validating_files",
        "trained_tokens": None,
        "training_file": asked.training_file,
        "validation_file": asked.validation_file,
        "estimated_finish": None,
        "integrations": [],
        "metadata": asked.metadata,
        "method": {"type": "supervised", "supervised": {"hyperparameters": numbers}},
        "user_provided_suffix": asked.suffix,
    }
    folder = store.job_folder(job_id)
    try:
        with reported(store.folder):
            folder.mkdir()
        for param in ("training_file", "validation_file"):
            if job[param] is not None:
                _take_file(store, job_id, param, job[param])
        with store.change():
            store.add_job(job)
            store.add_event(job_id, "created", f"Created fine-tuning job: {job_id}")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return job


def _take_file(store: Store, job_id: str, param: str, file_id: str) -> None:
    file = store.file(file_id)
    if file and file["purpose"] != "fine-tune":
        message = f"Invalid file purpose: '{param}' has the purpose {file['purpose']!r}, not 'fine-tune'."
        raise ApiError(message, param=param, code="invalid_file_purpose")
    with reported(store.folder):
        try:
            if file:
                return take_data(store, job_id, param, file_id)
        except FileNotFoundError:  # deleted meanwhile
            pass
    raise ApiError(f"invalid {param}: {file_id}", param=param, code="file_not_found")


def _hyperparameters(asked: JobRequest) -> dict:
    method, place, given = asked.method, "hyperparameters", asked.hyperparameters
    if method and method.type != "supervised":
        message = f"The method '{method.type}' is not offered: this endpoint trains with 'supervised'."
        raise ApiError(message, param="method.type", code="unsupported_value")
    if method and method.supervised and method.supervised.hyperparameters:
        place, given = "method.supervised.hyperparameters", method.supervised.hyperparameters
    given = given or Hyperparameters()
    for name in given.model_extra or {}:
        message = f"Unknown parameter: '{place}.{name}'."
        raise ApiError(message, param=f"{place}.{name}", code="unknown_parameter")
    if given.early_stopping_patience and not asked.validation_file:
        param = f"{place}.early_stopping_patience"
        message = f"'{param}' needs a 'validation_file': training stops when its loss no longer falls."
        raise ApiError(message, param=param, code="missing_required_parameter")
    names = ("n_epochs", "batch_size", "learning_rate_multiplier")
    numbers = {name: "auto" if (value := getattr(given, name)) is None else value for name in names}
    if given.early_stopping_patience:
        numbers["early_stopping_patience"] = given.early_stopping_patience
    return numbers


def _check_model(name: str) -> None:
    entry = weights.MODELS.get(name)
    if entry is None or entry.kind != "chat":
        offered = ", ".join(name for name, entry in weights.MODELS.items() if entry.kind == "chat")
        message = f"Model {name} is not available for fine-tuning or does not exist; tune {offered}."
        raise ApiError(message, param="model", code="model_not_available")


def _check_metadata(metadata: dict[str, str]) -> None:
    if len(metadata) > 16:
        message = f"Invalid 'metadata': at most 16 pairs, got {len(metadata)}."
        raise ApiError(message, param="metadata", code="object_above_max_properties")
    for key, value in metadata.items():
        if len(key) > 64 or len(value) > 512:
            message = "Invalid 'metadata': a key has at most 64 characters, a value at most 512."
            raise ApiError(message, param="metadata", code="string_above_max_length")


def switch_job(store: Store, job_id: str, switch: str) -> dict:
    """Cancel, pause or resume a job. Raises ApiError where its status does not allow that."""
    among, status, done = SWITCHES[switch]
    finished = {"finished_at": int(time.time())} if status == "cancelled" else {}
    with store.change():
        job = store.update_job(job_id, among, status=status, estimated_finish=None, **finished)
        if job:
            store.add_event(job_id, new_id(f"{switch}-"), f"Fine-tuning job {done}")
    if job is None:
        status = store.job(job_id)["status"]
        message = f"The job {job_id} is {status}: only one that is {_or(among)} can be {done}."
        raise ApiError(message, code="invalid_job_status")
    if finished:
        drop_data(store, job_id)
    return job


def _or(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def delete_model(store: Store, name: str) -> None:
    """Remove a fine-tuned model and its files; the job that made it stays."""
    model = store.model(name)
    if model is None:
        return
    if store.job(model.job)["status"] in (*ACTIVE, "paused"):
        message = (
            f"The model '{name}' belongs to the job {model.job}, which is not finished: cancel it first."
        )
        raise ApiError(message, param="model", code="model_in_use")
    store.forget_model(name)
    shutil.rmtree(model.adapter.parent, ignore_errors=True)
