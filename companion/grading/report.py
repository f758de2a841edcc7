"""A grading as files: the gradebook, every check, columns for Canvas and Moodle, feedback pages, an overview.

The same grading gives the same bytes: no time is written, and all is sorted. Pages stand alone, without
scripts; whatever learners wrote is escaped. Of hidden tests learners are told only whether they passed.

https://community.canvaslms.com/t5/Instructor-Guide/How-do-I-import-grades-in-the-Gradebook/ta-p/807
https://docs.moodle.org/en/Grade_import, https://docs.moodle.org/en/Offline_grading_worksheet
"""

import base64
import csv
import glob
import html
import io
import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote
from zipfile import ZipFile, ZipInfo

from companion.grading.collect import csv_cell, moodle_folder, safe_name
from companion.grading.score import SAID, Book, Learner, Scored, Value, Work

LONGEST_CODE = 20_000  # characters of an answer in a feedback page
_STYLE = """
:root { color-scheme: light dark }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 1rem auto; padding: 0 1rem }
h2 { border-top: 1px solid #8888; padding-top: 1rem }
pre { overflow-x: auto; background: #8881; padding: .6rem .8rem; border-radius: .3rem }
ul { list-style: none; padding-left: 0 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; margin: .2rem 0 .8rem 1.4rem }
dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; font-family: ui-monospace, monospace }
table { display: block; overflow-x: auto }
td, th { text-align: left; vertical-align: top; padding: .15rem 1rem .15rem 0 }
td:first-child, td:last-child { overflow-wrap: anywhere; min-width: 9rem }
img { max-width: 100%; background: white; border-radius: .3rem }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_ONLY_HIDDEN = "they are of the same kind, so look in the task for a case that your code does not cover"
_HIDDEN = {True: "✓ passed", False: "✗ not passed"}


def write(folder: Path, book: Book) -> list[Path]:
    """Write all files into a folder, each whole or not at all, and the gradebook last.

    Feedback pages of learners who are no longer in the book are removed.

    Returns the paths of what was written, without the feedback pages.
    """
    pages = {folder / "feedback" / page_of(work): work for work in book.works if work.file or work.notes}
    for page, work in pages.items():
        page.parent.mkdir(parents=True, exist_ok=True)
        _write(page, feedback(work, book))
    for name in book.measures:
        for page in (folder / "feedback").glob(f"*/{glob.escape(name)}.html"):
            if page not in pages:
                page.unlink()
                if not any(page.parent.iterdir()):
                    page.parent.rmdir()
    files = {"overview.html": overview(book), "checks.json": checks(book), "canvas.csv": canvas(book)}
    files |= {"moodle.csv": moodle(book)}
    if any(learner.lms_id for learner in book.learners):
        files |= {f"moodle-{name}.csv": worksheet(book, name) for name in book.measures}
        for name in book.measures:
            if content := feedback_files(book, name):
                _write(folder / f"moodle-feedback-{name}.zip", content)
    files["gradebook.csv"] = "\ufeff" + gradebook(book)
    for name, text in files.items():
        _write(folder / name, text)
    return [folder / name for name in files]


def page_of(work: Work) -> str:
    """Where a work's feedback page lies in the folder of feedback."""
    return f"{safe_name(work.learner)}/{work.exercise}.html"


# Tables


def gradebook(book: Book) -> str:
    """A row a learner: points, of how many, a column for each exercise, status, notes.

    Status: "ok", "not submitted", "partly submitted", or "not graded", which asks for another run.
    """
    rows = [["learner", "points", "of", *book.measures, "status", "notes"]]
    for learner in book.learners:
        works = book.works_of(learner.name)
        notes = list(learner.notes)
        for work in works:
            prefix = f"{work.exercise}: " if len(works) > 1 else ""
            notes += [f"{prefix}{note}" for note in [*work.notes, *_run_notes(work)]]
        points = [number(work.points) for work in works]
        total = number(sum(work.points for work in works))
        rows.append([learner.name, total, number(book.points), *points, status_of(works), " ".join(notes)])
    return _csv(rows)


