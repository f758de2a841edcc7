"""From the source of an exercise to the notebook that a learner gets.

The source has nbgrader's cell metadata (schema 3) and markers: what stands between `### BEGIN SOLUTION` and
`### END SOLUTION` in an answer cell becomes a placeholder, what stands between `### BEGIN HIDDEN TESTS` and
`### END HIDDEN TESTS` in a check cell goes. So do outputs, cells tagged `instructor`, and all metadata but
nbgrader's and tags that are not for nbval. Nothing is run here: whether a source's checks tell right from
wrong is for `backcheck`.

https://nbgrader.readthedocs.io/en/stable/contributor_guide/metadata.html
"""

import ast
import copy
import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from nbformat import NotebookNode

PLACEHOLDER = "raise NotImplementedError  # your code here"
_MARKER = re.compile(r"^([ \t]*)### (BEGIN|END) (SOLUTION|HIDDEN TESTS)[ \t]*$")


@dataclass
class Question:
    """An answer cell with the check cells that follow it, up to the next answer cell."""

    answer: NotebookNode
    checks: list[NotebookNode] = field(default_factory=list)

    @property
    def grade_id(self) -> str:
        return self.answer.metadata.nbgrader.grade_id

    @property
    def wrong_answers(self) -> list[str]:
        """Code that must not earn this question's points."""
        return self.answer.metadata.get("companion", {}).get("wrong_answers", [])


def release(source: Path, target: Path, check: bool = False) -> list[Path]:
    """Write the learner's notebook of every source in a folder. All are read before any is written.

    check: write nothing.

    Returns the files that were written, or would be: those that differ from what is on disk. Raises
    ValueError, with the notebook and the cell in one line, for a source that cannot be released.
    """
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        raise ValueError(f"{source} is source and target at once: the solutions would be overwritten")
    sources = sorted(source.glob("*.ipynb"))
    if not sources:
        raise ValueError(f"{source} holds no notebook: name the folder with the solutions")
    made = {target / file.name: (nbformat.writes(strip(read(file))) + "\n").encode() for file in sources}
    stale = [file for file, content in made.items() if not file.exists() or file.read_bytes() != content]
    if not check:
        target.mkdir(parents=True, exist_ok=True)
        for file in stale:
            _write(file, made[file])
    return stale


def read(file: Path) -> NotebookNode:
    """A source, checked: its metadata and markers are complete. Raises ValueError where they are not."""
    try:
        notebook = nbformat.reads(file.read_text(encoding="utf-8-sig"), as_version=4)
        nbformat.validate(notebook)
    except Exception as error:  # nbformat raises whatever the JSON makes it stumble over
        raise ValueError(f"{file.name} is not a notebook: {str(error).strip().splitlines()[0]}") from error
    try:
        if not isinstance(needs_model(notebook), bool):
            raise ValueError(f"companion.model is {needs_model(notebook)!r}, but should be true or false")
        questions(notebook)
    except ValueError as error:
        raise ValueError(f"{file.name}, {error}") from error
    return notebook


def questions(notebook: NotebookNode) -> list[Question]:
    """The questions of a source, in order. Raises ValueError, with the cell, where one is not complete."""
    found: list[Question] = []
    seen: set[str] = set()
    for number, cell in enumerate(notebook.cells, 1):
        meta = cell.metadata.get("nbgrader")
        name = meta.get("grade_id") if isinstance(meta, dict) else None
        where = f"cell {number}" + (f" ({name})" if name else "")
        try:
            if meta is not None:
                _check_metadata(cell, meta)
                if name in seen:
                    raise ValueError("the grade_id is taken: give every cell its own")
                seen.add(name)
                if "instructor" in cell.metadata.get("tags", []):
                    raise ValueError(
                        "a cell of nbgrader's cannot be the instructor's alone: drop one of the two"
                    )
            _check_markers(cell)
            if is_answer(cell):
                found.append(Question(cell))
                wrong = found[-1].wrong_answers
                if not isinstance(wrong, list) or not all(isinstance(code, str) for code in wrong):
                    raise ValueError(f"wrong_answers is {wrong!r}, but should be a list of texts")
            elif is_check(cell):
                if not found:
                    raise ValueError("a check cell stands before any answer cell")
                found[-1].checks.append(cell)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    for question in found:
        if not question.checks:
            raise ValueError(f"answer {question.grade_id}: no check cell follows it")
    if not found:
        raise ValueError("no cell is an answer: its nbgrader metadata needs solution: true")
    return found


def is_answer(cell: NotebookNode) -> bool:
    """Whether the learner writes this cell."""
    return bool(cell.metadata.get("nbgrader", {}).get("solution"))


def is_check(cell: NotebookNode) -> bool:
    """Whether this cell earns points."""
    return bool(cell.metadata.get("nbgrader", {}).get("grade"))


