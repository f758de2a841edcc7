"""The files of a grading: what instructors, learning platforms and learners read."""

import csv
import io
import json
from dataclasses import replace
from zipfile import ZipFile

import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from companion.checks import MIME
from companion.grading import report
from companion.grading.score import Book, Learner, Measure, Scored, Value, Work

FLAGS = {"grade": False, "solution": False, "locked": True, "task": False, "schema_version": 3}
EVIL = "<script>alert(1)</script>"


def measure(points):
    def cell(name, source, **flags):
        return new_code_cell(source, id=name, metadata={"nbgrader": FLAGS | flags | {"grade_id": name}})

    solution = "def f():\n    ### BEGIN SOLUTION\n    return 1\n    ### END SOLUTION"
    cells = [
        cell("f", solution, solution=True, locked=False),
        cell("check", "pass", grade=True, points=points),
    ]
    values = [{"what": "f()", "value": 1, "tolerance": 0.0}, {"what": "drawn", "value": 2, "tolerance": 0.0}]
    cells[1].outputs = [new_output("display_data", data={MIME: {"values": values}})]
    return Measure(new_notebook(cells=cells), {"check": {0: "the hint"}})


def checked(points, earned, *, came="1", hidden=True, status="ok", note=""):
    value = Value("f()", earned > 0, "1", came, "" if earned else "differs", "the hint")
    return Scored("check", "f", points, earned, status, (value,), hidden, note)


@pytest.fixture
def book():
    works = [
        Work(
            EVIL, "a", "ok", "x/a.ipynb", (), (checked(2, 0, came=EVIL, hidden=False),), {"f": EVIL}, seed=5
        ),
        Work(EVIL, "b", "not submitted"),
        Work("=1+1", "a", "ok", "y/a.ipynb", ("Cell 3 was moved.",), (checked(2, 2),), {"f": "return 1"}),
        Work("=1+1", "b", "ok", "y/b.ipynb", (), (checked(0.5, 0.5),), {"f": "return 1"}, seed=3),
        Work("Ö (77)", "a", "ok", "z/a", (), (checked(2, 0, status="timeout", note="No end."),), {}),
        Work("Ö (77)", "b", "not graded", "z/b.ipynb", ("Again.",)),
    ]
    learners = (Learner(EVIL), Learner("=1+1"), Learner("Ö (77)", "77", ("x.ipynb is nothing.",)))
    return Book(True, {"a": measure(2), "b": measure(0.5)}, learners, tuple(works))