def status_of(works: Iterable[Work]) -> str:
    """A learner's status, of those of their works."""
    found = {work.status for work in works}
    if "not graded" in found:
        return "not graded"
    return "partly submitted" if len(found) > 1 else next(iter(found), "not submitted")


def canvas(book: Book) -> str:
    """The columns of Canvas' gradebook import. A cell is empty where nothing was graded.

    Canvas finds a learner by ID, which the names of downloaded submissions hold, or else by SIS Login ID.
    """
    rows = [["Student", "ID", "SIS User ID", "SIS Login ID", "Section", *book.measures]]
    possible = [number(measure.points) for measure in book.measures.values()]
    rows.append(["    Points Possible", "", "", "", "", *possible])
    for learner in book.learners:
        name = _name(learner).replace("Points Possible", "Points possible")  # no row like the one above
        login = "" if learner.lms_id else learner.name
        rows.append([name, learner.lms_id, "", login, "", *_lms_points(book, learner)])
    return _csv(rows)


def moodle(book: Book) -> str:
    """A table for Moodle's grade import: Username is to be mapped to what the learners are called by."""
    rows = [["Username", "Full name", *book.measures]]
    for learner in book.learners:
        login = "" if learner.lms_id else learner.name
        rows.append([login, _name(learner), *_lms_points(book, learner)])
    return _csv(rows)


def worksheet(book: Book, exercise: str) -> str:
    """An exercise as Moodle's offline grading worksheet, for learners whose number in Moodle is known."""
    rows = [["Identifier", "Full name", "Grade", "Maximum grade", "Last modified (grade)"]]
    most = number(book.measures[exercise].points)
    for learner in book.learners:
        for work in book.works_of(learner.name):
            if learner.lms_id and work.exercise == exercise and work.status == "ok":
                rows.append([f"Participant {learner.lms_id}", _name(learner), number(work.points), most, ""])
    return _csv(rows)


def feedback_files(book: Book, exercise: str) -> bytes | None:
    """The feedback pages of an exercise as the archive that Moodle takes; None where no name is Moodle's."""
    file, names = io.BytesIO(), set()
    with ZipFile(file, "w") as archive:
        for work in book.works:
            if work.exercise == exercise and (place := moodle_folder(work.file)) and place not in names:
                names.add(place)
                info = ZipInfo(f"{place}/{exercise}.html")  # of 1980, so that the bytes stay the same
                info.external_attr = 0o644 << 16
                archive.writestr(info, feedback(work, book).encode("utf-8", "backslashreplace"))
    return file.getvalue() if names else None


def checks(book: Book) -> str:
    """Everything as JSON: each work with each check and each value that learners see."""
    exercises = {
        name: {
            "points": measure.points,
            "checks": [
                {"check": check, "points": cell.metadata.nbgrader.points, "hidden": measure.has_hidden(check)}
                for check, cell in measure.checks.items()
            ],
        }
        for name, measure in book.measures.items()
    }
    ids = {learner.name: learner.lms_id for learner in book.learners}
    works = [
        {
            "learner": work.learner,
            "lms_id": ids[work.learner],
            "exercise": work.exercise,
            "status": work.status,
            "seed": work.seed,
            "points": work.points,
            "file": work.file,
            "feedback": f"feedback/{page_of(work)}" if work.file or work.notes else "",
            "notes": list(work.notes),
            "checks": [
                vars(check) | {"values": [vars(value) for value in check.values]} for check in work.checks
            ],
        }
        for work in book.works
    ]
    found = {"format": 2, "sandbox": book.sandbox, "exercises": exercises, "works": works}
    return json.dumps(found, indent=1) + "\n"


def number(points: float) -> str:
    """Points as a text: 2, 0.5, 1.3333."""
    return f"{round(points, 4):.10g}"


def _lms_points(book: Book, learner: Learner) -> list[str]:
    works = book.works_of(learner.name)
    return [number(work.points) if work.status == "ok" else "" for work in works]


