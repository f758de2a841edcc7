"""Do an exercise's checks tell right from wrong? Its source is run with answers whose worth is known.

The solution must earn every point, the unsolved cells none, and no listed wrong answer its question's points.
Points are decided as a grader decides them: outside the kernel, by comparing what a check cell emitted with
what it emitted for the solution. Sources are the course's own, so they run as they are: no sandbox here.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nbclient import NotebookClient
from nbformat import NotebookNode

from companion.checks import MIME, difference
from companion.grading import release

TIMEOUT = 120  # seconds for a cell


def back_check(source: Path) -> list[str]:
    """What is wrong with the checks of a source, a line for each complaint; empty where they hold.

    Raises ValueError for a source that cannot be released, or whose own solution does not pass.
    """
    notebook = release.read(Path(source))
    asked = release.questions(notebook)
    answers = {q.grade_id: [release.unmark(q.answer.source), *q.wrong_answers] for q in asked}
    complaints = []
    try:
        tried = try_answers(notebook, answers)
    except ValueError as error:
        raise ValueError(f"{Path(source).name}, {error}") from error
    for name, earned in tried.items():
        complaints += [] if len(earned) > 1 else [f"{name}: no wrong answer is listed"]
        for number, points in enumerate(earned):
            which = f"wrong answer {number}" if number else "the unsolved cell"
            complaints += [f"{name}: {which} earns {points:g} points"] if points else []
    return complaints


def try_answers(notebook: NotebookNode, answers: Mapping[str, Sequence[str]]) -> dict[str, list[float]]:
    """The points that each answer earns at its question's check cells.

    All run in one kernel: after a question's last check cell, each of its answers is run and checked, and
    then the solution again. That is sound for answers that define functions and change nothing else. Cells
    tagged `live` are left out: they ask the real model for the learner to read, and no check depends on them.

    notebook: a source, as `release.read` returns it. answers: for an answer cell's grade_id, the code to try.

    Returns a list of points for each grade_id, in the order of `answers`. Raises ValueError where the
    solution does not pass.
    """
    notebook = copy.deepcopy(notebook)
    questions = release.questions(notebook)
    last = {id(question.checks[-1]): question for question in questions}
    trials: dict[str, list[list[NotebookNode]]] = {}  # for a grade_id, the check cells after each answer
    cells: list[NotebookNode] = []
    for cell in notebook.cells:
        if "live" in cell.metadata.get("tags", []):
            continue
        cells.append(cell)
        if question := last.get(id(cell)):
            for code in answers.get(question.grade_id, ()):
                answer, *checks = copy.deepcopy([question.answer, *question.checks])
                answer.source = code
                cells += [answer, *checks]
                trials.setdefault(question.grade_id, []).append(checks)
            cells.append(copy.deepcopy(question.answer))
    notebook.cells = cells
    run(notebook)
    solved = {question.grade_id: question.checks for question in questions}
    for check in (check for checks in solved.values() for check in checks):
        if not (emitted := result(check)) or not emitted["passed"]:
            raise ValueError(f"{check.metadata.nbgrader.grade_id}: the solution does not pass")
    return {
        name: [sum(map(_points, trial, solved[name])) for trial in tried] for name, tried in trials.items()
    }


def run(notebook: NotebookNode, folder: Path | None = None) -> NotebookNode:
    """Run all cells of a notebook, also after one that raises. It is returned, with the outputs in it."""
    resources = {"metadata": {"path": str(folder)}} if folder else {}
    return NotebookClient(notebook, timeout=TIMEOUT, allow_errors=True, resources=resources).execute()


def result(check: NotebookNode) -> dict[str, Any] | None:
    """What a check cell emitted; None where it emitted nothing, or more than one result."""
    found = [output.data[MIME] for output in check.outputs if MIME in output.get("data", {})]
    return found[0] if len(found) == 1 and isinstance(found[0], dict) else None


def agrees(emitted: Any, reference: Mapping[str, Any]) -> bool:
    """Whether a check cell emitted what it emits for the solution, within the solution's tolerances."""
    try:
        pairs = list(zip(emitted["values"], reference["values"], strict=True))
        return "error" not in emitted and not any(
            got["what"] != expected["what"]
            or difference(got["value"], expected["value"], expected["tolerance"])
            for got, expected in pairs
        )
    except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError):  # a stranger emitted it
        return False


def _points(check: NotebookNode, solved: NotebookNode) -> float:
    return solved.metadata.nbgrader.points if agrees(result(check), result(solved)) else 0