def strip(notebook: NotebookNode) -> NotebookNode:
    """The learner's notebook of a source that `read` returned. Cell ids are grade_ids, or count the cells."""
    cells = []
    for cell in notebook.cells:
        tags = [tag for tag in cell.metadata.get("tags", []) if not tag.startswith("nbval-")]
        if "instructor" in tags:
            continue
        metadata = {"tags": tags} if tags else {}
        name = f"cell-{len(cells) + 1:02}"
        if meta := cell.metadata.get("nbgrader"):
            name = meta["grade_id"]
            metadata |= {"nbgrader": dict(meta) | {"cell_type": cell.cell_type}, "deletable": False}
            metadata |= {"editable": False} if meta["locked"] else {}
        cells.append(copy.deepcopy(cell))
        cells[-1].update(id=name, metadata=metadata, source=unmark(cell.source))
        if cell.cell_type == "code":
            cells[-1].update(outputs=[], execution_count=None)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    learners = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
    nbformat.validate(learners)
    return learners


def needs_model(notebook: NotebookNode) -> bool:
    """Whether a source's checks ask the model itself: its metadata hold `"companion": {"model": true}`."""
    return notebook.metadata.get("companion", {}).get("model", False)


def unmark(code: str) -> str:
    """A cell's text without what its markers enclose; in a function, a placeholder takes its place."""
    kept, inside = [], False
    for line in code.split("\n"):
        if marker := _MARKER.match(line):
            indent, inside = marker[1], marker[2] == "BEGIN"
            if inside and marker[3] == "SOLUTION":
                kept.append(indent + PLACEHOLDER if indent else "# your code here")
        elif not inside:
            kept.append(line)
    return "\n".join(kept).rstrip()


def _check_metadata(cell: NotebookNode, meta: dict) -> None:
    if not isinstance(meta, dict):
        raise ValueError(f"nbgrader's metadata is {meta!r}, but should be an object")
    flags = {name: meta.get(name) for name in ("grade", "solution", "locked", "task")}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"nbgrader's {name} is {value!r}, but should be true or false")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", str(meta.get("grade_id", ""))):
        raise ValueError(f"grade_id is {meta.get('grade_id')!r}, but should be letters, digits, _ and -")
    if meta.get("schema_version") != 3:
        raise ValueError(f"schema_version is {meta.get('schema_version')!r}, but should be 3")
    if flags["task"] or (flags["grade"] and flags["solution"]):
        raise ValueError("only answers with a check cell can be graded: no task, and not grade with solution")
    if (flags["grade"] or flags["solution"]) and cell.cell_type != "code":
        raise ValueError(f"it is a {cell.cell_type} cell, but answers and checks are code")
    if flags["solution"] == flags["locked"]:
        raise ValueError("an answer cell has locked: false, every other cell of nbgrader's locked: true")
    if flags["grade"]:
        points = meta.get("points")
        if isinstance(points, bool) or not isinstance(points, (int, float)) or points <= 0:
            raise ValueError(f"points is {points!r}, but should be a number above 0")
        if (said := _points_in_code(cell.source)) not in ([], [points]):
            raise ValueError(f"points is {points} in the metadata, and {said} in the code")


def _points_in_code(code: str) -> list:
    """What the calls of Check(…, points=…) in a check cell say."""
    calls = [node for node in ast.walk(_parse(code)) if isinstance(node, ast.Call)]
    keywords = [word for call in calls if getattr(call.func, "id", "") == "Check" for word in call.keywords]
    return [getattr(word.value, "value", None) for word in keywords if word.arg == "points"]


def _check_markers(cell: NotebookNode) -> None:
    opened, kinds = None, set()
    for line in cell.source.split("\n"):
        marker = _MARKER.match(line)
        if not marker:
            if re.search(r"(BEGIN|END) +(SOLUTION|HIDDEN +TESTS)", line):
                raise ValueError(
                    f"{line.strip()!r} is not a marker: write ### BEGIN SOLUTION alone on its line"
                )
            continue
        _, side, kind = marker.groups()
        kinds.add(kind)
        if side == "BEGIN" and opened:
            raise ValueError(f"### BEGIN {kind} stands before ### END {opened}")
        if side == "END" and opened != kind:
            raise ValueError(f"### END {kind} has no ### BEGIN {kind} before it")
        opened = kind if side == "BEGIN" else None
    if opened:
        raise ValueError(f"### BEGIN {opened} has no ### END {opened} after it")
    if is_answer(cell) != ("SOLUTION" in kinds):
        raise ValueError("an answer cell, and no other, holds ### BEGIN SOLUTION")
    if "HIDDEN TESTS" in kinds and not is_check(cell):
        raise ValueError("### BEGIN HIDDEN TESTS stands outside a check cell")
    if is_answer(cell) or is_check(cell):
        _parse(unmark(cell.source))


def _parse(code: str) -> ast.Module:
    try:
        return ast.parse(code)
    except SyntaxError as error:
        raise ValueError(f"what a learner gets is not Python: {error.msg}, line {error.lineno}") from error


def _write(file: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as temporary:
            temporary.write(content)
        os.chmod(name, 0o644)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise
