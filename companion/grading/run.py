"""Run restored notebooks, each in a kernel of its own, and bring home what their cells emitted.

`solve` runs a solution with the seed of a grading; what its check cells emit is the reference. `run` runs a
batch as one pytest session with nbval, whose plugin (`plugin`) puts a `Replay` in place of nbval's way to run
cells. Every notebook's result is a file as soon as it is done, so that a run that was cut off goes on where
it stopped. Nothing is scored here: whether what was emitted is right is for `backcheck.agrees`.
"""

import ast
import builtins
import copy
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import nbformat
import psutil
import zmq
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager
from nbformat import NotebookNode

from companion.checks import MIME
from companion.grading.backcheck import result
from companion.grading.release import is_check
from companion.grading.sandbox import NAME, START, kernelspec, over_limit, prove

TIMEOUT = 30.0  # seconds for a cell; a notebook has ten times as many in all
MODEL_TIMEOUT = 120.0  # where checks ask the model, whose engine has to start
MOST_OUTPUT = 16 << 20  # bytes of a cell's output, and of one message
LARGEST_RESULT = 4 << 20  # bytes of the message that carries a result; checks.clean keeps to less
DEEPEST_RESULT = 100  # levels of a result; checks.clean keeps to less
SESSION, CHUNK = 200, 8  # notebooks in a session here, since each worker keeps all; in one for an executor
_SEED = "COMPANION_GRADING_SEED"
_EXIT = "get_ipython().ask_exit = lambda: None"  # then exit() does nothing; otherwise it ends the kernel
# What a cell defines counts even if another line of it stops here, as `drive.mount()` or `input()` does.
_DEFINE = """
def _define(code):
    import ast
    shell = get_ipython()
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign
    for node in ast.parse(shell.transform_cell(code)).body:
        if isinstance(node, kinds):
            try:
                exec(compile(ast.Module([node], []), "<answer>", "exec"), shell.user_ns)
            except Exception:
                pass
try:
    _define(CODE)
except (SyntaxError, ValueError, RecursionError, MemoryError):
    pass
"""
_USAGE = 4  # how pytest ends that does not know an option: a plugin is missing, whatever the notebooks hold
_FORMAT = 2  # of the result files: one of another format is run again


@dataclass(frozen=True)
class Outcome:
    """How a cell ended.

    emitted: the one result that it emitted, as a check cell does; None where it emitted none, or several.
    status: "ok", or "error" where it raised, "timeout", "died" (with its kernel), "flood" (of output),
    "not run". note: why, in a few words, which hold what the learner's code said.
    """

    emitted: dict[str, Any] | None
    status: str
    note: str = ""


def solve(
    source: NotebookNode,
    *,
    seed: int,
    sandbox: bool = True,
    model: bool = False,
    timeout: float = TIMEOUT,
    **places: Any,
) -> NotebookNode:
    """A solution with the outputs of its check cells: what `run`, which see, takes as a reference.

    Raises ValueError where a check cell of it does not pass.
    """
    solved = copy.deepcopy(source)
    cells = [cell for cell in solved.cells if cell.cell_type == "code" and not _is_live(cell)]
    with tempfile.TemporaryDirectory(prefix="companion-") as folder:
        specs = kernelspec(Path(folder), sandbox=sandbox, env={_SEED: str(seed)}, **_given(model, places))
        replay = Replay([cell.source for cell in cells], lambda: Kernel(specs, folder), timeout)
        try:
            for number, cell in enumerate(cells):
                outcome = replay.outcome(number)
                cell.outputs = _stored(outcome.emitted)
                if is_check(cell) and not (outcome.emitted or {}).get("passed"):
                    why = outcome.note or (outcome.emitted or {}).get("error", "a visible check fails")
                    raise ValueError(f"{_grade_id(cell)}: the solution does not pass: {why}")
        finally:
            replay.stop()
    return solved


