"""The life of a job behind its routes: its files are validated, then it is trained, one job at a time.

What is wanted of a job is its status in the store; the supervisor makes it so. Routes only write there, so
that it does not matter which of several endpoints in one home does the work: the one that holds the lock. A
job that an endpoint left behind, however it ended, goes on with the next one. The training itself is a
process of its own (`companion.local.training`), and its `events.jsonl` the source of a job's events.
"""

import contextlib
import csv
import errno
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from filelock import FileLock, Timeout

from .store import UNFINISHED, Store, StoreError, link, reported

log = logging.getLogger("companion.endpoint")
TRAINER = [sys.executable, "-m", "companion.local.training"]
FEWEST_EXAMPLES = 10
NAMED_PROBLEMS = 5
RESTARTS = 3  # of a trainer that dies without having done a step
PATIENCE = 20.0  # seconds that a trainer has to save its state
FAREWELL = 4.0  # seconds of them that the endpoint itself waits when it leaves
RESULTS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


def resolve(wanted: dict, examples: int) -> dict:
    """The hyperparameters with numbers in the place of "auto" and of what is missing.

    batch_size: a fiftieth of the examples, from 1 to 8. n_epochs: 3, or for small sets as many as make 100
    steps, at most 10. learning_rate_multiplier: 1.
    """

    given = {name: value for name, value in wanted.items() if value != "auto"}
    batch = given.get("batch_size", min(max(examples // 50, 1), 8))
    epochs = math.ceil(100 / math.ceil(examples / batch))
    auto = {"n_epochs": min(max(epochs, 3), 10), "batch_size": batch, "learning_rate_multiplier": 1.0}
    return auto | given


class Supervisor:
    """Validates and trains the store's jobs, from `start` to `close`."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._closing = threading.Event()
        self._wakes = (threading.Event(), threading.Event())
        self._worker = threading.Thread(target=self._work, daemon=True)
        self._pace: tuple[int, float] | None = None  # the first new step of this trainer, and its time
        self._step: dict = {}  # the data of the last step that was read

    def start(self) -> None:
        """Go to work."""
        self._worker.start()

    def close(self) -> None:
        """Have the running trainer save its state and leave; its job goes on with the next endpoint."""
        self._closing.set()
        self.wake()
        self._worker.join(FAREWELL + 1)

    def wake(self) -> None:
        """Look at the jobs now."""
        for event in self._wakes:
            event.set()

    def _work(self) -> None:
        lock = FileLock(self.store.folder / "jobs.lock")
        while not self._closing.is_set():
            with contextlib.suppress(Timeout), lock.acquire(timeout=1):
                with contextlib.suppress(StoreError):
                    self.store.sweep()
                validation = (self._wakes[0], ("validating_files",), self._validate)
                threading.Thread(target=self._each, args=validation, daemon=True).start()
                self._each(self._wakes[1], ("running", "queued"), self._train)

    def _each(self, wake: threading.Event, statuses: tuple[str, ...], handle) -> None:
        """Handle the jobs of these statuses as they come. Whatever goes wrong fails the job, and no other."""
        while not self._closing.is_set():
            wake.clear()
            try:
                job = next(filter(None, map(self.store.next_job, statuses)), None)
            except StoreError:
                job = None
            if job is None:
                wake.wait(1)
                continue
            try:
                handle(job)
            except Exception as error:
                log.exception("job %s", job["id"])
                full = getattr(error, "full", getattr(error, "errno", None) == errno.ENOSPC)
                self._fail(job["id"], "insufficient_storage" if full else "server_error", str(error))

    def _fail(self, job_id: str, code: str, message: str, param: str | None = None) -> None:
        error = {"code": code, "message": message, "param": param}
        fields = {"error": error, "finished_at": int(time.time()), "estimated_finish": None}
        while True:
            try:
                with self.store.change():
                    if self.store.update_job(job_id, UNFINISHED, status="failed", **fields):
                        self.store.add_event(job_id, "job-failed", message, level="error")
                return drop_data(self.store, job_id)
            except StoreError:  # where even the reserve is not enough, as soon as there is space
                self.store.use_reserve()
                if self._closing.wait(0.5):
                    return None

    # --- validation -----------------------------------------------------------------------------------------

    def _validate(self, job: dict) -> None:
        from companion import dataset_format

        job_id, folder = job["id"], self.store.job_folder(job["id"])
        for param in ("training_file", "validation_file"):
            if job[param]:
                message = f"Validating {_said(param)}: {job[param]}"
                self.store.add_event(job_id, f"validating-{param}", message)
                if problems := dataset_format.validate(_data(folder, param)):
                    return self._fail(job_id, f"invalid_{param}", _summary(param, problems), param)
        with _data(folder, "training_file").open("rb") as lines:
            examples = sum(1 for _ in lines)
        if examples < FEWEST_EXAMPLES:
            message = (
                f"Training file has {examples} example(s), but must have at least {FEWEST_EXAMPLES} examples"
            )
            return self._fail(job_id, "invalid_n_examples", message, "training_file")
        numbers = resolve(job["method"]["supervised"]["hyperparameters"], examples)
        method = {"type": "supervised", "supervised": {"hyperparameters": numbers}}
        with self.store.change():
            if self.store.update_job(
                job_id, ("validating_files",), status="queued", hyperparameters=numbers, method=method
            ):
                self.store.add_event(job_id, "queued", "Files validated, moving job to queued state")
        self.wake()

    # --- training -------------------------------------------------------------------------------------------

    def _train(self, job: dict) -> None:
        job_id = job["id"]
        folder = self.store.job_folder(job_id)
        with self.store.change():
            if not self.store.update_job(job_id, ("queued", "running"), status="running"):
                return
            self.store.add_event(job_id, "started", "Fine-tuning job started")
        self._await_others(job_id, folder)
        events = Log(folder / "events.jsonl")
        self._record(job_id, events)
        _write_order(job, folder)
        crashes = 0
        while self._is(job_id, "running") and not self._closing.is_set():
            if crashes > RESTARTS:
                return self._fail(job_id, *_crash(folder))
            self._pace = None
            trainer = _start(folder)
            try:
                while trainer.poll() is None and self._is(job_id, "running") and not self._closing.is_set():
                    self._record(job_id, events)
                    self._wakes[1].wait(0.1)
                    self._wakes[1].clear()
            finally:
                self._stop(trainer, job_id)
            self._record(job_id, events)
            crashes = 1 if self._pace else crashes + 1
        if not self._is(job_id, *UNFINISHED):
            drop_data(self.store, job_id)

    def _is(self, job_id: str, *statuses: str) -> bool:
        return self.store.job(job_id)["status"] in statuses

    def _await_others(self, job_id: str, folder: Path) -> None:
        """Wait for the trainer of an endpoint that was killed: it saves its state and leaves by itself."""
        import psutil

        arguments = [*TRAINER[1:], str(folder)]

        def left() -> list:
            found = psutil.process_iter(["cmdline"])
            return [one for one in found if (one.info["cmdline"] or [])[1:] == arguments]

        deadline = time.monotonic() + PATIENCE
        while (others := left()) and not self._closing.is_set():
            if time.monotonic() > deadline or not self._is(job_id, "running"):
                for one in others:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()
            time.sleep(0.1)

    def _stop(self, trainer: subprocess.Popen, job_id: str) -> None:
        """Have the trainer save its state and leave; kill it if that takes long, or its job is cancelled."""
        try:
            with contextlib.suppress(OSError):
                trainer.stdin.write(b"stop\n")
            with contextlib.suppress(OSError):
                trainer.stdin.close()
            asked = time.monotonic()
            while trainer.poll() is None:
                waited = time.monotonic() - asked
                if waited > PATIENCE or self._is(job_id, "cancelled"):
                    break
                if waited > FAREWELL and self._closing.is_set():
                    return  # it goes on leaving; the next endpoint waits for it
                time.sleep(0.02)
            _kill(trainer)
        except BaseException:
            _kill(trainer)
            raise

    # --- what the trainer says ------------------------------------------------------------------------------

    def _record(self, job_id: str, events: "Log") -> None:
        """Take over the trainer's new events: all of them, each once, whatever was taken over before."""
        lines, end = events.read()
        if lines:
            with self.store.change():
                for event in lines:
                    if (job := self.store.job(job_id))["status"] in UNFINISHED:
                        self._take(job, event)
        events.offset = end

    def _take(self, job: dict, event: dict) -> None:
        take = {"message": self._message, "step": self._metrics, "eval": self._metrics}
        take |= {"checkpoint": self._checkpoint, "end": self._end}
        take[event["type"]](job, event)

    def _message(self, job: dict, event: dict) -> None:
        level = event.get("level", "info")
        self.store.add_event(job["id"], event["key"], event["message"], level=level, at=event["at"])

    def _metrics(self, job: dict, event: dict) -> None:
        known = ("step", "total_steps", "train_loss", "train_mean_token_accuracy")
        known += ("valid_loss", "valid_mean_token_accuracy")
        data = {name: event[name] for name in known if name in event}
        if event["type"] == "step":
            self._step = data
        else:  # always of the whole validation file
            before = self._step if self._step.get("step") == data["step"] else {}
            data = before | data | {f"full_{name}": data[name] for name in known[-2:]}
        parts = [
            f"{said}={data[name]:.2f}"
            for name, said in (("train_loss", "training loss"), ("valid_loss", "validation loss"))
            if data.get(name) is not None
        ]
        step, steps = event["step"], event["total_steps"]
        message = f"Step {step}/{steps}: {', '.join(parts)}"
        new = self.store.add_event(
            job["id"], event["key"], message, type="metrics", data=data, at=event["at"]
        )
        if new and event["type"] == "step":
            first, began = self._pace = self._pace or (step, event["at"])
            if step > first:
                finish = event["at"] + (event["at"] - began) / (step - first) * (steps - step)
                self.store.update_job(job["id"], ("running",), estimated_finish=int(finish))

    def _checkpoint(self, job: dict, event: dict) -> None:
        step = event["step"]
        if not self.store.add_event(
            job["id"], event["key"], f"Checkpoint created at step {step}", at=event["at"]
        ):
            return
        name = f"{_model_name(job)}:ckpt-step-{step}"
        metrics = ("step", "train_loss", "train_mean_token_accuracy")
        metrics += ("full_valid_loss", "full_valid_mean_token_accuracy")
        self.store.add_checkpoint(
            {
                "object": "fine_tuning.job.checkpoint",
                "id": f"ftckpt_{job['id'].removeprefix('ftjob-')}{step}",
                "created_at": int(event["at"]),
                "fine_tuned_model_checkpoint": name,
                "fine_tuning_job_id": job["id"],
                "metrics": {name: event[name] for name in metrics if event.get(name) is not None},
                "step_number": step,
            }
        )
        adapter = self.store.job_folder(job["id"]) / event["folder"] / "adapter.gguf"
        self.store.add_model(name, job["id"], job["model"], adapter)
        self._forget_removed(job["id"])

    def _forget_removed(self, job_id: str) -> None:
        """Of the checkpoints the trainer keeps only the newest and the best."""
        for model in self.store.models_of(job_id):
            if not model.adapter.exists():
                self.store.forget_model(model.name)

    def _end(self, job: dict, event: dict) -> None:
        job_id = job["id"]
        if event["outcome"] != "succeeded":
            error = event["error"]
            return self._fail(job_id, error["code"], error["message"], error.get("param"))
        folder = self.store.job_folder(job_id)
        model = folder / "model"
        with reported(folder):
            model.mkdir(exist_ok=True)
            for file in filter(Path.is_file, (folder / event["best"]).iterdir()):
                link(file, model / file.name)
        name = _model_name(job)
        self.store.add_model(name, job_id, job["model"], model / "adapter.gguf")
        self._forget_removed(job_id)
        self.store.add_event(job_id, "model", "New fine-tuned model created", at=event["at"])
        self.store.update_job(
            job_id,
            UNFINISHED,
            status="succeeded",
            fine_tuned_model=name,
            finished_at=int(event["at"]),
            estimated_finish=None,
            trained_tokens=event["trained_tokens"],
            result_files=[self._write_results(job_id)],
        )
        self.store.add_event(job_id, "end", "The job has successfully completed", at=event["at"])

    def _write_results(self, job_id: str) -> str:
        rows: dict[int, dict] = {}
        for data in self.store.metrics(job_id):
            rows.setdefault(data["step"], {}).update(data)
        file_id = f"file-{job_id.removeprefix('ftjob-')}"
        content = self.store.content(file_id)
        new = content.with_name(f"{file_id}.new")
        with reported(content.parent):
            with new.open("w", newline="") as out:
                table = csv.DictWriter(out, RESULTS, restval="", extrasaction="ignore", lineterminator="\n")
                table.writeheader()
                for _, row in sorted(rows.items()):
                    table.writerow(row | {"train_accuracy": row.get("train_mean_token_accuracy")})
            os.replace(new, content)
        self.store.add_file(
            {
                "object": "file",
                "id": file_id,
                "bytes": content.stat().st_size,
                "created_at": int(time.time()),
                "filename": "step_metrics.csv",
                "purpose": "fine-tune-results",
                "status": "processed",
                "status_details": None,
                "expires_at": None,
            }
        )
        return file_id


class Log:
    """The objects in a file of JSON lines that another process appends to; one that is cut off is none."""

    def __init__(self, file: Path) -> None:
        self.file, self.offset = file, 0

    def read(self) -> tuple[list[dict], int]:
        """What stands behind `offset`, and where the last whole line ends."""
        try:
            with self.file.open("rb") as data:
                data.seek(self.offset)
                whole, _, _ = data.read().rpartition(b"\n")
        except FileNotFoundError:
            return [], self.offset
        found = []
        for line in whole.split(b"\n") if whole else ():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line, parse_constant=lambda _: None))
        return found, self.offset + (len(whole) + 1 if whole else 0)


def drop_data(store: Store, job_id: str) -> None:
    """Remove a finished job's own copy of its files."""
    for param in ("training_file", "validation_file"):
        with contextlib.suppress(OSError):
            _data(store.job_folder(job_id), param).unlink(missing_ok=True)


def take_data(store: Store, job_id: str, param: str, file_id: str) -> None:
    """Give a job its own copy of a file, so that deleting the file does not matter to it."""
    link(store.content(file_id), _data(store.job_folder(job_id), param))


def _data(folder: Path, param: str) -> Path:
    return folder / f"{param}.jsonl"


def _said(param: str) -> str:
    return param.replace("_", " ")


def _summary(param: str, problems: list) -> str:
    from companion.dataset_format import MOST_PROBLEMS as most

    count, more = len(problems), len(problems) - NAMED_PROBLEMS
    named = "; ".join(map(str, problems[:NAMED_PROBLEMS])) + (f"; and {more} more" if more > 0 else "")
    if count > most:  # the last one says that there are more
        count, named = f"more than {most}", named.replace(f"and {more} more", "and more")
    return f"The job failed due to an invalid {_said(param)}: {count} problem(s). {named}."


def _model_name(job: dict) -> str:
    suffix, drawn = job["user_provided_suffix"] or "", job["id"].removeprefix("ftjob-")[:8]
    return f"ft:{job['model']}:personal:{suffix}:{drawn}"


def _write_order(job: dict, folder: Path) -> None:
    numbers = job["method"]["supervised"]["hyperparameters"]
    order = {
        "job": job["id"],
        "model": job["model"],
        "train": str(_data(folder, "training_file")),
        "validation": str(_data(folder, "validation_file")) if job["validation_file"] else None,
        "n_epochs": numbers["n_epochs"],
        "batch_size": numbers["batch_size"],
        "learning_rate_multiplier": numbers["learning_rate_multiplier"],
        "seed": job["seed"],
        "early_stopping_patience": numbers.get("early_stopping_patience"),
    }
    new = folder / "job.json.new"
    new.write_text(json.dumps(order))
    os.replace(new, folder / "job.json")


def _start(folder: Path) -> subprocess.Popen:
    apart = {"creationflags": 0x00004200} if os.name == "nt" else {"start_new_session": True}
    with (folder / "trainer.log").open("ab") as out:
        trainer = subprocess.Popen(
            [*TRAINER, str(folder)], stdin=subprocess.PIPE, stdout=out, stderr=out, bufsize=0, **apart
        )
    if os.name == "posix":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, trainer.pid, 5)
    return trainer


def _kill(trainer: subprocess.Popen) -> None:
    if trainer.poll() is None:
        with contextlib.suppress(OSError):
            os.killpg(trainer.pid, signal.SIGKILL) if os.name == "posix" else trainer.kill()
        trainer.wait()


def _crash(folder: Path) -> tuple[str, str]:
    """The code and the message of a trainer that dies whenever it is started."""
    if shutil.disk_usage(folder).free < 64 << 20:
        return "insufficient_storage", f"There is no space left in {folder} to train in: free some space."
    with (folder / "trainer.log").open("rb") as data:
        data.seek(max(0, data.seek(0, os.SEEK_END) - 4096))
        said = [line for line in data.read().decode(errors="replace").splitlines() if line.strip()]
    reason = said[-1] if said else "it said nothing"
    message = f"The trainer died {RESTARTS + 1} times ({reason}): see {folder / 'trainer.log'}."
    return "trainer_crashed", message
