"""Grade a folder of submissions: collect, restore, run, score, report.

One grader at a time works on a folder of grades. What a kernel gave out is kept there, so that a run that
was cut off goes on where it stopped, and grading again runs only what changed. What changed meets other
hidden inputs than before: learners may have got those of the last time out of their kernel, and into their
feedback. The tables are written by this process, after all kernels are gone.
"""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from secrets import randbelow
from typing import Any

import filelock
from nbformat import NotebookNode
from tqdm import tqdm

from companion.grading import collect, release, report, restore, run, sandbox
from companion.grading.collect import safe_name
from companion.grading.score import NOT_STARTED, Book, Learner, Measure, Work, measure, score, troubles

_Key = tuple[str, str]  # a learner and an exercise
_LATEST = "It was submitted in {} files; the newest counts, {}."


def grade(
    submissions: Path,
    out: Path,
    exercises: Path,
    *,
    workers: int = 1,
    seed: int | None = None,
    sandboxed: bool = True,
    executor: Executor | None = None,
    **options: Any,
) -> Book:
    """Grade all submissions in a folder, and write what `report.write` writes into another.

    exercises: the folder of the solutions. workers: notebooks that run at the same time. seed: of all hidden
    inputs; if none is given, code that was graded in `out` before keeps its own, and one is drawn for the
    rest. sandboxed: False runs strangers' code as it is. executor and options: what `run.run` takes.

    Raises ValueError for folders that cannot be graded or written to, RuntimeError where there is no sandbox,
    where it does not hold, and where another grader works on `out`.
    """
    submissions, out = Path(submissions), Path(out)
    _check_folders(submissions, out, Path(exercises) if sandboxed else None)
    sources = _sources(Path(exercises))
    filed, learners = _file(collect.collect(submissions, sources), sources, submissions)
    with _alone(out) as work:
        if sandboxed:
            sandbox.prove(options.get("readable", ()))
        options["sandbox"] = sandboxed
        model = {name: release.needs_model(source) for name, source in sources.items()}
        slow = {"model": True, "timeout": run.MODEL_TIMEOUT}
        kinds = {asks: (slow | options if asks else options) for asks in (False, True)}
        names = sorted({exercise for _, exercise in filed})
        restored = {key: one.restored(sources[key[1]]) for key, one in _progress("submissions", filed)}
        runnable = {key: found.notebook for key, found in restored.items() if found.notebook}
        seeds = _seeds(work, runnable, seed)
        needed = {(key[1], one) for key, one in seeds.items()}
        needed |= {(name, seed or 0) for name in {*names} - {name for name, _ in needed}}
        with tqdm(sorted(needed), desc="solutions", disable=None, leave=False) as bar:
            measures = {
                (name, one): _measure(name, sources[name], seed=one, **kinds[model[name]])
                for name, one in bar
            }
        outcomes = {}
        where = {"folder": work, "workers": workers, "executor": executor}
        with _watched(work, len(runnable)):
            for asks, one in sorted({(model[key[1]], one) for key, one in seeds.items()}):
                keys = [key for key in runnable if (model[key[1]], seeds[key]) == (asks, one)]
                notebooks = {_id(key): runnable[key] for key in keys}
                references = {_id(key): measures[key[1], one].notebook for key in keys}
                outcomes |= run.run(notebooks, references, seed=one, **where, **kinds[asks])
        works = [
            _work(key, filed.get(key), restored.get(key), seeds.get(key), measures, outcomes.get(_id(key)))
            for key in ((learner, exercise) for learner in sorted(learners) for exercise in names)
        ]
        book = Book(
            sandboxed,
            {name: measures[min(pair for pair in needed if pair[0] == name)] for name in names},
            tuple(learners[name] for name in sorted(learners)),
            tuple(works),
        )
        report.write(out, book)
        return book


def _id(key: tuple[str, str]) -> str:
    return f"{safe_name(key[0])}/{key[1]}"


# Before


def _sources(folder: Path) -> dict[str, NotebookNode]:
    files = sorted(folder.glob("*.ipynb"))
    if not files:
        raise ValueError(f"{folder} holds no exercise: name the folder of the solutions with --exercises")
    return {file.stem: release.read(file) for file in files}


def _check_folders(submissions: Path, out: Path, exercises: Path | None) -> None:
    """Raise ValueError where folders lie in one another. exercises: None where there is no sandbox."""
    for folder in [exercises, submissions, out] if exercises else []:
        if place := sandbox.shows(folder):
            raise ValueError(
                f"{folder} lies in {place}, which submissions can read: move it, or Python's environment"
            )
    inner = submissions / "submitted"
    inner = (inner if inner.is_dir() and not inner.is_symlink() else submissions).resolve()
    if out.resolve().is_relative_to(inner):
        raise ValueError(f"{out} lies among the submissions: give --out a folder of its own")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give --out a folder")


@contextmanager
def _alone(out: Path) -> Iterator[Path]:
    """The folder for what is kept from run to run, as long as no other grader has it."""
    work = out / ".work"
    work.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(work / "lock", timeout=0):
            yield work
    except filelock.Timeout:
        raise RuntimeError(f"another grader works on {out}: wait for it, or give another --out") from None


