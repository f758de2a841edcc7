"""A fine-tuning job from file to fine-tuned model: submit it, watch it, read its curves.

Works on whatever serves OpenAI's API of files and fine-tuning jobs: the local endpoint, or the hosted service
that `companion.client()` is bound to. It trains nothing and keeps nothing: a job goes on without it, and
another process can follow the same job.
"""

from __future__ import annotations

import base64
import html
import io
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from companion import backend, dataset

if TYPE_CHECKING:
    import pandas as pd
    from openai import OpenAI
    from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

    Examples = str | os.PathLike | Iterable[dataset.Example]

METRICS = ("train_loss", "valid_loss", "train_mean_token_accuracy", "valid_mean_token_accuracy")
ENDED = ("succeeded", "failed", "cancelled")
STATES = {
    "validating_files": "is checking its files",
    "queued": "waits for its turn",
    "succeeded": "has succeeded",
    "failed": "has failed",
    "cancelled": "was cancelled",
}
PATIENCE = 300  # seconds without an answer from the endpoint before `follow` gives up


class FineTuningError(RuntimeError):
    """A job that failed, in its own words."""


def fine_tune(
    training: Examples,
    validation: Examples | None = None,
    *,
    model: str | None = None,
    suffix: str | None = None,
    n_epochs: int | Literal["auto"] = "auto",
    batch_size: int | Literal["auto"] = "auto",
    learning_rate_multiplier: float | Literal["auto"] = "auto",
    seed: int | None = None,
    early_stopping_patience: int | None = None,
    reuse: bool = False,
    client: OpenAI | None = None,
) -> FineTuningJob:
    """Upload examples and start a job on them: supervised fine-tuning. Returns at once; see `follow`.

    Args:
        training: a JSONL file, or examples as `companion.dataset` has them.
        validation: the same, to watch the training with.
        model: the model to start from; the backend's chat model if None.
        suffix: a name of your own within the tuned model's name.
        n_epochs: how often each example is seen.
        batch_size: how many examples make one step.
        learning_rate_multiplier: of the learning rate that the endpoint takes by itself.
        seed: the same job with the same seed gives the same model; drawn by the endpoint if None.
        early_stopping_patience: stop when the validation loss has not fallen for so many epochs. Not sent to
            a hosted service, which has no such thing.
        reuse: return a job that has succeeded with all of this already, if its model still exists, instead
            of training once more. What is "auto" or None here may have been anything there.
        client: an `openai.OpenAI`; the backend's if None.

    Raises:
        companion.dataset.DatasetError: examples that cannot be used; nothing was sent.
        openai.OpenAIError: what the endpoint refused; what was uploaded is removed again.
    """
    numbers: dict[str, Any] = {
        "n_epochs": n_epochs,
        "batch_size": batch_size,
        "learning_rate_multiplier": learning_rate_multiplier,
    }
    if early_stopping_patience is not None and backend.is_local():
        numbers["early_stopping_patience"] = early_stopping_patience
    elif early_stopping_patience is not None:
        warnings.warn("hosted services know no early stopping: training runs to its end", stacklevel=2)
    with TemporaryDirectory() as folder:
        paths = {"training_file": _checked(training, Path(folder, "training.jsonl"))}
        if validation is not None:
            paths["validation_file"] = _checked(validation, Path(folder, "validation.jsonl"))
        client = client or backend.client()
        request: dict[str, Any] = {"model": model or backend.chat_model()}
        request |= {name: value for name, value in (("suffix", suffix), ("seed", seed)) if value is not None}
        if reuse and (job := _done_before(client, request, numbers, paths)):
            return job
        uploaded = []
        try:
            for param, path in paths.items():
                file = client.files.create(file=path, purpose="fine-tune")
                uploaded.append(file.id)
                request[param] = file.id
                if file.status != "processed":  # Azure takes no file for a job before it has looked at it
                    client.files.wait_for_processing(file.id)
            method = {"type": "supervised", "supervised": {"hyperparameters": numbers}}
            return client.fine_tuning.jobs.create(**request, method=method)
        except BaseException:
            for file in uploaded:
                with suppress(Exception):  # the first error is the one to be told
                    client.files.delete(file)
            raise


