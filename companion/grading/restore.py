"""From a submission to the notebook that is graded: the instructor's, with the learner's answers set in.

A submission is data here: nothing of it is run, and of its metadata only names are read, to find cells by.
Check cells, hidden tests, order, kernel and tags are the instructor's. Answers are found by `grade_id`, then
by cell id, then by what they define and where they stand, since editors lose metadata and people move, copy
and split cells. What learners added of their own is carried along. Every repair is a note for the instructor.
"""

import copy
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from companion.grading import release

LARGEST = 100_000_000  # bytes of a submission
LONGEST, LONGEST_IN_ALL = 1_000_000, 5_000_000  # characters of a cell, and of all that are read
MOST_CELLS, MOST_OWN = 2_000, 200  # cells that are read; of these, the learner's own that are carried along
MOST_NOTES = 50
NO_ANSWER = "# no answer was found in the submission"
_SEARCHED = 100_000  # characters of a cell that are looked at for names
_ALIKE = 0.7  # share of the words that two cells have in common, from where on one is the other, edited

_ASSIGNED = re.compile(r"^((?:\w++[ \t]*+,[ \t]*+)*+\w++)[ \t]*+(?::[^=\n]++)?=(?!=)", re.M)
_DEFINED = re.compile(r"^(?:async[ \t]++)?(?:def|class)[ \t]++(\w++)", re.M)
_IMPORTED = re.compile(r"^(?:from[ \t]++\S++[ \t]++)?import[ \t]++(\([^)]{0,2000}+\)|[^\n]++)", re.M)
_IMPORT = re.compile(r"(?:from\s+\S+\s+)?import\b")
_SAME_BLOCK = re.compile(r"[\s)\]}#]|(?:else|elif|except|finally)\b")  # how a line goes on with the one above


@dataclass(frozen=True)
class Restored:
    """What became of a submission.

    notebook: what is to be run and scored; None where there is nothing to grade.
    status: "ok", or "not submitted" for what cannot be read and what is not this exercise.
    notes: every repair, or why there is no notebook, in sentences that count the submission's cells from 1.
    """

    notebook: NotebookNode | None
    status: str
    notes: list[str]


def restore(submission: bytes, source: NotebookNode) -> Restored:
    """Set a learner's answers into the instructor's notebook. Raises nothing that is the submission's fault.

    submission: the file's content. source: the exercise, as `release.read` returns it.
    """
    try:
        cells, notes = _read(submission)
    except ValueError as error:
        return Restored(None, "not submitted", [f"The file cannot be graded: {error}."])
    found = _Finder(cells, source, notes)
    if not found.is_this_exercise:
        return Restored(None, "not submitted", ["This is a notebook, but not of this exercise."])
    notebook = found.notebook()
    if len(notes) > MOST_NOTES:
        notes[MOST_NOTES:] = [f"There are {len(notes) - MOST_NOTES} more notes of this kind."]
    return Restored(notebook, "ok", notes)


def is_work(found: Restored, source: NotebookNode) -> bool:
    """Whether any answer is there, and not as it was handed out."""
    if found.notebook is None:
        return False
    given = {
        question.grade_id: release.unmark(question.answer.source) for question in release.questions(source)
    }
    answers = {cell.id: cell.source for cell in found.notebook.cells if release.is_answer(cell)}
    return any(
        text != NO_ANSWER and _squeeze(text) != _squeeze(given[name]) for name, text in answers.items()
    )


def recognise(submission: bytes, sources: Mapping[str, NotebookNode]) -> str | None:
    """The name of the exercise that a submission is, by its content; None where it is none of them."""
    try:
        cells, _ = _read(submission)
    except ValueError:
        return None
    found = {name: _Finder(cells, source, []) for name, source in sources.items()}
    known = [name for name in found if found[name].is_this_exercise]
    return max(known, key=lambda name: found[name].share, default=None)


def reference(source: NotebookNode) -> NotebookNode:
    """The instructor's notebook with the solutions in, without stored outputs: the measure of answers.

    Cells tagged `live` are left out: they ask the model for the learner to read.
    """
    return _notebook(source, {}, {})