def run(
    notebooks: Mapping[str, NotebookNode],
    references: Mapping[str, NotebookNode],
    *,
    seed: int,
    folder: Path,
    workers: int = 1,
    sandbox: bool = True,
    model: bool = False,
    executor: Executor | None = None,
    timeout: float = TIMEOUT,
    **places: Any,
) -> dict[str, dict[str, Outcome]]:
    """The outcome of every cell with a grade_id of every notebook, both by name.

    notebooks: by any name; notebooks that are equal are run once. references: by the same names, what `solve`
    returned. seed: the one that `solve` was given. folder: keeps the result files, and a JUnit file of the
    last session. workers: how many notebooks run at the same time. sandbox and `places`: what
    `sandbox.kernelspec` takes. model: whether kernels may read the course's models, for an endpoint of their
    own. executor: submits sessions of a few notebooks each instead of one on this machine. timeout: seconds
    for a cell; a notebook gets ten times as many.

    Raises ValueError for a check cell without a reference, RuntimeError where there is no sandbox.
    """
    options = {"seed": seed, "workers": workers, "sandbox": sandbox, "model": model, "timeout": timeout}
    options |= places
    texts, names = {}, {}
    for key, notebook in notebooks.items():
        text = _with_reference(key, notebook, references[key])
        told = json.dumps([_FORMAT, text, seed, sandbox, model, timeout])
        names[key] = hashlib.sha256(told.encode()).hexdigest()[:40]
        texts[names[key]] = text
    folder = Path(folder).resolve()  # pytest works in another one
    results = folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    for left in results.glob("companion-*"):  # by a session that was killed
        shutil.rmtree(left)
    for _ in range(2):  # what a crash of pytest itself took with it gets a second chance
        todo = {name: text for name, text in texts.items() if _read(results / f"{name}.json") is None}
        if not todo:
            break
        size = CHUNK if executor else math.ceil(len(todo) / math.ceil(len(todo) / SESSION))  # even parts
        chunks = [dict(list(todo.items())[start : start + size]) for start in range(0, len(todo), size)]
        if executor is None:
            for chunk in chunks:
                _session(chunk, results, folder / "junit.xml", **options)
            continue
        for done in as_completed([executor.submit(_remote, chunk, options) for chunk in chunks]):
            for name, text in done.result().items():
                write(results / f"{name}.json", text)
    outcomes = {name: _read(results / f"{name}.json") for name in texts}
    for key, name in names.items():
        if outcomes[name] is None:
            missing = Outcome(None, "not run", "no kernel could be started for it")
            outcomes[name] = {_grade_id(cell): missing for cell in notebooks[key].cells if _grade_id(cell)}
    return {key: outcomes[name] for key, name in names.items()}


def _with_reference(key: str, notebook: NotebookNode, reference: NotebookNode) -> str:
    """A notebook as nbval gets it: a check cell's stored output is what the solution emitted."""
    solved = {_grade_id(cell): result(cell) for cell in reference.cells if is_check(cell)}
    known = set().union(*(_named(cell.source) for cell in reference.cells if cell.cell_type == "code"))
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], 1
            if is_check(cell):
                cell.source = _with_builtins(cell.source, known)
                if not (emitted := solved.get(_grade_id(cell))):
                    raise ValueError(f"{key}: the reference has no result for {_grade_id(cell)}")
                cell.outputs = _stored(emitted)
    return nbformat.writes(notebook)


