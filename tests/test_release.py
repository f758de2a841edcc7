"""From an exercise's source to the learner's notebook, and what a source must be like."""

import copy
import json

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from companion.grading.release import PLACEHOLDER, questions, read, release, strip, unmark

SOLUTION = '''def double(number):
    """Twice the number."""
    ### BEGIN SOLUTION
    secret = number + number
    return secret
    ### END SOLUTION'''
CHECK = """with Check("double", points=2) as check:
    check.equal("double(2)", double(2), 4)
    ### BEGIN HIDDEN TESTS
    check.record("hidden", double(1234))
    ### END HIDDEN TESTS"""


def cell(source, grade_id, *, tags=(), wrong=None, **flags):
    nbgrader = {"grade_id": grade_id, "grade": False, "solution": False, "locked": True, "task": False}
    made = new_code_cell(source, metadata={"nbgrader": nbgrader | {"schema_version": 3} | flags})
    if wrong:
        made.metadata["companion"] = {"wrong_answers": wrong}
    made.execution_count = 7
    made.outputs = [nbformat.v4.new_output("stream", text="secret output")]
    made.metadata["execution"] = {"iopub.execute_input": "2026-01-01"}
    return made


def answer(source=SOLUTION, grade_id="double", **more):
    return cell(source, grade_id, **{"solution": True, "locked": False, "wrong": ["secret = wrong"]} | more)


def check(source=CHECK, grade_id="check-double", **more):
    return cell(source, grade_id, **{"grade": True, "points": 2} | more)


def source(*cells):
    return new_notebook(
        cells=copy.deepcopy(cells or (new_markdown_cell("# Task"), answer(), check())),
        metadata={
            "kernelspec": {"name": "old", "display_name": "Old"},
            "language_info": {"name": "python", "version": "3.1"},
        },
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "solutions").mkdir()
    return tmp_path


def write(folder, notebook, name="01_double.ipynb"):
    nbformat.write(notebook, folder / "solutions" / name)
    return folder / "solutions" / name


def released(folder, notebook):
    write(folder, notebook)
    [file] = release(folder / "solutions", folder)
    return file


# What the learner gets


def test_the_solution_becomes_a_placeholder_with_its_indentation(folder):
    made = nbformat.read(released(folder, source()), 4)
    assert made.cells[1].source == f'def double(number):\n    """Twice the number."""\n    {PLACEHOLDER}'


def test_outside_a_function_the_placeholder_is_a_comment():
    code = "import math\n### BEGIN SOLUTION\nsecret = 1\n### END SOLUTION\nafter = 2"
    assert unmark(code) == "import math\n# your code here\nafter = 2"


def test_every_solution_of_a_cell_gets_its_own_placeholder():
    assert unmark(SOLUTION + "\n\n\n" + SOLUTION).count(PLACEHOLDER) == 2


def test_hidden_tests_go_and_visible_ones_stay(folder):
    made = nbformat.read(released(folder, source()), 4)
    assert made.cells[2].source == "\n".join(CHECK.splitlines()[:2])


def test_nothing_of_the_solution_leaks(folder):
    instructors = new_markdown_cell("the secret is addition", metadata={"tags": ["instructor"]})
    text = released(folder, source(new_markdown_cell("# Task"), answer(), check(), instructors)).read_text()
    for leak in ("secret", "hidden", "1234", "BEGIN", "wrong_answers", "number + number", "2026", "Old"):
        assert leak not in text


def test_outputs_and_counts_are_cleared_and_the_notebook_is_valid(folder):
    made = nbformat.read(released(folder, source()), 4)
    nbformat.validate(made)
    assert all(cell.outputs == [] and cell.execution_count is None for cell in made.cells[1:])


def test_nbgraders_metadata_stay_and_checks_cannot_be_edited(folder):
    made = nbformat.read(released(folder, source()), 4)
    assert made.cells[2].metadata == {
        "deletable": False,
        "editable": False,
        "nbgrader": {
            "grade_id": "check-double",
            "grade": True,
            "points": 2,
            "solution": False,
            "locked": True,
            "task": False,
            "schema_version": 3,
            "cell_type": "code",
        },
    }
    assert "editable" not in made.cells[1].metadata


def test_tags_stay_but_for_nbvals(folder):
    hint = new_markdown_cell("hint", metadata={"tags": ["hint", "nbval-skip"], "collapsed": True})
    made = nbformat.read(released(folder, source(hint, answer(), check())), 4)
    assert made.cells[0].metadata == {"tags": ["hint"]}


def test_a_second_release_writes_nothing_and_a_fresh_one_the_same_bytes(folder):
    file = released(folder, source())
    content = file.read_bytes()
    assert release(folder / "solutions", folder) == []
    fresh = source()
    for number, made in enumerate(fresh.cells):
        made.id = f"drawn-{number}"
    write(folder, fresh)
    assert release(folder / "solutions", folder, check=True) == []
    file.unlink()
    release(folder / "solutions", folder)
    assert file.read_bytes() == content


def test_checking_says_what_would_change_and_writes_nothing(folder):
    file = released(folder, source())
    file.write_text("old")
    assert release(folder / "solutions", folder, check=True) == [file]
    assert file.read_text() == "old"


def test_a_source_from_windows_and_of_an_older_format_is_read(folder):
    notebook = source()
    notebook.nbformat_minor = 4
    for made in notebook.cells:
        del made["id"]
    file = folder / "solutions" / "01_double.ipynb"
    file.write_text(json.dumps(notebook), encoding="utf-8-sig")
    [made] = release(folder / "solutions", folder)
    assert [cell.id for cell in nbformat.read(made, 4).cells] == ["cell-01", "double", "check-double"]