def _notebook(
    source: NotebookNode, answers: Mapping[int, str], own: Mapping[tuple[int, int], list[str]]
) -> NotebookNode:
    """`source` with these answers; own cells go above (0) or below (2) its cells, by the cells' indices."""
    cells: list[NotebookNode] = []
    taken = {meta["grade_id"] for cell in source.cells if (meta := cell.metadata.get("nbgrader"))}

    def free(name: str) -> str:
        while name in taken:
            name += "x"
        taken.add(name)
        return name

    def add(place: int, side: int) -> None:
        for text in own.get((place, side), []):
            cells.append(new_code_cell(text, id=free(f"own-{len(cells):02}")))

    for place, cell in enumerate(source.cells):
        add(place, 0)
        if "live" not in cell.metadata.get("tags", []):
            made = copy.deepcopy(cell)
            made.metadata.pop("companion", None)  # the wrong answers
            meta = made.metadata.get("nbgrader")
            made.id = meta["grade_id"] if meta else free(f"cell-{len(cells):02}")
            made.source = answers.get(place, made.source)
            if made.cell_type == "code":
                made.update(outputs=[], execution_count=None)
            cells.append(made)
        add(place, 2)
    add(len(source.cells), 0)
    names = [name for name in ("kernelspec", "language_info") if name in source.metadata]
    return new_notebook(cells=cells, metadata=copy.deepcopy({name: source.metadata[name] for name in names}))


# Reading


@dataclass(eq=False)
class _Cell:
    """A cell as submitted; `number` counts from 1, `name` is the grade_id that it claims."""

    number: int
    kind: str
    text: str
    name: str | None
    id: str
    live: bool
    place: int | None = None  # which of the source's cells it is
    words: Counter = field(default_factory=Counter)

    def __str__(self) -> str:
        return f"cell {self.number}"


@dataclass
class _Own:
    """Code of the learner's beside the answers; its place is above (0) or below (2) a cell of the source."""

    cell: _Cell
    text: str
    where: tuple[int, int]


def _read(submission: bytes) -> tuple[list[_Cell], list[str]]:
    """The cells of a notebook of format 2, 3 or 4, by what is needed of them, and notes.

    Not by nbformat: it refuses a whole notebook for one cell that is not as it should be, and checks outputs,
    which are most of a file. Raises ValueError with the reason where there are no cells.
    """
    notes: list[str] = []
    data = _parse(submission, notes)
    sheets = data.get("worksheets")
    if isinstance(data.get("cells"), list):
        found = data["cells"]
    elif isinstance(sheets, list):
        notes.append("The notebook is of an old format, and was converted.")
        parts = [sheet.get("cells") for sheet in sheets if isinstance(sheet, dict)]
        found = [cell for part in parts if isinstance(part, list) for cell in part]
    else:
        raise ValueError("it has no cells, so it is not a notebook")
    if len(found) > MOST_CELLS:
        notes.append(
            f"The notebook has {len(found)} cells; those after the first {MOST_CELLS} were left out."
        )
    cells = [_cell(number, raw, notes) for number, raw in enumerate(found[:MOST_CELLS], 1)]
    if sum(len(cell.text) for cell in cells) > LONGEST_IN_ALL:
        read = 0
        for cell in cells:
            read += len(cell.text)
            cell.text = cell.text if read <= LONGEST_IN_ALL else ""
        notes.append(f"The cells hold {read:,} characters; those after {LONGEST_IN_ALL:,} were left out.")
    if any("\r" in cell.text for cell in cells):
        notes.append("Line ends of Windows were converted.")
    for cell in cells:
        cell.text = re.sub(r"\r\n?", "\n", cell.text).removeprefix("\ufeff")
        cell.words = _words(cell.text)
    return cells, notes


def _parse(submission: bytes, notes: list[str]) -> dict[str, Any]:
    start = submission[:1000].lstrip(b"\xef\xbb\xbf \t\r\n")
    if len(submission) > LARGEST:
        raise ValueError(f"it has more than {LARGEST:,} bytes; have its outputs cleared")
    if not start:
        raise ValueError("it is empty")
    if start.startswith(b"<"):
        raise ValueError("it is a web page or XML and not a notebook; ask for the .ipynb file itself")
    try:
        try:
            data = json.loads(submission)
        except UnicodeDecodeError:
            data = json.loads(submission.decode("cp1252", "replace"))
            notes.append("The file was not UTF-8, and was read as Windows-1252.")
        if submission.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
            notes.append("A byte-order mark was skipped.")
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"it is not JSON, so not a whole notebook ({error.msg}, {place})") from None
    except ValueError:  # such as a number of too many digits
        raise ValueError("its JSON cannot be read") from None
    if not isinstance(data, dict):
        raise ValueError("it is JSON, but not a notebook")
    return data


