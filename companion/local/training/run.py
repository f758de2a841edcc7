"""A fine-tuning job's training: from `job.json` to checkpoints, told in `events.jsonl`.

A run can be stopped or killed at any moment and be started again in the same folder: it goes on from its last
saved state. The order of the examples and the schedule follow from the seed and the step, and nothing else is
drawn after the start, so a run that was stopped ends as one that was not, but for the last digits of sums. A
step that is done again tells its event again, under the same key: a reader takes the first of each.
"""

import errno
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import memory, weights
from . import adapter
from .examples import Encoder, ExampleError, Tokens, batches, pieces
from .model import Model

STOPPED = 3  # the exit status of a run that saved its state and left
LEARNING_RATE = 1e-3  # times the job's learning_rate_multiplier
WARM_UP = 0.1  # of all steps
LARGEST_GRADIENT = 1.0  # norm, over the whole adapter
PIECE = 1024  # tokens computed at once; memory grows with it
SAVE_EVERY = 30.0  # seconds
KEPT = 3  # checkpoints, the newest, beside the best


class TrainingError(RuntimeError):
    """Why a job cannot succeed: `code`, the message, and `param`, the job's parameter that is at fault."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


def main(folder: Path) -> int:
    """Train the job in `folder`; the exit status. Standard input's end, or the line `stop`, ends it early."""
    stop = threading.Event()
    threading.Thread(target=_listen, args=(stop,), daemon=True).start()
    events = Events(folder / "events.jsonl")
    try:
        run = Run(folder, events)
        if not run.go(stop):
            return STOPPED
    except TrainingError as error:
        fault = {"code": error.code, "message": str(error), "param": error.param}
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = f"There is no space left in {folder} to train in: free some space."
        fault = {"code": "insufficient_storage", "message": message, "param": None}
    else:
        return 0
    (folder / "state.pt").unlink(missing_ok=True)  # whose space the last event may need
    Events(folder / "events.jsonl").add("end", "end", outcome="failed", error=fault)
    return 1


def _listen(stop: threading.Event) -> None:
    said = b""
    while b"stop\n" not in said and (more := os.read(0, 1024)):  # sys.stdin would be locked when we leave
        said += more
    stop.set()