def test_a_question_is_an_answer_with_the_checks_that_follow_it():
    found = questions(
        source(answer(), check(), check(grade_id="more"), answer(grade_id="b"), check(grade_id="c"))
    )
    assert [(q.grade_id, [c.metadata.nbgrader.grade_id for c in q.checks]) for q in found] == [
        ("double", ["check-double", "more"]),
        ("b", ["c"]),
    ]
    assert found[0].wrong_answers == ["secret = wrong"]


# What a source must be like


@pytest.mark.parametrize(
    ("cells", "complaint"),
    [
        ([answer(), check(), check()], "cell 3 (check-double): the grade_id is taken"),
        ([answer(SOLUTION[:-16]), check()], "cell 1 (double): ### BEGIN SOLUTION has no ### END SOLUTION"),
        ([answer(SOLUTION[20:]), check()], "cell 1 (double): "),
        ([answer("### END SOLUTION"), check()], "### END SOLUTION has no ### BEGIN SOLUTION before it"),
        (
            [answer("### BEGIN SOLUTION\n" + SOLUTION), check()],
            "### BEGIN SOLUTION stands before ### END SOLUTION",
        ),
        ([answer(SOLUTION.replace("###", "##")), check()], "is not a marker"),
        ([answer(SOLUTION.replace("SOLUTION", "HIDDEN TESTS")), check()], "holds ### BEGIN SOLUTION"),
        ([answer("return 1"), check()], "holds ### BEGIN SOLUTION"),
        (
            [answer(), new_markdown_cell("### BEGIN SOLUTION\n### END SOLUTION"), check()],
            "cell 2: an answer cell",
        ),
        (
            [new_code_cell("### BEGIN HIDDEN TESTS\n### END HIDDEN TESTS"), answer(), check()],
            "outside a check",
        ),
        ([answer(SOLUTION.replace('number."""', "number.")), check()], "what a learner gets is not Python"),
        ([answer()], "answer double: no check cell follows it"),
        ([answer(), answer(grade_id="b"), check()], "answer double: no check cell follows it"),
        ([check(), answer()], "cell 1 (check-double): a check cell stands before any answer"),
        ([new_markdown_cell("text")], "no cell is an answer"),
        ([answer(), check(points=None)], "cell 2 (check-double): points is None"),
        ([answer(), check(points=0)], "points is 0, but should be a number above 0"),
        ([answer(), check(points=3)], "points is 3 in the metadata, and [2] in the code"),
        ([answer(), check(locked=False)], "every other cell of nbgrader's locked: true"),
        ([answer(locked=True), check()], "an answer cell has locked: false"),
        ([answer(grade=True), check()], "only answers with a check cell can be graded"),
        ([answer(grade_id="no spaces"), check()], "grade_id is 'no spaces'"),
        ([answer(schema_version=1), check()], "schema_version is 1, but should be 3"),
        ([answer(solution="yes"), check()], "nbgrader's solution is 'yes'"),
        ([answer(wrong="one"), check()], "cell 1 (double): wrong_answers"),
    ],
)
def test_what_is_not_complete_is_refused_in_one_line_that_names_notebook_and_cell(folder, cells, complaint):
    write(folder, source(*cells))
    with pytest.raises(ValueError) as error:
        release(folder / "solutions", folder)
    assert str(error.value).startswith("01_double.ipynb, ") and complaint in str(error.value)
    assert "\n" not in str(error.value)
    assert list(folder.glob("*.ipynb")) == []


@pytest.mark.parametrize("tag", ["solution", "grade"])
def test_an_instructors_cell_cannot_be_a_question_too(folder, tag):
    both = answer() if tag == "solution" else check()
    both.metadata["tags"] = ["instructor"]
    cells = [both, check()] if tag == "solution" else [answer(), both]
    write(folder, source(*cells))
    with pytest.raises(ValueError, match="drop one of the two"):
        release(folder / "solutions", folder)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"cells": 1}', '{"nbformat": 4, "nbformat_minor": 5, "cells": []}']
)
def test_what_is_no_notebook_is_refused_by_name(folder, content):
    (folder / "solutions" / "02_broken.ipynb").write_text(content)
    write(folder, source())
    with pytest.raises(ValueError, match=r"^02_broken\.ipynb") as error:
        release(folder / "solutions", folder)
    assert "\n" not in str(error.value)
    assert not (folder / "01_double.ipynb").exists()


def test_the_sources_are_never_overwritten(folder):
    write(folder, source())
    with pytest.raises(ValueError, match="source and target at once"):
        release(folder / "solutions", folder / "x" / ".." / "solutions")


def test_a_folder_without_notebooks_is_refused(folder):
    with pytest.raises(ValueError, match="holds no notebook"):
        release(folder / "solutions", folder)


def test_a_write_that_fails_leaves_the_old_notebook_and_nothing_else(folder, monkeypatch):
    file = released(folder, source())
    old = file.read_bytes()
    write(folder, source(new_markdown_cell("new"), answer(), check()))

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        release(folder / "solutions", folder)
    assert file.read_bytes() == old
    assert sorted(path.name for path in folder.iterdir()) == ["01_double.ipynb", "solutions"]


def test_stripping_leaves_the_source_as_it_was(folder):
    notebook = read(write(folder, source()))
    before = copy.deepcopy(notebook)
    strip(notebook)
    assert notebook == before