def _with_builtins(code: str, known: set[str]) -> str:
    """A check cell's code that finds Python's own `list` where a learner's `list = [1, 2]` hides it.

    Learners see that only if a visible check calls `list`; the hidden ones must not cost them points for it.
    known: names that the exercise itself gives a value.
    """

    class Qualified(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            if node.id in known or node.id.startswith("_") or not hasattr(builtins, node.id):
                return node
            return ast.Attribute(ast.Name("_builtins", ast.Load()), node.id, ast.Load())

    try:
        return "import builtins as _builtins\n" + ast.unparse(Qualified().visit(ast.parse(code)))
    except SyntaxError:  # there is a magic of IPython's in it
        return code


def _named(code: str) -> set[str]:
    """All names that code gives a value anywhere."""
    try:
        nodes = list(ast.walk(ast.parse(code)))
    except SyntaxError:
        return set()
    found = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    found |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    found |= {node.asname or node.name for node in nodes if isinstance(node, ast.alias)}
    return found | {
        node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }


def _given(model: bool, places: Mapping[str, Any]) -> dict[str, Any]:
    """What `kernelspec` is given on this machine: with the models' folder where they are needed."""
    if not model:
        return dict(places)
    from companion.local import weights

    [folder] = {weights.path(name).parent for name in weights.MODELS}
    return {**places, "weights": folder}


def _session(
    texts: Mapping[str, str],
    results: Path,
    junit: Path,
    *,
    seed: int,
    workers: int,
    sandbox: bool,
    model: bool,
    timeout: float,
    **places: Any,
) -> None:
    """One pytest over notebooks, which leaves a result file for each.

    Raises RuntimeError, and runs nothing, where the sandbox does not hold.
    """
    if sandbox:
        prove(places.get("readable", ()))
    with tempfile.TemporaryDirectory(prefix="companion-", dir=results) as work:
        kernelspec(Path(work), sandbox=sandbox, env={_SEED: str(seed)}, **_given(model, places))
        batch = Path(work) / "batch"
        batch.mkdir()
        for name, text in texts.items():
            (batch / f"{name}.ipynb").write_text(text, encoding="utf-8")
        (Path(work) / "pytest.ini").write_text("[pytest]\n")  # nobody's settings are found above it
        command = [sys.executable, "-m", "pytest", "--nbval", f"--nbval-cell-timeout={timeout}", str(batch)]
        command += [
            "-p",
            "companion.grading.plugin",
            f"--grading-work={work}",
            f"--grading-results={results}",
        ]
        command += ["-p", "no:cacheprovider", "-q", "--tb=line", f"--junitxml={junit}", f"--rootdir={work}"]
        command += ["-c", f"{work}/pytest.ini", "-n", str(min(workers, len(texts)) if workers > 1 else 0)]
        command += ["--dist", "loadscope"]  # all cells of a notebook go to the same worker
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        done = subprocess.run(command, cwd=work, env=env, stdin=subprocess.DEVNULL, capture_output=True)
        broken = done.returncode not in (0, 1)  # perhaps by one notebook, which must not stop the others
        if done.returncode == _USAGE or (broken and not any(results.glob("*.json"))):
            said = (done.stdout + done.stderr).decode(errors="replace").strip()[-2000:]
            raise RuntimeError(f"pytest could not run the notebooks: {said}")


def _remote(texts: Mapping[str, str], options: Mapping[str, Any]) -> dict[str, str]:
    """A session on whichever machine this runs on; returns the result files' texts.

    options: what `_session` takes by name. Not by name here, since executors keep names for themselves.
    """
    with tempfile.TemporaryDirectory(prefix="companion-") as folder:
        _session(texts, Path(folder), Path(folder) / "junit.xml", **options)
        return {file.stem: file.read_text() for file in Path(folder).glob("*.json")}


def to_json(outcomes: Mapping[str, Outcome]) -> str:
    """The text of a result file."""
    return json.dumps({"format": _FORMAT, "outcomes": {name: asdict(one) for name, one in outcomes.items()}})


def _read(file: Path) -> dict[str, Outcome] | None:
    try:
        found = json.loads(file.read_text())
        return {name: Outcome(**one) for name, one in found["outcomes"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(file)


def _grade_id(cell: NotebookNode) -> str:
    return cell.metadata.get("nbgrader", {}).get("grade_id", "")


def _is_live(cell: NotebookNode) -> bool:
    return "live" in cell.metadata.get("tags", [])


def _stored(emitted: dict[str, Any] | None) -> list[NotebookNode]:
    return [nbformat.v4.new_output("display_data", data={MIME: emitted})] if emitted else []


# One notebook


class Replay:
    """The cells of a notebook, run in order, in another kernel where one is lost.

    A kernel that died or had to be killed takes the learner's functions with it. So a fresh one first runs
    again all cells before that had ended by themselves; the cell that did not is left out.

    learners: which cells are the learner's: what they define counts even if they raise.
    """

    def __init__(
        self,
        sources: Sequence[str],
        start: Callable[[], "Kernel"],
        timeout: float,
        learners: Collection[int] = (),
    ) -> None:
        self.sources, self.start, self.timeout, self.learners = sources, start, timeout, learners
        self.left = 10 * timeout  # seconds for the whole notebook
        self.outcomes: list[Outcome] = []
        self.ended: list[int] = []  # cells to run again in a fresh kernel
        self.kernel: Kernel | None = None

    def outcome(self, number: int) -> Outcome:
        """How a cell ended; cells before it are run first if they have not been."""
        while len(self.outcomes) <= number:
            self.outcomes.append(self._run(len(self.outcomes)))
        return self.outcomes[number]

    def stop(self) -> None:
        """End the kernel."""
        if self.kernel:
            self.kernel.stop()
            self.kernel = None

    def _run(self, number: int) -> Outcome:
        outcome = self._execute(number)
        if outcome.status == "died" and not outcome.note:
            # Perhaps an earlier cell killed it, with a thread that was still running: wait after each.
            outcome = self._execute(number, pause=0.5)
        if outcome.status in ("ok", "error"):
            self.ended.append(number)
        if outcome.status == "died" and not outcome.note:
            return Outcome(None, "died", "its kernel died")
        return outcome

    def _execute(self, number: int, pause: float = 0.0) -> Outcome:
        """Run a cell, in a fresh kernel if need be, which is gone again where the cell did not end well."""
        while self.left > 0 and (self.kernel is None or not self.kernel.alive()):
            self.stop()
            self.kernel = self.start()
            for earlier in list(self.ended):
                again = self._timed(earlier)
                if again.status in ("ok", "error") and not self.kernel.dies_within(pause):
                    continue
                self.ended.remove(earlier)
                if again.status in ("ok", "error"):
                    why = "it killed its kernel a little later"
                    self.outcomes[earlier] = replace(self.outcomes[earlier], status="died", note=why)
                self.stop()
                break
        if self.left <= 0:
            self.stop()
            return Outcome(None, "not run", f"the notebook had taken {10 * self.timeout:g} seconds before")
        outcome = self._timed(number)
        if outcome.status not in ("ok", "error"):
            self.stop()
        return outcome

    def _timed(self, number: int) -> Outcome:
        began = time.monotonic()
        try:
            outcome = self.kernel.execute(self.sources[number], self.timeout)
            if outcome.status == "error" and number in self.learners:
                code = _DEFINE.replace("CODE", json.dumps(self.sources[number]))
                defined = self.kernel.execute(code, self.timeout)
                return outcome if defined.status in ("ok", "error") else defined
            return outcome
        finally:
            self.left -= time.monotonic() - began


class Kernel:
    """A kernel of kernelspec `NAME`, whose every message may be hostile.

    folder: where it works, if it has no place of its own in a sandbox. cpu: the processor to keep it to in
    a sandbox. Raises RuntimeError where it does not start.
    """

    def __init__(self, specs: KernelSpecManager, folder: str, cpu: int | None = None) -> None:
        self.manager = KernelManager(kernel_name=NAME, kernel_spec_manager=specs)
        walled = "kernel_provisioner" in specs.get_kernel_spec(NAME).metadata
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        if walled:
            # A socket in the sandbox may be replaced later, by a link to another: connect once only.
            self.manager.context.setsockopt(zmq.RECONNECT_IVL, -1)
            quiet |= {"cpu": cpu}
        self.manager.start_kernel(cwd=folder, **quiet)
        self.client = self.manager.client()
        self.client.context.setsockopt(zmq.MAXMSGSIZE, MOST_OUTPUT)
        self.client.context.setsockopt(
            zmq.SNDTIMEO, 1000
        )  # milliseconds; nobody takes what a dead one is sent
        if walled:
            self.client.context.setsockopt(zmq.RECONNECT_IVL, -1)
        self.client.start_channels(stdin=False, hb=False, control=False)
        self.shell, self.iopub = self.client.shell_channel.socket, self.client.iopub_channel.socket
        self.poller = zmq.Poller()
        self.poller.register(self.shell, zmq.POLLIN)
        self.poller.register(self.iopub, zmq.POLLIN)
        self.looked = time.monotonic()
        for _ in range(2 * START):  # until it answers on both channels
            if self._await(self.client.kernel_info(), 0.5).status == "ok":
                self.execute(_EXIT, START)
                return
        self.stop()
        raise RuntimeError("the kernel does not answer")

    def alive(self) -> bool:
        """Whether its process runs."""
        return self.manager.is_alive()

    def dies_within(self, seconds: float) -> bool:
        """Whether it dies while nothing is asked of it."""
        end = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() >= end:
                return False
            time.sleep(0.02)
        return True

    def execute(self, code: str, timeout: float) -> Outcome:
        """Run code, and wait until it has ended, its kernel has died, or it takes too much of something."""
        try:
            request = self.client.execute(code, allow_stdin=False, stop_on_error=False)
        except zmq.Again:
            return Outcome(None, "died")
        return self._await(request, timeout)

    def stop(self) -> None:
        """Kill it with all that it started."""
        try:
            family = psutil.Process(self.manager.provisioner.pid).children(recursive=True)
        except (psutil.Error, AttributeError, ValueError, TypeError):
            family = []
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        for process in family:  # in a sandbox they are gone by now
            if process.is_running():
                process.kill()

    def _await(self, request: str, timeout: float) -> Outcome:
        emitted: list[Any] = []
        reply, idle, size, end = None, False, 0, time.monotonic() + timeout
        while not (reply and idle):
            ready = dict(self.poller.poll(50))
            for channel in ready:
                frames = channel.recv_multipart()
                length = sum(map(len, frames))
                size += length
                # What is too large for a result, such as an image, is counted and not read.
                kind, content = self._message(frames, request) if length <= LARGEST_RESULT else ("", {})
                if channel is self.shell and kind.endswith("_reply") and not reply:
                    reply = content
                    end = min(end, time.monotonic() + 5)  # for the outputs to come in
                elif kind == "status" and content.get("execution_state") == "idle":
                    idle = True
                elif kind in ("display_data", "execute_result") and len(emitted) < 2:
                    data = content.get("data")
                    if isinstance(data, dict) and MIME in data and not _is_deep(data[MIME]):
                        emitted.append(data[MIME])
            if size > MOST_OUTPUT:
                return Outcome(None, "flood", f"it gave out more than {MOST_OUTPUT >> 20} MB")
            if not ready and not self.alive():
                return Outcome(None, "died")
            now = time.monotonic()
            if now - self.looked > 0.25:
                self.looked = now
                if excess := over_limit(self.manager.provisioner.pid):
                    return Outcome(None, "died", excess)
            if now > end:
                if reply:
                    return Outcome(None, "flood", "its output did not come in, perhaps for its size")
                return Outcome(None, "timeout", f"it did not end within {timeout:g} seconds")
        found = emitted[0] if len(emitted) == 1 and isinstance(emitted[0], dict) else None
        if reply.get("status") != "ok":
            name, value = (x if isinstance(x := reply.get(key), str) else "" for key in ("ename", "evalue"))
            said = f"{name or 'an error'}: {value}"
            return Outcome(found, "error", said[:300].encode("utf-8", "backslashreplace").decode())
        return Outcome(found, "ok", "" if len(emitted) < 2 else "it emitted more than one result")

    def _message(self, frames: list[bytes], request: str) -> tuple[str, dict[str, Any]]:
        """A message's kind and content; both empty where it is malformed, or about another request."""
        try:
            _, parts = self.client.session.feed_identities(frames)
            message = self.client.session.deserialize(parts)
            if message["parent_header"].get("msg_id") == request and isinstance(message["content"], dict):
                return str(message["msg_type"]), message["content"]
        except Exception:  # a stranger wrote it: bad signatures, bad JSON, nested too deep, …
            pass
        return "", {}


def _is_deep(value: Any) -> bool:
    """Whether JSON has more levels than a result may; what is too deep cannot be copied or written."""
    level = [value]
    for _ in range(DEEPEST_RESULT):
        level = [
            item
            for one in level
            if isinstance(one, dict | list)
            for item in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return False
    return True