def _cell(number: int, raw: Any, notes: list[str]) -> _Cell:
    def of(value: Any, kind: type) -> Any:
        return value if isinstance(value, kind) else kind()

    raw = of(raw, dict)
    text = raw.get("source", raw.get("input", ""))
    text = "".join(of(part, str) for part in text) if isinstance(text, list) else of(text, str)
    if len(text) > LONGEST:
        notes.append(f"Cell {number} has {len(text):,} characters, more than {LONGEST:,}, and was left out.")
        text = ""
    clean = re.sub("[\0\ud800-\udfff]", "\ufffd", text)  # cannot be written to a file, or run
    if clean != text:
        notes.append(f"Cell {number} holds characters that no text has; they were replaced.")
    meta = of(raw.get("metadata"), dict)
    tags = of(meta.get("tags"), list)
    name = of(of(meta.get("nbgrader"), dict).get("grade_id"), str)
    return _Cell(
        number, of(raw.get("cell_type"), str), clean, name or None, of(raw.get("id"), str), "live" in tags
    )


# Text


def _squeeze(text: str) -> str:
    """What is left of a text when only letters and digits count, so that a formatter's changes do not."""
    lines = (line for line in text.split("\n") if not line.lstrip().startswith("#"))
    return re.sub(r"\W+", "", "\n".join(lines)) if len(text) < _SEARCHED else text


def _words(text: str) -> Counter:
    return Counter(re.findall(r"\w+", text[:20_000]))


def _likeness(one: Counter, other: Counter) -> float:
    """The share of words in common, from 0 to 1."""
    return 2 * (one & other).total() / max(1, one.total() + other.total())


def _defines(text: str) -> set[str]:
    """The functions and classes that code defines at its top level, by a look at how its lines begin.

    It is a stranger's text, so it is not given to Python's parser, which deep nesting can bring down.
    """
    return set(_DEFINED.findall(text[:_SEARCHED]))


def _assigns(text: str) -> set[str]:
    return {name for names in _ASSIGNED.findall(text[:_SEARCHED]) for name in re.findall(r"\w+", names)}


def _binds(text: str) -> set[str]:
    """All names that code gives a value at its top level."""
    imported = {name for names in _IMPORTED.findall(text[:_SEARCHED]) for name in re.findall(r"\w+", names)}
    return _defines(text) | _assigns(text) | imported


def _is_unfinished(text: str) -> bool:
    """Whether a function still only raises what its placeholder raises."""
    return "raise NotImplementedError" in text and not re.search(r"^[ \t]++(return|yield)\b", text, re.M)


def _goes_on(text: str, more: str) -> bool:
    """Whether `more` begins in the middle of the function that `text` ends with."""
    first = next((line for line in more.split("\n") if line.strip()), "")
    above = [line for line in text.split("\n") if line.strip()]
    if not above or first == first.lstrip():
        return False
    indents = {line[: len(line) - len(line.lstrip())] for line in above}
    return first[: len(first) - len(first.lstrip())] in indents or above[-1].rstrip().endswith(":")


def _blocks(text: str) -> list[str]:
    """Code, cut before each line that begins a statement at the top level."""
    blocks: list[list[str]] = []
    for line in text.split("\n"):
        decorated = blocks and blocks[-1][-1].startswith("@")
        if not blocks or not (not line or decorated or _SAME_BLOCK.match(line)):
            blocks.append([])
        blocks[-1].append(line)
    return ["\n".join(block).rstrip() for block in blocks]


