"""A trainer that only pretends to train: quick, and as the supervisor expects one to behave.

`python trainer.py FOLDER`. What it does beyond that stands in `play.json` in the companion's home.
"""

import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import filelock

home, folder = Path(os.environ["COMPANION_HOME"]), Path(sys.argv[1])
PLAY = {
    "steps": 8,
    "pace": 0.0,
    "every": 4,
    "deaf": False,
    "dies_at": 0,
    "error": None,
    "adapter": None,
    "fill": 0,
}
play = PLAY | json.loads((home / "play.json").read_text())
order = json.loads((folder / "job.json").read_text())
events, state = folder / "events.jsonl", folder / "state.json"
told = threading.Event()


def say(type: str, key: str, **more) -> None:
    line = json.dumps({"type": type, "key": key, "at": time.time(), **more}).encode() + b"\n"
    for part in (line[:20], line[20:]):  # so that a kill may cut it
        with events.open("ab") as out:
            out.write(part)


def listen() -> None:
    sys.stdin.readline()  # "stop", or nothing where the parent has died
    told.set()


def save(step: int) -> None:
    (folder / "state.new").write_text(str(step))
    os.replace(folder / "state.new", state)


def main() -> int:
    try:
        lock = filelock.FileLock(folder / "trainer.lock")
        lock.acquire(timeout=0)
    except filelock.Timeout:
        (home / "clash").touch()
        return 4
    with (home / "starts").open("a") as out:
        out.write(f"{os.getpid()}\n")
    threading.Thread(target=listen, daemon=True).start()
    if events.exists() and not events.read_bytes().endswith(b"\n"):
        with events.open("ab") as out:
            out.write(b"\n")
    say("message", "order", level="info", message=json.dumps(order))
    steps = play["steps"]
    for step in range(int(state.read_text()) + 1 if state.exists() else 1, steps + 1):
        if told.is_set() and not play["deaf"]:
            save(step - 1)
            return 3
        if step == play["dies_at"]:
            raise SystemError("out of luck")
        if play["fill"]:
            (folder / f"junk-{step}").write_bytes(bytes(play["fill"]))
        time.sleep(play["pace"])
        loss = {"train_loss": 1 / step, "train_mean_token_accuracy": 1 - 1 / step}
        at = {"step": step, "total_steps": steps, "epoch": 1}
        say("step", f"step-{step}", **at, **loss, trained_tokens=10 * step)
        if step % play["every"] == 0:
            valid = {}
            if order["validation"]:
                valid = {"valid_loss": 2 / step, "valid_mean_token_accuracy": 0.5}
                say("eval", f"eval-{step}", **at, **valid)
            checkpoint = folder / "checkpoints" / f"step-{step}"
            checkpoint.mkdir(parents=True, exist_ok=True)
            (checkpoint / "adapter_config.json").write_text("{}")
            if play["adapter"]:
                shutil.copy(play["adapter"], checkpoint / "adapter.gguf")
            else:
                (checkpoint / "adapter.gguf").write_bytes(b"GGUF")
            full = {f"full_{name}": valid.get(name) for name in ("valid_loss", "valid_mean_token_accuracy")}
            name = f"checkpoints/step-{step}"
            say("checkpoint", f"checkpoint-{step}", **at, **loss, **full, folder=name)
            save(step)
            if step > 3 * play["every"]:  # the best, the last, is always among the newest three
                shutil.rmtree(folder / "checkpoints" / f"step-{step - 3 * play['every']}")
    if play["error"]:
        say("end", "end", outcome="failed", error=play["error"])
        return 1
    best = max(int(one.name[5:]) for one in (folder / "checkpoints").iterdir())
    say("end", "end", outcome="succeeded", best=f"checkpoints/step-{best}", trained_tokens=10 * steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
