"""What passes in a learner's notebooks, by the results that their check cells stored.

It shows what the check cells said in the learner's own kernel, so it helps the learner and proves nothing:
grading runs everything again, with further inputs. An answer that was edited and not run cannot be noticed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from companion.grading import backcheck, release

STATES = ("passed", "not yet", "not run")


@dataclass(frozen=True)
class Check:
    """A check cell: its question, its points, one of `STATES`, and what is to be done, in a sentence."""

    question: str
    points: float
    state: str
    note: str = ""


@dataclass(frozen=True)
class Exercise:
    """A notebook with check cells."""

    name: str
    checks: tuple[Check, ...]

    @property
    def points(self) -> float:
        """What the notebook is worth."""
        return sum(check.points for check in self.checks)

    @property
    def passed(self) -> float:
        """The points of the checks that pass."""
        return sum(check.points for check in self.checks if check.state == "passed")


def read(place: Path, run: bool = False) -> list[Exercise]:
    """The exercises in a folder, or the one of a notebook.

    run: run each notebook from top to bottom in a fresh kernel, as a grader does, and take what comes; the
    file stays as it is.

    Raises ValueError where there is none, and for a file that is not a notebook.
    """
    files = [place] if place.is_file() else sorted(place.glob("*.ipynb"))
    found = []
    for file in files:
        notebook = _notebook(file)
        if any(map(release.is_check, notebook.cells)):
            if run:
                notebook.cells = [c for c in notebook.cells if "live" not in c.metadata.get("tags", [])]
                backcheck.run(notebook, file.parent)
            found.append(Exercise(file.stem, tuple(_checks(notebook))))
    if not found:
        raise ValueError(f"{place} holds no exercise: name a notebook with check cells, or its folder")
    return found


def _notebook(file: Path) -> NotebookNode:
    try:
        notebook = nbformat.reads(file.read_text(encoding="utf-8-sig"), as_version=4)
        nbformat.validate(notebook)
        return notebook
    except OSError:
        raise
    except Exception as error:  # nbformat raises whatever the JSON makes it stumble over
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file} is not a notebook: {why}") from error


def _checks(notebook: NotebookNode) -> Iterator[Check]:
    answer = None
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        if release.is_answer(cell):
            answer = cell
        elif release.is_check(cell):
            meta = cell.metadata.nbgrader
            yield Check(
                str(meta.grade_id).removeprefix("check-"), meta.get("points", 0), *_state(cell, answer)
            )


def _state(check: NotebookNode, answer: NotebookNode | None) -> tuple[str, str]:
    emitted = backcheck.result(check)
    if emitted is None:
        return "not run", "Run its cells, and save the notebook."
    when, answered = check.execution_count or 0, (answer or {}).get("execution_count") or 0
    if answered > when > 0:
        return "not run", "The answer was run after the check: run the check again."
    if emitted.get("passed") is True:
        return "passed", ""
    text = next(output.data.get("text/plain", "") for output in check.outputs if "data" in output)
    lines = "".join(text).splitlines()
    first = next((place for place, line in enumerate(lines) if line.startswith("✗")), None)
    if first is None:
        return "not yet", ""
    # The first check that fails, and its hint.
    said = [lines[first].removeprefix("✗ not yet: ")]
    said += [line.strip() for line in lines[first + 1 : first + 6] if line.startswith("    look at: ")][:1]
    return "not yet", "; ".join(said)