def _seeds(work: Path, notebooks: Mapping[_Key, NotebookNode], seed: int | None) -> dict[_Key, int]:
    """The seed of each notebook: the one that was asked for, or that of the same code before, or a new one.

    They are kept before anything runs, so that a run that was cut off goes on with them.
    """
    file = work / "seeds.json"
    try:
        kept = {code: int(one) for code, one in json.loads(file.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        kept = {}
    new = randbelow(2**32) if seed is None else seed
    codes = {key: _code(key[1], notebook) for key, notebook in notebooks.items()}
    seeds = {key: kept.get(code, new) if seed is None else seed for key, code in codes.items()}
    run.write(file, json.dumps(kept | {codes[key]: one for key, one in seeds.items()}))
    return seeds


def _code(exercise: str, notebook: NotebookNode) -> str:
    """A hash of what a notebook runs, the instructor's cells included."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps([exercise, code]).encode()).hexdigest()[:40]


def _measure(name: str, source: NotebookNode, **options: Any) -> Measure:
    try:
        return measure(source, **options)
    except ValueError as error:
        raise ValueError(f"{name}, {error}") from error


# Submissions


@dataclass
class _Filed:
    """A learner's notebooks for an exercise; the newest counts that holds an answer."""

    root: Path
    paths: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    counted: Path | None = None  # known when it is restored; before that, the newest

    @property
    def newest_first(self) -> list[Path]:
        return sorted(self.paths, key=lambda path: (path.lstat().st_mtime_ns, str(path)), reverse=True)

    @property
    def file(self) -> str:
        path = self.counted or next(iter(self.newest_first), None)
        return _shown(path.relative_to(self.root)) if path else ""

    def restored(self, source: NotebookNode) -> restore.Restored:
        first = None
        for path in self.newest_first:
            self.counted, found = path, self._restored(path, source)
            if len(self.paths) == 1 or restore.is_work(found, source):
                break
            first = first or found
        else:
            self.counted = None
            return first or restore.Restored(None, "not submitted", [])
        if first:
            note = f"No answer is in the newer one, so the newest with answers counts, {self.file}."
            return replace(found, notes=[note, *found.notes])
        return found

    def _restored(self, path: Path, source: NotebookNode) -> restore.Restored:
        try:
            content = collect.read(path, restore.LARGEST)
        except OSError as error:
            return restore.Restored(None, "not submitted", [f"It cannot be read: {error.strerror or error}."])
        return restore.restore(content, source)


def _file(
    found: list[collect.Submission], sources: Mapping[str, NotebookNode], root: Path
) -> tuple[dict[tuple[str, str], _Filed], dict[str, Learner]]:
    """Submissions by learner and exercise, and the learners. Without a name that says it, the content does.

    Raises ValueError where there is none of these exercises.
    """
    filed: dict[tuple[str, str], _Filed] = {}
    ids: dict[str, str] = {}
    loose: dict[str, list[str]] = {}
    for one in found:
        ids[one.learner] = one.lms_id or ids.get(one.learner, "")
        loose.setdefault(one.learner, [])
        named = one.exercise or (next(iter(sources)) if len(sources) == 1 else "")
        if named:
            place = filed.setdefault((one.learner, named), _Filed(root))
            before = len(place.paths)
            place.paths += [path for path in (one.path, *one.others) if path]
            place.notes += one.notes
            if before and one.path:
                place.notes.append(_LATEST.format(len(place.paths), place.file))
            continue
        # The notes speak of several notebooks for one exercise, which they may not be.
        loose[one.learner] += one.notes[:-1] if one.others else one.notes
        for path in (path for path in (one.path, *one.others) if path):
            try:
                exercise = restore.recognise(collect.read(path, restore.LARGEST), sources)
            except OSError:
                exercise = None
            name = _shown(path.relative_to(root))
            if exercise is None:
                loose[one.learner].append(f"{name} cannot be read, or is none of the exercises.")
                continue
            place = filed.setdefault((one.learner, exercise), _Filed(root))
            place.paths.append(path)
            if len(place.paths) > 1:
                place.notes.append(_LATEST.format(len(place.paths), place.file))
    if not filed:
        names = ", ".join(sources)
        raise ValueError(f"{root}: no submission is one of {names}. Is --exercises the right folder?")
    return filed, {name: Learner(name, ids[name], tuple(notes)) for name, notes in loose.items()}


def _shown(path: Path) -> str:
    return path.as_posix().encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _work(
    key: tuple[str, str],
    filed: _Filed | None,
    restored: restore.Restored | None,
    seed: int | None,
    measures: Mapping[tuple[str, int], Measure],
    outcomes: Mapping[str, run.Outcome] | None,
) -> Work:
    learner, exercise = key
    if filed is None or restored is None:
        return Work(learner, exercise, "not submitted")
    notes = (*filed.notes, *restored.notes)
    if restored.notebook is None or seed is None or outcomes is None:
        return Work(learner, exercise, "not submitted", filed.file, notes)
    if all(outcome.status == "not run" for outcome in outcomes.values()):
        return Work(learner, exercise, "not graded", filed.file, (*notes, NOT_STARTED))
    answers = {cell.id: cell.source for cell in restored.notebook.cells if release.is_answer(cell)}
    measure = measures[exercise, seed]
    checks, ended = score(outcomes, measure), troubles(outcomes, measure)
    return Work(learner, exercise, "ok", filed.file, notes, checks, answers, ended, seed)


# Progress


def _progress(what: str, items: Mapping) -> Iterator:
    yield from tqdm(sorted(items.items()), desc=what, disable=None, leave=False)


@contextmanager
def _watched(work: Path, total: int) -> Iterator[None]:
    """A bar that counts the result files; where nobody looks at a terminal, nothing is shown."""
    results = work / "results"
    before = set(results.glob("*.json"))
    done = threading.Event()
    with tqdm(total=total, desc="notebooks", disable=None, leave=False) as bar:

        def watch() -> None:
            while not done.wait(0.5):
                bar.n = min(total, len(set(results.glob("*.json")) - before))
                bar.refresh()

        thread = threading.Thread(target=watch, daemon=True)
        if not bar.disable:
            thread.start()
        try:
            yield
        finally:
            done.set()
            if thread.ident:
                thread.join()