def _done_before(
    client: OpenAI, request: dict[str, Any], numbers: dict[str, Any], paths: dict[str, Path]
) -> FineTuningJob | None:
    """The newest job that succeeded with the same request, hyperparameters and files, and has its model."""
    from openai import NotFoundError

    models = {model.id for model in client.models.list()}
    for job in client.fine_tuning.jobs.list(limit=100):
        given = job.hyperparameters.model_dump()
        name = job.fine_tuned_model or ""
        same = (
            job.status == "succeeded"
            and name in models
            and job.model == request["model"]
            and request.get("seed", job.seed) == job.seed
            and f":{request.get('suffix', '')}:" in name
            and all(given.get(key) == value for key, value in numbers.items() if value != "auto")
            and (job.validation_file is not None) == ("validation_file" in paths)
        )
        try:
            if same and all(
                client.files.content(getattr(job, param)).content == path.read_bytes()
                for param, path in paths.items()
            ):
                return job
        except NotFoundError:  # its files were deleted: nobody can say what it was trained on
            continue
    return None


def _checked(examples: Examples, target: Path) -> Path:
    """The path of a file that validates: the one given, or `target`, to which a list is written."""
    if not isinstance(examples, str | os.PathLike):
        dataset.save(examples, target)
        return target
    if problems := dataset.validate(examples):
        raise dataset.DatasetError(problems, examples)
    return Path(examples)


def follow(job: FineTuningJob | str, *, client: OpenAI | None = None, plot: bool = True) -> FineTuningJob:
    """Wait until a job has ended and show how it goes: a bar, and in Jupyter its losses. Returns the job.

    A job that is queued or paused is waited for. Ctrl-C (or the kernel's stop button) ends the watching, not
    the job, and returns the job as it stands. An endpoint that is away is asked again for 5 minutes, and the
    local one is started where it does not run.

    Args:
        job: a job, or its id.
        client: an `openai.OpenAI`; the backend's if None.
        plot: whether to draw the losses in Jupyter.

    Raises:
        FineTuningError: the job failed.
        openai.OpenAIError: there is no such job, or no endpoint for 5 minutes.
    """
    job_id = job if isinstance(job, str) else job.id
    events: list[FineTuningJobEvent] = []
    pause = 0.5 if backend.is_local() else 5.0
    with _display(plot) as show:
        try:
            while True:
                job = _patiently(client, lambda client: _look(client, job_id, events))
                show(job, events)
                if job.status in ENDED:
                    break
                time.sleep(pause)
        except KeyboardInterrupt:
            print(f"{job_id} goes on without you; follow({job_id!r}) watches it again", file=sys.stderr)
            if isinstance(job, str):
                raise
    if job.status == "failed":
        raise FineTuningError(f"{job.id} failed: {job.error.message if job.error else 'no reason was given'}")
    return job


def curves(job: FineTuningJob | str, *, client: OpenAI | None = None) -> pd.DataFrame:
    """What a job has reported so far, a row a step that has any of it.

    Columns: step, train_loss, valid_loss, train_mean_token_accuracy, valid_mean_token_accuracy (both from 0
    to 1); NaN where nothing was measured. The endpoint evaluates on the validation file after each epoch.
    """
    import pandas as pd

    events: list[FineTuningJobEvent] = []
    _collect(client or backend.client(), job if isinstance(job, str) else job.id, events)
    return pd.DataFrame(_rows(events), columns=["step", *METRICS]).astype(dict.fromkeys(METRICS, float))


def _rows(events: Iterable[FineTuningJobEvent]) -> list[dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}
    for event in events:
        if event.type == "metrics" and isinstance(event.data, dict) and "step" in event.data:
            row = rows.setdefault(event.data["step"], {"step": event.data["step"]})
            row |= {name: event.data[name] for name in METRICS if event.data.get(name) is not None}
    return [rows[step] for step in sorted(rows) if len(rows[step]) > 1]


def _look(client: OpenAI, job_id: str, events: list[FineTuningJobEvent]) -> FineTuningJob:
    """The job, and in `events` what it said until then."""
    job = client.fine_tuning.jobs.retrieve(job_id)
    _collect(client, job_id, events)
    return job


def _collect(client: OpenAI, job_id: str, events: list[FineTuningJobEvent]) -> None:
    """Add what is new to a job's events, oldest first; the API lists the newest first."""
    new = []
    for event in client.fine_tuning.jobs.list_events(job_id, limit=100):
        if events and event.id == events[-1].id:
            break
        new.append(event)
    events += reversed(new)


def _patiently(client: OpenAI | None, ask: Callable[[OpenAI], FineTuningJob]) -> FineTuningJob:
    """Ask, and where nothing answers, ask again after 0.5 s, 1 s, 2 s, up to 30 s."""
    from openai import APIConnectionError, InternalServerError

    pause, given_up = 0.5, time.monotonic() + PATIENCE
    while True:
        try:
            # Looked up each time: a local endpoint that has gone starts again elsewhere.
            return ask(client or backend.client())
        except (APIConnectionError, InternalServerError):
            if time.monotonic() + pause > given_up:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 30)


