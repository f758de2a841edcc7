"""The endpoint as a process: found, started, shared by all of a user's notebooks, and given back when nobody
is left.

`ensure()` returns the running endpoint and starts one where none runs. A file in the companion's home,
readable by this user alone, says where it listens and with which token; both are used again by the next one,
so that a client outlives a restart. A lock makes ten notebooks that start at once share one process.
"""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

from .weights import MODELS, given_models, home, path

IDLE = (
    900.0  # seconds without a request until models are unloaded and, if no client lives, the endpoint leaves
)
GATEWAY = "companion.local.gateway"


class EndpointError(RuntimeError):
    """The local endpoint cannot be started or reached; the message says what to do."""


@dataclass(frozen=True)
class Endpoint:
    """Where the endpoint listens (`base_url` ends in /v1), its token, and its process id."""

    base_url: str
    token: str
    pid: int


def ensure(*, wait: float = 60.0) -> Endpoint:
    """The running endpoint, started first where none runs. wait: seconds to give a new one.

    Model files that are missing are fetched here, where the user sees the progress bar. Raises EndpointError,
    or WeightsError where there is no model to serve.
    """
    with _reported():
        home().mkdir(parents=True, exist_ok=True)
        _lease()
        if found := running():
            return found
        from filelock import FileLock

        with FileLock(home() / "endpoint.lock"):
            if found := running():
                return found
            for name in MODELS:
                path(name)
            return _start(wait)


def running() -> Endpoint | None:
    """The endpoint that answers now, or None. One that lives but has not answered for 20 seconds is ended."""
    found = living()
    if found is None:
        return None
    for _ in range(2):
        if _answers(found):
            return found
        if not _alive(found.pid, endpoint=True):
            return None
    stop(found)
    return None


def living() -> Endpoint | None:
    """The endpoint whose process lives, whether it answers or not, or None."""
    found = announced()
    return found if found and _alive(found.pid, endpoint=True) else None


def announced() -> Endpoint | None:
    """What the file says, whether that process lives or not."""
    try:
        found = Endpoint(**json.loads(_file().read_text()))
        if _port(found) and isinstance(found.token, str) and isinstance(found.pid, int) and found.pid > 0:
            return found
    except (OSError, ValueError, TypeError, AttributeError):
        pass
    return None


def announce(endpoint: Endpoint) -> None:
    """Let this user's processes find the endpoint."""
    new = _file().with_suffix(f".{os.getpid()}.new")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        json.dump(asdict(endpoint), out)
    os.replace(new, _file())


def stop(endpoint: Endpoint) -> None:
    """End the endpoint's process, politely first; another user's is left alone."""
    import psutil

    # psutil says FileNotFoundError of a process that leaves while it is looked at.
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
        process = psutil.Process(endpoint.pid)
        process.terminate()
        if not _ends(endpoint.pid):
            process.kill()
            _ends(endpoint.pid)


def leases() -> list[int]:
    """The ids of the living processes that have asked for a client; other marks are swept away."""
    found = []
    for mark in (home() / "clients").glob("*"):
        if mark.name.isdigit() and _alive(int(mark.name), endpoint=False):
            found.append(int(mark.name))
        else:
            mark.unlink(missing_ok=True)
    return found


def _lease() -> None:
    folder = home() / "clients"
    folder.mkdir(exist_ok=True)
    (folder / str(os.getpid())).touch()


def _start(wait: float) -> Endpoint:
    last = announced()
    port = _port(last) if last else 0
    token = last.token if last else f"local-{secrets.token_urlsafe(24)}"
    places = {"COMPANION_HOME": home(), "COMPANION_MODEL_PATH": given_models()}  # it works in another folder
    log = home() / "endpoint.log"
    command = [sys.executable, "-m", GATEWAY, "--port", str(port)]
    apart = {"creationflags": 0x00000208} if os.name == "nt" else {"start_new_session": True}
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd=home(),
            # glibc would keep a heap for each of llama.cpp's many threads.
            env={"MALLOC_ARENA_MAX": "2"}
            | os.environ
            | {name: str(place) for name, place in places.items() if place}
            | {"COMPANION_ENDPOINT_TOKEN": token},
            **apart,
        )
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline:
        if process.poll() is not None:
            said = [line for line in log.read_text().splitlines() if line.strip()] or ["it said nothing"]
            raise EndpointError(
                f"the local endpoint did not start ({said[-1]}): see {log}, or run `companion doctor`"
            )
        found = announced()
        if found and found.pid == process.pid and _answers(found):
            return found
        time.sleep(0.02)
    process.kill()
    raise EndpointError(f"the local endpoint did not answer within {wait:.0f} seconds: see {log}")


def _answers(endpoint: Endpoint) -> bool:
    asked = urllib.request.Request(
        f"{endpoint.base_url}/models", headers={"Authorization": f"Bearer {endpoint.token}"}
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(asked, timeout=10) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _ends(pid: int, wait: float = 10.0) -> bool:
    """Whether a process ends in time. A notebook that started it may notice later: it stays as a zombie."""
    deadline = time.monotonic() + wait
    while _alive(pid, endpoint=False):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _port(endpoint: Endpoint) -> int:
    return urllib.parse.urlsplit(endpoint.base_url).port or 0


def _alive(pid: int, *, endpoint: bool) -> bool:
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        if not endpoint:
            return True
        # An old file may name the id of another process by now: not every one may be ended.
        command = process.cmdline()
        return GATEWAY in command or (any("companion" in part for part in command) and "serve" in command)
    except (psutil.NoSuchProcess, FileNotFoundError):  # the second where it leaves as it is looked at
        return False
    except psutil.AccessDenied:  # another user's
        return False


@contextlib.contextmanager
def _reported():
    """What the disk refuses, said in one line."""
    try:
        yield
    except OSError as error:
        raise EndpointError(
            f"the companion cannot write to {home()} ({error.strerror or error}): free some space, or set "
            f"COMPANION_HOME to a folder that can be written"
        ) from error


def _file() -> Path:
    return home() / "endpoint.json"