class Events:
    """What a run tells: lines of JSON, each with a key that a repeated event repeats."""

    def __init__(self, file: Path) -> None:
        self._file = file
        if file.exists() and file.stat().st_size:
            with file.open("rb+") as data:  # a kill may have cut off the last line
                data.seek(-1, os.SEEK_END)
                if data.read(1) != b"\n":
                    data.write(b"\n")

    def add(self, type: str, key: str, **fields) -> None:
        """Append one event."""
        line = json.dumps({"type": type, "key": key, "at": time.time(), **fields}) + "\n"
        with self._file.open("a", encoding="utf-8") as out:
            out.write(line)


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """Where and how precisely to train: a GPU where there is one; bfloat16 where the processor has it."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator(), torch.bfloat16
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported() and _has_bf16_instructions()
    return torch.device("cpu"), torch.bfloat16 if fast else torch.float32


def _has_bf16_instructions() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Run:
    """One job, from wherever it stands."""

    def __init__(self, folder: Path, events: Events) -> None:
        self.folder, self.events = folder, events
        self.job = json.loads((folder / "job.json").read_text())
        base = weights.path(self.job["model"], progress=False)
        encoder = Encoder(base)
        self.train = self._load(encoder, "train", "training_file")
        self.validation = self._load(encoder, "validation", "validation_file")
        device, dtype = device_and_dtype()
        self.model = Model(base, seed=self.job["seed"], device=device, dtype=dtype)
        memory.trim()  # what the float32 weights took, some 400 MB
        self.values = torch.nn.Parameter(self.model.parameters)
        self.values.grad = self.model.gradient
        self.optimizer = torch.optim.AdamW([self.values], betas=(0.9, 0.999), weight_decay=0.0, fused=True)
        self.lengths = [len(example) for example in self.train]
        self.steps_an_epoch = math.ceil(len(self.train) / self.job["batch_size"])
        self.total_steps = self.steps_an_epoch * self.job["n_epochs"]
        self.step = 0
        self.trained_tokens = 0
        self.checkpoints: list[dict] = []  # step, folder, loss (validation's where there is one)
        self.metrics: dict = {}  # of the last step
        self.ended = False  # early stopping has had its say
        self._resume()

    def _load(self, encoder: Encoder, name: str, param: str) -> list[Tokens]:
        if self.job[name] is None:
            return []
        try:
            return encoder.load(Path(self.job[name]))
        except ExampleError as error:
            raise TrainingError(error.code, f"The {param.replace('_', ' ')} has {error}", param) from None

    # --- state ----------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        file = self.folder / "state.pt"
        if not file.exists():
            words = f"{len(self.train)} examples, {sum(self.lengths)} tokens, {self.total_steps} steps"
            where = f"on {self.model.device.type} in {str(self.model.dtype).removeprefix('torch.')}"
            self.events.add("message", "start", level="info", message=f"Training {words}, {where}")
            return
        state = torch.load(file, map_location=self.model.device, weights_only=True)
        for name in ("step", "trained_tokens", "checkpoints", "metrics", "ended"):
            setattr(self, name, state[name])
        with torch.no_grad():
            self.values.copy_(state["values"])
        self.optimizer.load_state_dict(state["optimizer"])
        key, message = f"resumed-{time.time():.3f}", f"Training goes on after step {self.step}"
        self.events.add("message", key, level="info", message=message)

    def _save(self) -> None:
        state = {name: getattr(self, name) for name in ("step", "trained_tokens", "checkpoints", "metrics")}
        state |= {"ended": self.ended, "values": self.values.detach()}
        state["optimizer"] = self.optimizer.state_dict()
        with adapter.replaced(self.folder / "state.pt") as file:
            torch.save(state, file)

    # --- the way through ------------------------------------------------------------------------------------

    def go(self, stop: threading.Event) -> bool:
        """Train to the end; False where `stop` came first, with the state saved."""
        saved = time.monotonic()
        while self.step < self.total_steps and not self.ended:
            if stop.is_set():
                self._save()
                return False
            epoch, place = divmod(self.step, self.steps_an_epoch)
            order = batches(self.lengths, self.job["batch_size"], seed=self.job["seed"], epoch=epoch)
            self._train_on([self.train[number] for number in order[place]], epoch + 1)
            if place + 1 == self.steps_an_epoch:
                self._end_epoch(epoch + 1)
                self._save()
                saved = time.monotonic()
            elif time.monotonic() - saved > SAVE_EVERY:
                self._save()
                saved = time.monotonic()
        best = self._best()
        self.events.add(
            "end", "end", outcome="succeeded", best=best["folder"], trained_tokens=self.trained_tokens
        )
        (self.folder / "state.pt").unlink(missing_ok=True)
        return True

    def learning_rate(self, step: int) -> float:
        """Of step 0, 1, …: a linear warm-up, then a cosine to a tenth (Loshchilov and Hutter 2017)."""
        peak = LEARNING_RATE * self.job["learning_rate_multiplier"]
        warm = max(1, round(WARM_UP * self.total_steps))
        if step < warm:
            return peak * (step + 1) / warm
        done = (step - warm) / max(1, self.total_steps - warm)
        return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

    def _train_on(self, batch: Sequence[Tokens], epoch: int) -> None:
        self.model.gradient.zero_()
        loss, right, counted, total = self._losses(batch, training=True)
        norm = float(self.model.gradient.norm())
        self._check(loss, norm)
        if norm > LARGEST_GRADIENT:
            self.model.gradient.mul_(LARGEST_GRADIENT / norm)
        self.optimizer.param_groups[0]["lr"] = self.learning_rate(self.step)
        self.optimizer.step()
        self.step += 1
        self.trained_tokens += sum(len(example) for example in batch)
        self.metrics = {"train_loss": loss / total, "train_mean_token_accuracy": right / counted}
        self.events.add(
            "step",
            f"step-{self.step}",
            step=self.step,
            total_steps=self.total_steps,
            epoch=epoch,
            trained_tokens=self.trained_tokens,
            **self.metrics,
        )

    def _check(self, *numbers: float) -> None:
        if not all(map(math.isfinite, numbers)):
            rate = self.job["learning_rate_multiplier"]
            raise TrainingError(
                "training_diverged",
                f"The loss is no longer a number after step {self.step}. Try a lower "
                f"learning_rate_multiplier than {rate:g}, such as {rate / 4:g}, and look for odd examples.",
                "learning_rate_multiplier",
            )

    def _losses(self, examples: Sequence[Tokens], training: bool) -> tuple[float, int, int, float]:
        """The loss (nats, summed by weight), the tokens predicted right, those counted, their weight."""
        counted = sum(int((example.weights > 0).sum()) for example in examples)
        total = sum(float(example.weights.sum()) for example in examples)
        loss, right = 0.0, 0
        lengths = [len(example) for example in examples]
        for piece in pieces(range(len(examples)), lengths, PIECE):
            more = self.model.loss([examples[number] for number in piece], total=total if training else None)
            loss, right = loss + more[0], right + more[1]
        return loss, right, counted, total

    def _end_epoch(self, epoch: int) -> None:
        self._check(float(self.values.detach().sum()))
        measured = dict(self.metrics)
        loss = self.metrics["train_loss"]
        if self.validation:
            summed, right, counted, total = self._losses(self.validation, training=False)
            loss, accuracy = summed / total, right / counted
            self._check(loss)
            measured |= {"full_valid_loss": loss, "full_valid_mean_token_accuracy": accuracy}
            self.events.add(
                "eval",
                f"eval-{self.step}",
                step=self.step,
                total_steps=self.total_steps,
                epoch=epoch,
                valid_loss=loss,
                valid_mean_token_accuracy=accuracy,
            )
        name = f"checkpoints/step-{self.step}"
        try:
            adapter.save(self.model, self.folder / name, self.job["model"])
        except OSError:
            shutil.rmtree(self.folder / name)
            raise
        self.checkpoints.append({"step": self.step, "folder": name, "loss": loss})
        self._drop_old()
        self.events.add("checkpoint", f"checkpoint-{self.step}", step=self.step, folder=name, **measured)
        patience = self.job.get("early_stopping_patience")
        if patience and self.validation and self.step < self.total_steps:
            since = (self.step - self._best()["step"]) // self.steps_an_epoch
            if since >= patience:
                self.ended = True
                words = f"Stopped early: the validation loss has not fallen for {since} epoch(s)"
                self.events.add("message", "stopped-early", level="info", message=words)

    def _best(self) -> dict:
        """The checkpoint to use: of the lowest validation loss, or the last where nothing was validated."""
        if not self.validation:
            return self.checkpoints[-1]
        return min(self.checkpoints, key=lambda checkpoint: checkpoint["loss"])

    def _drop_old(self) -> None:
        keep = {checkpoint["folder"] for checkpoint in [*self.checkpoints[-KEPT:], self._best()]}
        for checkpoint in self.checkpoints:
            if checkpoint["folder"] not in keep:
                shutil.rmtree(self.folder / checkpoint["folder"], ignore_errors=True)