def _added(text: str, given: str) -> str:
    """What a learner added to a cell that was not theirs to edit: imports, and what defines new names."""
    names, known = _binds(given), {line.strip() for line in given.split("\n")}
    lines = [line.strip() for line in text.split("\n")]
    kept = [line for line in lines if _IMPORT.match(line) and "(" not in line and line not in known]
    for block in _blocks(text):
        if _IMPORT.match(block):
            new = "(" in block and block not in given
        else:
            new = (bound := _binds(block)) and not bound & names
        kept += [block] if new else []
    return "\n".join(kept)


def _without_nbval(text: str) -> str:
    """Code without the comments by which nbval is told to skip a cell or its outputs."""
    lines = text.splitlines(keepends=True)  # cut where nbval cuts, which is at more than newlines
    marker = re.compile(r"NBVAL_|PYTEST_VALIDATE_")
    small = (marker.sub(lambda found: found[0].lower(), line) for line in lines)
    pairs = zip(lines, small, strict=True)
    return "".join(new if line.strip().startswith("#") else line for line, new in pairs)


# Finding


class _Finder:
    """Which cell of a submission is which of the exercise's.

    Places are indices into the source's cells. `given` holds those that learners get, as they get them.
    """

    def __init__(self, cells: list[_Cell], source: NotebookNode, notes: list[str]) -> None:
        self.cells, self.source, self.notes = cells, source, notes
        handed = iter(release.strip(source).cells)
        self.given = {
            place: next(handed)
            for place, cell in enumerate(source.cells)
            if "instructor" not in cell.metadata.get("tags", [])
        }
        metas = ((place, cell.metadata.get("nbgrader")) for place, cell in self.given.items())
        self.names = {meta["grade_id"]: place for place, meta in metas if meta}
        self.questions = {self.names[question.grade_id]: question for question in release.questions(source)}
        self.targets = {place: self._targets(place) for place in self.questions}
        self.answers: dict[int, str] = {}
        self.own: list[_Own] = []
        self._recognise_cells()
        self.share = len({cell.place for cell in cells} - {None}) / len(self.given)
        self._join_what_was_split_in_mid_function()
        self.sure = 0  # questions whose answer was found by more than its place
        for place in self.questions:
            self._find_answer(place)

    @property
    def is_this_exercise(self) -> bool:
        claimed = {cell.name for cell in self.cells} - {None}
        known = claimed & set(self.names)
        if len(claimed - known) > len(known):
            return False  # another exercise of the course: cells that exercises share are not enough
        if self.sure:
            return bool(known) or self.share >= 0.25 or self.sure >= len(self.questions) / 2
        return self.share >= 0.5

    def _targets(self, place: int) -> set[str]:
        """The names that an answer is there to define."""
        return _defines(self.given[place].source) or _assigns(self.source.cells[place].source)

    def _is_live(self, place: int) -> bool:
        return "live" in self.source.cells[place].metadata.get("tags", [])

    def _recognise_cells(self) -> None:
        """Give each cell that is one of the exercise's its place: by name, text, id, and likeness."""
        texts: dict[str, list[int]] = {}
        ids = {}
        for place, cell in self.given.items():
            texts.setdefault(_squeeze(cell.source), []).append(place)
            if "nbgrader" in cell.metadata:  # other ids only count cells, as those of other exercises do
                ids[cell.id] = place
        texts.pop("", None)
        taken: Counter = Counter()
        for cell in self.cells:
            cell.place = self.names.get(cell.name)
            if cell.place is None and (same := texts.get(_squeeze(cell.text))):
                cell.place = min(same, key=lambda place: taken[place])
            elif cell.place is None and cell.name is None:
                cell.place = ids.get(cell.id)
            taken[cell.place] += 1
        left = {
            place: _words(cell.source)
            for place, cell in self.given.items()
            if place not in self.questions and not taken[place]
        }
        answers = set().union(*self.targets.values())
        for cell in self.cells:
            if cell.place is None and cell.kind == "code" and left:
                place = max(left, key=lambda place: _likeness(cell.words, left[place]))
                new = _defines(cell.text) - _defines(self.given[place].source) or _binds(cell.text) & answers
                if (cell.live and self._is_live(place)) or (
                    not new and _likeness(cell.words, left[place]) >= _ALIKE
                ):
                    cell.place = place

    def _join_what_was_split_in_mid_function(self) -> None:
        backwards = self.cells[::-1]
        for one, other in zip(backwards[1:], backwards, strict=False):
            mine = one.place in self.questions or any(_defines(one.text) & t for t in self.targets.values())
            joins = other.kind == "code" and other.place in (None, one.place)
            if mine and joins and _goes_on(one.text, other.text):
                self._say(f"{other} goes on with the function of {one}; the two were joined")
                one.text += f"\n{other.text}"
                self.cells.remove(other)

    # Answers

    def _is_work(self, cell: _Cell, place: int) -> bool:
        """Whether a cell is more than the released one."""
        return _squeeze(cell.text) not in ("", _squeeze(self.given[place].source))

    def _find_answer(self, place: int) -> None:
        """Find a question's answer, say how, and decide about its copies and parts."""
        question, targets = f"question {self.questions[place].grade_id}", self.targets[place]
        named = [cell for cell in self.cells if cell.place == place]
        work = [cell for cell in named if self._is_work(cell, place)]
        right = [cell for cell in work if not targets or _binds(cell.text) & targets]
        defining = [] if right else self._defining(place)
        self.sure += bool(named or defining)
        if right:
            counted = min(right, key=lambda cell: _is_unfinished(cell.text))
            if counted.name is None:
                self._say(f"{question}: {counted} was found by its id, since its metadata are lost")
        elif defining:
            counted = defining[0]
            self._say(f"{question}: {counted} was taken, since it defines {', '.join(sorted(targets))}")
            if not any(cell.name for cell in named):  # metadata are lost: its copies are nameless as well
                around = self._around(place)
                work += [cell for cell in defining if cell in around and _defines(cell.text) & targets]
        elif named:
            counted = (work or named)[0]
        elif around := self._around(place):
            words = _words(self.given[place].source)
            counted = max(around, key=lambda cell: _likeness(cell.words, words))
            self._say(f"{question}: {counted} was taken, since it stands where the answer should")
        else:
            self._say(f"{question}: no answer was found")
            self.answers[place] = NO_ANSWER
            return
        self._count(counted, place)
        for cell in work:
            if cell is not counted:
                cell.place = place
                if _squeeze(cell.text) == _squeeze(counted.text) or self._is_copy(cell, counted, place):
                    self._say(f"{question}: {counted} counted, and {cell}, its copy, did not")
                else:
                    side = 0 if cell.number < counted.number else 2
                    self.own.append(_Own(cell, cell.text, (place, side)))
                    self._say(f"{question}: {cell} was taken as a part of the answer in {counted}")
        for cell in named:
            if cell is not counted and cell not in work:
                self._say(f"{question}: {counted} counted, and not {cell}, which is as it was handed out")

    def _is_copy(self, cell: _Cell, counted: _Cell, place: int) -> bool:
        both = _binds(cell.text) & _binds(counted.text)
        return bool(both & self.targets[place] if self.targets[place] else both)

    def _count(self, cell: _Cell, place: int) -> None:
        text = cell.text
        if cell.place is None:
            cell.place = place
        elif cell.place not in self.questions:  # written into a cell that was not for answers
            text = _added(text, self.given[cell.place].source)
        if cell.kind != "code":
            self._say(f"question {self.questions[place].grade_id}: {cell} was turned back into code")
        self.answers[place] = text if text.strip() else NO_ANSWER

    def _defining(self, place: int) -> list[_Cell]:
        """Cells that define what an answer should, the likeliest first, and then in order."""
        targets, around, found = self.targets[place], self._around(place), []
        for cell in self.cells:
            if cell.place == place or "```" in cell.text or not _binds(cell.text) & targets:
                continue
            text, defines = cell.text, _defines(cell.text) & targets
            if cell.place in self.questions:  # two answers in one cell
                rank = 1 if defines and self._is_work(cell, cell.place) else None
            elif cell.place is not None:
                text = _added(text, self.given[cell.place].source)
                rank = 2 if _binds(text) & targets else None
            else:
                rank = 0 if cell.kind == "code" else 3
            if rank is not None:
                found.append((rank, not defines, cell not in around, cell.number, cell))
        return [cell for *_, cell in sorted(found, key=lambda item: item[:-1])]

    def _around(self, place: int) -> list[_Cell]:
        """The learner's own code cells between the known cells next to where an answer should stand."""
        places: dict[int, int] = {}
        for index, cell in enumerate(self.cells):
            if cell.place is not None:
                places.setdefault(cell.place, index)
        low = max((known for known in places if known < place), default=None)
        high = min((known for known in places if known > place), default=None)
        if low is None and high is None:
            return []
        between = self.cells[0 if low is None else places[low] + 1 : None if high is None else places[high]]
        return [cell for cell in between if cell.place is None and cell.kind == "code" and cell.text.strip()]

    # The notebook

    def notebook(self) -> NotebookNode:
        """The restored notebook."""
        self._note_what_was_changed()
        self._carry_along()
        self._move_up()
        own: dict[tuple[int, int], list[str]] = {}
        for item in sorted(self.own, key=lambda item: item.cell.number):
            own.setdefault(item.where, []).append(item.text)
        texts = [*self.answers.values(), *(text for texts in own.values() for text in texts)]
        if any(_without_nbval(text) != text for text in texts):
            self._say("comments for nbval were taken out of the learner's code")
        return _notebook(
            self.source,
            {place: _without_nbval(text) for place, text in self.answers.items()},
            {where: list(map(_without_nbval, texts)) for where, texts in own.items()},
        )

    def _note_what_was_changed(self) -> None:
        for name, place in self.names.items():
            if place in self.questions:
                continue
            what = f"{'check cell' if release.is_check(self.given[place]) else 'cell'} {name}"
            found = [cell for cell in self.cells if cell.place == place]
            for cell in found:
                if "".join(cell.text.split()) != "".join(self.given[place].source.split()):
                    self._say(f"{cell}: {what} was changed, and the instructor's was used")
            if not found:
                self._say(f"the {what} is missing, and the instructor's was used")

    def _carry_along(self) -> None:
        """Give the learner's own cells their places: under the answer they follow, or above what follows."""
        following = [(len(self.source.cells), 0)]
        for cell in self.cells[::-1]:
            following.append(following[-1] if cell.place is None else (cell.place, 0))
        above, carried = None, 0
        for cell, below in zip(self.cells, following[-2::-1], strict=True):
            if cell.place is not None:
                above = cell.place
                self._carry_additions(cell)
            elif cell.kind == "code" and cell.text.strip():
                carried += 1
                if carried <= MOST_OWN:
                    where = (above, 2) if above in self.questions else below
                    self.own.append(_Own(cell, cell.text, where))
                    claim = f", which claims to be {cell.name[:80]!r}," if cell.name else ""
                    self._say(f"{cell}{claim} is the learner's own, and was carried along")
        if carried > MOST_OWN:
            self._say(f"of {carried} own cells, those after the first {MOST_OWN} were left out")

    def _carry_additions(self, cell: _Cell) -> None:
        given = self.given[cell.place]
        if cell.place in self.questions or cell.kind != "code" or given.cell_type != "code":
            return
        if (added := _added(cell.text, given.source)) and added not in self.answers.values():
            self.own.append(_Own(cell, added, (cell.place, 0 if release.is_check(given) else 2)))
            self._say(f"{cell}: what was added to it was carried along in a cell of its own")

    def _move_up(self) -> None:
        """Move the learner's own cells up that define what an answer above them needs.

        In the learner's kernel they had been run; in the restored notebook they would come too late.
        """
        fixed = set().union(*self.targets.values(), *(_binds(cell.source) for cell in self.given.values()))
        for place, question in self.questions.items():
            check = (self.names[question.checks[0].metadata.nbgrader.grade_id], 0)
            needed = set(_words(self.answers[place]))
            known = fixed.union(*(_binds(item.text) for item in self.own if item.where <= check))
            late = [item for item in self.own if item.where > check and not _binds(item.text) & fixed]
            while found := [item for item in late if _binds(item.text) & (needed - known)]:
                item = found[0]
                item.where = (place, 0)
                late.remove(item)
                known |= _binds(item.text)
                needed |= set(_words(item.text))
                self._say(f"{item.cell} was moved up, since question {question.grade_id} needs it")

    def _say(self, note: str) -> None:
        self.notes.append(note[0].upper() + note[1:] + ".")