def content(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def rows(text):
    return list(csv.reader(io.StringIO(text)))


def test_the_gradebook_has_a_row_a_learner(book):
    assert rows(report.gradebook(book)) == [
        ["learner", "points", "of", "a", "b", "status", "notes"],
        [EVIL, "0", "2.5", "0", "0", "partly submitted", ""],
        ["'=1+1", "2.5", "2.5", "2", "0.5", "ok", "a: Cell 3 was moved."],
        ["Ö (77)", "0", "2.5", "0", "0", "not graded", "x.ipynb is nothing. a: check: No end. b: Again."],
    ]


def test_canvas_gets_its_columns_and_no_grade_where_nothing_was_graded(book):
    assert rows(report.canvas(book)) == [
        ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", "a", "b"],
        ["    Points Possible", "", "", "", "", "2", "0.5"],
        [EVIL, "", "", EVIL, "", "0", ""],
        ["'=1+1", "", "", "'=1+1", "", "2", "0.5"],
        ["Ö", "77", "", "", "", "0", ""],
    ]


def test_no_learners_name_changes_the_points_possible_in_canvas(book):
    name = "Points Possible"
    found = Book(True, {"a": measure(2)}, (Learner(name),), (Work(name, "a", "not submitted"),))
    assert [row[0] for row in rows(report.canvas(found)) if name in row[0]] == ["    Points Possible"]


def test_moodle_gets_a_table_for_all_and_a_worksheet_for_each_exercise(book):
    assert rows(report.moodle(book))[1:] == [
        [EVIL, EVIL, "0", ""],
        ["'=1+1", "'=1+1", "2", "0.5"],
        ["", "Ö", "0", ""],
    ]
    assert rows(report.worksheet(book, "a")) == [
        ["Identifier", "Full name", "Grade", "Maximum grade", "Last modified (grade)"],
        ["Participant 77", "Ö", "0", "2", ""],
    ]


def test_moodle_gets_the_feedback_pages_in_folders_that_it_knows_learners_by(book, tmp_path):
    assert report.feedback_files(book, "a") is None
    work = replace(book.works[4], file="Ö_77_assignsubmission_file/a.ipynb")
    found = replace(book, works=(*book.works[:4], work, book.works[5]))
    with ZipFile(io.BytesIO(report.feedback_files(found, "a"))) as archive:
        assert archive.namelist() == ["Ö_77_assignsubmission_file_/a.html"]
        assert archive.read(archive.namelist()[0]).decode() == report.feedback(work, found)
    names = {path.name for path in report.write(tmp_path, found)}
    assert "moodle-a.csv" in names and (tmp_path / "moodle-feedback-a.zip").exists()
    assert not (tmp_path / "moodle-feedback-b.zip").exists()


def test_the_checks_are_json_with_everything(book):
    found = json.loads(report.checks(book))
    assert found["sandbox"] is True
    assert [work["seed"] for work in found["works"]] == [5, None, None, 3, None, None]
    assert book.seeds == [3, 5]
    assert found["exercises"]["b"] == {
        "points": 0.5,
        "checks": [{"check": "check", "points": 0.5, "hidden": True}],
    }
    assert [work["points"] for work in found["works"]] == [0, 0, 2, 0.5, 0, 0]
    assert found["works"][0]["checks"][0]["values"][0]["came"] == EVIL


def test_feedback_shows_code_and_visible_values_escaped_and_of_hidden_ones_only_whether_they_passed(book):
    page = report.feedback(book.works[0], book)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 3  # name, code, what came
    assert "the hint" in page and "0 of 2 points" in page
    assert "✗ not passed</strong>: inputs that are not shown" in page
    assert "drawn" not in page


def test_feedback_of_what_was_not_graded_says_why(book):
    page = report.feedback(book.works[5], book)
    assert "not graded" in page and "Again." in page


def test_long_code_is_cut():
    work = Work("ada", "a", "ok", "f", (), (checked(2, 2),), {"f": "x" * 1_000_000})
    found = Book(True, {"a": measure(2)}, (Learner("ada"),), (work,))
    assert len(report.feedback(work, found)) < 40_000


def test_characters_that_turn_the_direction_of_text_are_shown_as_codes():
    work = Work("ada\u202eevil", "a", "not submitted", "f", ("no",))
    found = Book(True, {"a": measure(2)}, (Learner("ada"),), (work,))
    page = report.feedback(work, found)
    assert "\u202e" not in page and "\\u202e" in page


def test_the_overview_has_plots_links_and_warnings(book):
    page = report.overview(book)
    assert page.count("data:image/svg+xml;base64,") == 2
    assert "<script" not in page
    assert "Weaker" not in page and "without a sandbox" not in page
    bare = Measure(book.measures["a"].notebook, {"check": {0: "", 1: ""}})
    page = report.overview(Book(False, {**book.measures, "a": bare}, book.learners, book.works))
    assert "a/check" in page and "b/check" not in page and "without a sandbox" in page


def test_the_same_grading_gives_the_same_bytes_and_stale_pages_go(book, tmp_path):
    first, second = tmp_path / "1", tmp_path / "2"
    stale = second / "feedback" / "gone" / "a.html"
    stale.parent.mkdir(parents=True)
    stale.write_text("old")
    foreign = second / "feedback" / "mine" / "notes.html"
    foreign.parent.mkdir()
    foreign.write_text("kept")
    for folder in (first, second):
        folder.mkdir(exist_ok=True)
        report.write(folder, book)
    foreign.unlink()
    foreign.parent.rmdir()
    assert content(first) == content(second)
    assert (first / "gradebook.csv").read_bytes().startswith(b"\xef\xbb\xbflearner,points")


def test_points_are_written_short():
    assert [report.number(one) for one in (2, 2.0, 0.5, 0.1 + 0.2, 1 / 3, 1234567)] == [
        *("2", "2", "0.5", "0.3", "0.3333", "1234567")
    ]