# What is shown


Show = Callable[["FineTuningJob", list["FineTuningJobEvent"]], None]


def _display(plot: bool):
    """A context that gives the function which shows a job: in Jupyter or in a terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython and ipython.get_ipython()
    return _in_jupyter(plot) if shell and getattr(shell, "kernel", None) else _in_terminal()


@contextmanager
def _in_terminal() -> Iterator[Show]:
    from tqdm import tqdm

    with tqdm(unit=" steps", dynamic_ncols=True) as bar:

        def show(job: FineTuningJob, events: list[FineTuningJobEvent]) -> None:
            step, total = _progress(events)
            bar.total = total
            bar.update(step - bar.n)
            bar.set_description_str(f"{job.id} {_state(job)}", refresh=False)
            bar.set_postfix_str(_losses(_rows(events)), refresh=True)

        yield show


@contextmanager
def _in_jupyter(plot: bool) -> Iterator[Show]:
    from IPython.display import HTML, display

    handle = display(HTML("<p>waiting for the job</p>"), display_id=True)
    shown, figure, drawn, drawing = "", "", 0.0, 0.0

    def show(job: FineTuningJob, events: list[FineTuningJobEvent]) -> None:
        nonlocal shown, figure, drawn, drawing
        rows = _rows(events)
        now = time.monotonic()
        # Drawing takes the processor from the training: at most a thirtieth of it, and once at the end.
        if plot and rows and (job.status in ENDED or now - drawn > max(2.0, 30 * drawing)):
            figure = _figure(rows)
            drawn = time.monotonic()
            drawing = drawn - now
        page = _page(job, events) + figure
        if page != shown:
            handle.update(HTML(page))
            shown = page

    yield show


def _progress(events: list[FineTuningJobEvent]) -> tuple[int, int | None]:
    """Steps done, and steps in all where the endpoint says so."""
    for event in reversed(events):
        if event.type == "metrics" and isinstance(event.data, dict) and "step" in event.data:
            return event.data["step"], event.data.get("total_steps")
    return 0, None


def _state(job: FineTuningJob) -> str:
    return STATES.get(job.status, f"is {job.status}")


def _losses(rows: list[dict[str, Any]]) -> str:
    said = {"train_loss": "training loss", "valid_loss": "validation loss"}
    last = {name: row[name] for row in rows for name in said if name in row}
    return ", ".join(f"{said[name]} {last[name]:.3f}" for name in said if name in last)


def _page(job: FineTuningJob, events: list[FineTuningJobEvent]) -> str:
    step, total = _progress(events)
    said = f"{job.id} {_state(job)}"
    if job.status == "paused":
        said += f"; client.fine_tuning.jobs.resume({job.id!r}) goes on"
    elif job.status == "running" and job.estimated_finish:
        minutes = max(0, job.estimated_finish - time.time()) / 60
        said += f", about {minutes:.0f} min left" if minutes > 1 else ", less than a minute left"
    elif job.fine_tuned_model:
        said += f": {job.fine_tuned_model}"
    elif job.error and job.error.message:
        said += f": {job.error.message}"
    steps = f"step {step:,} of {total:,}" if total else f"step {step:,}" if step else "no step yet"
    facts = ", ".join(filter(None, [steps, _losses(_rows(events))]))
    bar = f'<progress max="{total}" value="{step}" style="width:100%"' if total else '<progress value="0"'
    return (
        f'<div><p style="margin:0">{html.escape(said)}</p>'
        f'{bar} aria-label="Steps of training"></progress><p style="margin:0">{facts}</p></div>'
    )


def _figure(rows: list[dict[str, Any]]) -> str:
    """The losses over the steps, as an image with its description."""
    from matplotlib import style
    from matplotlib.figure import Figure

    described = []
    with style.context("companion.style"):
        figure = Figure()
        axes = figure.add_subplot()
        for name, label, look in (
            ("train_loss", "training", {"linewidth": 1}),
            ("valid_loss", "validation", {"marker": "o"}),
        ):
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, **look)
                described.append(f"{label} loss from {points[0][1]:.2f} to {points[-1][1]:.2f}")
        axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
        axes.legend()
        image = io.BytesIO()
        figure.savefig(image, format="png")
    told = f"Over {rows[-1]['step']} steps: {', '.join(described)}."
    data = base64.b64encode(image.getvalue()).decode()
    return f'<img alt="{told}" style="max-width:100%" src="data:image/png;base64,{data}">'