def _name(learner: Learner) -> str:
    return learner.name.removesuffix(f" ({learner.lms_id})")


def _run_notes(work: Work) -> list[str]:
    """How cells ended that did not end by themselves; that others raised is told by the points."""
    ended = work.troubles | {check.check: check.note for check in work.checks if check.status != "ok"}
    return [f"{name}: {note}" for name, note in ended.items() if not note.startswith(SAID["error"])]


def _csv(rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerows([csv_cell(cell) for cell in row] for row in rows)
    return text.getvalue()


# Feedback


def feedback(work: Work, book: Book) -> str:
    """A learner's page for an exercise: their code, what was expected, what came, the hint."""
    measure = book.measures[work.exercise]
    parts = [f"<p>{_escaped(work.learner)}</p>"]
    parts.append(f"<p><strong>{number(work.points)} of {number(measure.points)} points</strong></p>")
    if work.status != "ok":
        parts.append(f"<p>This counts as {work.status}.</p>")
    parts.append(_list([_escaped(note) for note in work.notes]))
    if work.status == "ok":
        scored = {check.check: check for check in work.checks}
        for question in measure.questions:
            found = [scored[cell.metadata.nbgrader.grade_id] for cell in question.checks]
            parts += _question(question.grade_id, work, found)
    return _page(work.exercise, "\n".join(part for part in parts if part))


def _question(name: str, work: Work, found: list[Scored]) -> Iterator[str]:
    earned = f"{number(sum(c.earned for c in found))} of {number(sum(c.points for c in found))} points"
    yield f"<h2>{_escaped(name)}: {earned}</h2>"
    code = work.answers.get(name, "")
    cut = f"\n… ({len(code):,} characters in all)" if len(code) > LONGEST_CODE else ""
    yield f"<pre><code>{_escaped(code[:LONGEST_CODE] + cut)}</code></pre>"
    if name in work.troubles:
        yield f"<p>Your code: {_escaped(work.troubles[name])}</p>"
    for check in found:
        if len(found) > 1:
            points = f"{number(check.earned)} of {number(check.points)} points"
            yield f"<h3>{_escaped(check.check)}: {points}</h3>"
        items = [_value(value) for value in check.values]
        if check.hidden is not None:
            items.append(f"<strong>{_HIDDEN[check.hidden]}</strong>: inputs that are not shown")
            if not check.hidden and all(value.passed for value in check.values):
                items[-1] += f"; {_ONLY_HIDDEN}"
        yield _list(items)
        if check.note:
            yield f"<p>The check: {_escaped(check.note)}</p>"


def _value(value: Value) -> str:
    head = f"<strong>{'✓ passed' if value.passed else '✗ not yet'}</strong>: {_escaped(value.what)}"
    if value.passed:
        return head
    more = {"expected": value.expected, "came": value.came, "difference": value.difference}
    more |= {"look at": value.look}
    lines = (f"<dt>{name}</dt><dd>{_escaped(text)}</dd>" for name, text in more.items() if text)
    return f"{head}<dl>{''.join(lines)}</dl>"


# Overview


def overview(book: Book) -> str:
    """The class at a glance: which checks fail, how points spread, who needs a look."""
    totals = [sum(work.points for work in book.works_of(learner.name)) for learner in book.learners]
    mean, middle = statistics.fmean(totals), statistics.median(totals)
    parts = [
        f"<p>{len(totals)} learners; of {number(book.points)} points they earned {mean:.2f} in the mean, and "
        f"{middle:.2f} in the middle (median).</p>"
    ]
    if not book.sandbox:
        parts.append("<p><strong>Graded without a sandbox</strong>: submissions could do anything here.</p>")
    if book.weak:
        parts.append(
            "<p><strong>Weaker checks</strong>: these have no hidden tests, so that answers can be faked "
            f"or hard-coded: {_escaped(', '.join(book.weak))}.</p>"
        )
    parts += ["<h2>How points spread</h2>", _spread(book, totals), "<h2>Which checks fail</h2>"]
    table = _shares(book)
    parts.append(_bars(table))
    rows = [
        [_escaped(exercise), _escaped(check), f"{earned} of {count}", "yes" if hidden else "no"]
        for exercise, check, earned, count, hidden in table
    ]
    parts.append(_table(["exercise", "check", "earned by", "hidden tests"], rows))
    parts += [
        "<h2>Learners</h2>",
        _table(["learner", "points", *map(_escaped, book.measures), "notes"], _rows(book)),
    ]
    return _page("Overview", "\n".join(parts))


def _shares(book: Book) -> list[tuple[str, str, int, int, bool]]:
    """For each check how many earned its points, of how many works that were graded."""
    found = []
    for name, measure in book.measures.items():
        graded = [work for work in book.works if work.exercise == name and work.status == "ok"]
        for check in measure.checks:
            earned = sum(one.earned > 0 for work in graded for one in work.checks if one.check == check)
            found.append((name, check, earned, len(graded), measure.has_hidden(check)))
    return found


def _rows(book: Book) -> list[list[str]]:
    rows = []
    for learner in book.learners:
        works, cells = book.works_of(learner.name), []
        for work in works:
            text = number(work.points) if work.status == "ok" else work.status
            page = f"feedback/{quote(page_of(work))}"
            cells.append(f'<a href="{page}">{text}</a>' if work.file or work.notes else text)
        notes = [*learner.notes, *(n for work in works for n in [*work.notes, *_run_notes(work)])]
        total = number(sum(work.points for work in works))
        rows.append([_escaped(learner.name), total, *cells, _escaped(" ".join(notes))])
    return rows


def _spread(book: Book, totals: list[float]) -> str:
    most = max(1.0, float(book.points))
    bins = min(20, math.ceil(most))

    def draw(figure: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        ax = figure.add_subplot()
        ax.hist(totals, bins=bins, range=(0, most), edgecolor="white")
        ax.set(xlabel="points", ylabel="learners", xlim=(0, most))
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))

    return _figure(draw, 3.0, "Histogram of the learners' points; the table of learners has the numbers.")


