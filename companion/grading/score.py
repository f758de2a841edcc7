"""From what check cells emitted to points: a cell's points count only if all of its values agree.

`measure` runs a solution twice: as it is, and without the hidden tests. So it is known which values learners
may be shown, and with which hint. What a submission emitted is a stranger's: it is compared, shortened, and
never believed.
"""

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from companion.checks import difference, show
from companion.grading import release, restore, run
from companion.grading.backcheck import agrees, result
from companion.grading.run import Outcome

SAID = {
    "error": "It stopped with an error.",
    "stopped": "It was stopped: it took too much time, memory or output, or ended its kernel.",
    "not run": "It was not run: the cells before it had used up the notebook's time.",
}
# Which limit is met first depends on the machine's speed, which no grading may depend on.
_STATUS = {"timeout": "stopped", "died": "stopped", "flood": "stopped"}
NOT_STARTED = "No kernel could be started for it: look at the machine, and grade again."

# Goes before the cells of a solution: the check then emits its hints, too.
_LOOKS = """
from companion.checks import Check as _Check

def _equal(self, what, got, expected, *, tolerance=0.0, look="", _equal=_Check.equal):
    _equal(self, what, got, expected, tolerance=tolerance, look=look)
    self.values[-1]["look"] = look

_Check.equal = _equal
"""


@dataclass(frozen=True)
class Measure:
    """What an exercise's check cells emit for its solution.

    notebook: as `run.solve` returns it. shown: for each check's grade_id the values, by their place, that
    learners see, with the hint. All others are hidden.
    """

    notebook: NotebookNode
    shown: Mapping[str, Mapping[int, str]]

    @cached_property
    def questions(self) -> list[release.Question]:
        """The exercise's questions, in order; the outputs of their check cells are the reference."""
        return release.questions(self.notebook)

    @cached_property
    def checks(self) -> dict[str, NotebookNode]:
        """The check cells by grade_id, in order."""
        cells = (cell for question in self.questions for cell in question.checks)
        return {cell.metadata.nbgrader.grade_id: cell for cell in cells}

    @property
    def points(self) -> float:
        """What the exercise is worth."""
        return sum(cell.metadata.nbgrader.points for cell in self.checks.values())

    def has_hidden(self, check: str) -> bool:
        """Whether a check cell has values that learners do not see."""
        return len(result(self.checks[check])["values"]) > len(self.shown[check])


@dataclass(frozen=True)
class Value:
    """A value that learners see, as text: what was asked, what was expected, what came, and the hint."""

    what: str
    passed: bool
    expected: str
    came: str
    difference: str
    look: str


@dataclass(frozen=True)
class Scored:
    """A check cell of a submission.

    status: "ok", or else one of `SAID`. values: those that are shown. hidden: whether all others passed; None
    where there are none.
    note: what else there is to say, in sentences.
    """

    check: str
    question: str
    points: float
    earned: float
    status: str
    values: tuple[Value, ...]
    hidden: bool | None
    note: str = ""


@dataclass(frozen=True)
class Work:
    """What a learner submitted for an exercise, and what it earned.

    status: "ok", "not submitted" (also for what cannot be read, or is not this exercise), or "not graded",
    where no kernel could be started. file: the notebook that counts, from the submissions' folder.
    seed: of its hidden inputs; None where it was not run.
    answers: the answer cells' code by grade_id. troubles: by grade_id, how answer cells ended that did not
    end well.
    """

    learner: str
    exercise: str
    status: str
    file: str = ""
    notes: tuple[str, ...] = ()
    checks: tuple[Scored, ...] = ()
    answers: Mapping[str, str] = field(default_factory=dict)
    troubles: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None

    @property
    def points(self) -> float:
        """What was earned."""
        return sum(check.earned for check in self.checks)


@dataclass(frozen=True)
class Learner:
    """Somebody who submitted something. notes: about files that belong to no exercise."""

    name: str
    lms_id: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Book:
    """A grading: for every learner and every exercise of which something was submitted, a work, sorted."""

    sandbox: bool
    measures: Mapping[str, Measure]
    learners: tuple[Learner, ...]
    works: tuple[Work, ...]

    @property
    def points(self) -> float:
        """What all exercises are worth."""
        return sum(measure.points for measure in self.measures.values())

    @property
    def seeds(self) -> list[int]:
        """The seeds that hidden inputs were drawn with, each once."""
        return sorted({work.seed for work in self.works if work.seed is not None})

    @property
    def weak(self) -> list[str]:
        """The check cells without hidden values, as exercise/grade_id."""
        return [
            f"{name}/{check}"
            for name, measure in self.measures.items()
            for check in measure.checks
            if not measure.has_hidden(check)
        ]

    def works_of(self, learner: str) -> list[Work]:
        """A learner's works, in the order of the exercises."""
        return self._by_learner[learner]

    @cached_property
    def _by_learner(self) -> dict[str, list[Work]]:
        found: dict[str, list[Work]] = {learner.name: [] for learner in self.learners}
        for work in self.works:
            found[work.learner].append(work)
        return found