def _bars(table: list[tuple[str, str, int, int, bool]]) -> str:
    names = [f"{exercise}: {check}" for exercise, check, *_ in table]
    missed = [100 * (count - earned) / count if count else 0 for _, _, earned, count, _ in table]

    def draw(figure: Any) -> None:
        ax = figure.add_subplot()
        ax.barh(range(len(names)), missed, color="C1")
        ax.set_yticks(range(len(names)), names)
        ax.set(xlabel="% of the graded works that did not earn it", xlim=(0, 100))
        ax.set_ylim(len(names) - 0.4, -0.6)

    return _figure(draw, 0.9 + 0.28 * len(names), "Bars of how often each check fails; the numbers follow.")


def _figure(draw: Any, height: float, what: str) -> str:
    """A figure as an image in the page: the same bytes for the same data."""
    import matplotlib.style
    from matplotlib.figure import Figure

    file = io.BytesIO()
    with matplotlib.style.context("companion.style"):
        figure = Figure(figsize=(7.2, height), layout="constrained")
        draw(figure)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{html.escape(what)}" src="data:image/svg+xml;base64,{data}">'


# Pages


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_escaped(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{_escaped(title)}</h1>\n{body}\n</body></html>\n"
    )


def _list(items: list[str]) -> str:
    return "<ul>" + "\n".join(f"<li>{item}</li>" for item in items) + "</ul>" if items else ""


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["".join(f"<th>{cell}</th>" for cell in head)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return "<table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _escaped(text: str) -> str:
    """As HTML, with what cannot be seen, and what turns the direction of text, as its code."""
    shown = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    return html.escape("".join(shown))


def _write(file: Path, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        if isinstance(content, str):
            content = content.encode("utf-8", "backslashreplace")
        part.write_bytes(content)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