def measure(source: NotebookNode, *, seed: int, sandbox: bool = True, **options: Any) -> Measure:
    """Run an exercise's solution with the seed of a grading.

    source: as `release.read` returns it. options: what `run.solve` takes.

    Raises ValueError where a check of it does not pass.
    """
    solution, bare = restore.reference(source), restore.reference(source)
    for cell in bare.cells:
        if release.is_check(cell):
            cell.source = release.unmark(cell.source)
    bare.cells.insert(0, new_code_cell(_LOOKS, id="looks"))
    with ThreadPoolExecutor(2) as both:
        solve = partial(run.solve, seed=seed, sandbox=sandbox, **options)
        solved, visible = both.map(solve, (solution, bare))
    open_ = {cell.id: result(cell)["values"] for cell in visible.cells if release.is_check(cell)}
    shown = {
        cell.id: _places(result(cell)["values"], open_[cell.id])
        for cell in solved.cells
        if release.is_check(cell)
    }
    return Measure(solved, shown)


def _places(values: list[dict], visible: list[dict]) -> dict[int, str]:
    """Where among a cell's values the visible ones stand, with their hints."""
    found: dict[int, str] = {}
    for place, value in enumerate(values):
        if len(found) < len(visible):
            wanted = visible[len(found)]
            same = value["what"] == wanted["what"]
            if same and not difference(value["value"], wanted["value"], wanted["tolerance"]):
                found[place] = wanted.get("look", "")
    return found


def score(outcomes: Mapping[str, Outcome], measure: Measure) -> tuple[Scored, ...]:
    """The check cells of a submission, in the exercise's order. Whatever was emitted, nothing is raised.

    outcomes: by grade_id, as `run.run` returns them.
    """
    missing = Outcome(None, "not run")
    return tuple(
        _scored(question.grade_id, cell, outcomes.get(cell.id, missing), measure.shown[cell.id])
        for question in measure.questions
        for cell in question.checks
    )


def troubles(outcomes: Mapping[str, Outcome], measure: Measure) -> dict[str, str]:
    """How answer cells ended, by grade_id, where they did not end well: in a sentence."""
    found = {}
    for question in measure.questions:
        outcome = outcomes.get(question.grade_id)
        if outcome and outcome.status != "ok":
            said = plain(outcome.note) if outcome.status == "error" else ""
            status = _STATUS.get(outcome.status, outcome.status)
            found[question.grade_id] = SAID[status] + (f" {said}" if said else "")
    return found


def plain(text: Any) -> str:
    """A stranger's text: in one line, short, without addresses in memory, and one that can be written."""
    line = " ".join(str(text)[:1000].split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", line)[:300]


def _scored(question: str, cell: NotebookNode, outcome: Outcome, shown: Mapping[int, str]) -> Scored:
    reference, points = result(cell), cell.metadata.nbgrader.points
    emitted = outcome.emitted or {}
    came = emitted.get("values")
    came = came if isinstance(came, list) else []
    visible, hidden = [], []
    for place, expected in enumerate(reference["values"]):
        got = came[place] if place < len(came) else None
        found = _difference(got, expected)
        if place in shown:
            visible.append(_value(got, expected, found, shown[place]))
        else:
            hidden.append(not found)
    right = outcome.status == "ok" and agrees(outcome.emitted, reference)
    status, note = _STATUS.get(outcome.status, outcome.status), ""
    if status != "ok":
        note = SAID[status]
    elif "error" in emitted:
        # What went wrong with a hidden input may tell the input.
        where = plain(emitted["error"]) if len(came) in shown else "with an input that is not shown"
        note = f"It stopped with an error: {where}"
    elif not right and all(value.passed for value in visible) and all(hidden):
        note = "What the cell gave out is not what this check gives out."
    return Scored(
        check=cell.id,
        question=question,
        points=points,
        earned=points if right else 0,
        status=status,
        values=tuple(visible),
        hidden=all(hidden) if hidden else None,
        note=note,
    )


def _difference(got: Any, expected: Mapping[str, Any]) -> str:
    if got is None:
        return "it was not reached"
    try:
        if got["what"] != expected["what"]:
            return "it was not reached"
        return difference(got["value"], expected["value"], expected["tolerance"])
    except (KeyError, TypeError, ValueError, RecursionError, ArithmeticError):
        return "it cannot be read"


def _value(got: Any, expected: Mapping[str, Any], found: str, look: str) -> Value:
    came = ""
    if found != "it was not reached":
        try:
            came = show(got["value"])
        except (KeyError, TypeError, ValueError, RecursionError, ArithmeticError):
            came = "something that cannot be read"
    return Value(expected["what"], not found, show(expected["value"]), came, found, look)
