"""A learner's notebooks, as their check cells left them: what passes, and what is to be done."""

import copy
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

from companion import cli
from companion.grading import backcheck, progress, release

EXERCISES = Path(__file__).parents[2] / "exercises"
DOUBLE = "def double(n):\n    ### BEGIN SOLUTION\n    return 2 * n\n    ### END SOLUTION"
FLAGS = {"grade": False, "solution": False, "locked": True, "task": False, "schema_version": 3}


@pytest.fixture(scope="module")
def worked():
    """A notebook with two questions, run: the first passes, the second does not."""

    def cell(source, grade_id, **flags):
        return nbformat.v4.new_code_cell(
            source, id=grade_id, metadata={"nbgrader": FLAGS | flags | {"grade_id": grade_id}}
        )

    def check(name, points, value):
        code = f'with Check("{name}", points={points}) as check:\n'
        code += f'    check.equal("{name}(2)", {name}(2), {value}, look="the [red]operator")'
        return cell(code, f"check-{name}", grade=True, points=points)

    cells = [cell("from companion.checks import Check", "setup")]
    for name, points, value in (("double", 2, 4), ("triple", 1.5, 6)):
        source = release.unmark(DOUBLE) if name == "triple" else DOUBLE
        cells += [
            cell(source.replace("double", name), name, solution=True, locked=False),
            check(name, points, value),
        ]
    cells[3].source = "def triple(n):\n    return n + 3"
    return backcheck.run(nbformat.v4.new_notebook(cells=cells))


@pytest.fixture
def show(tmp_path, worked):
    """What the command says about a changed copy of the notebook."""

    def make(change=lambda notebook: None, *options):
        notebook = copy.deepcopy(worked)
        change(notebook)
        nbformat.write(notebook, tmp_path / "01_numbers.ipynb")
        return CliRunner(env={"COLUMNS": "160"}).invoke(cli.app, ["progress", str(tmp_path), *options])

    return make


def test_what_passes_and_what_does_not_is_shown_with_the_hint(show):
    done = show()
    assert done.exit_code == 1
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[1] == ["01_numbers", "double", "2", "✓", "passed"]
    assert " ".join(rows[2]) == "triple 1.5 ✗ not yet triple(2); look at: the [red]operator"
    assert " ".join(rows[3]) == "2 of 3.5 points pass"


def test_a_check_that_was_not_run_or_is_older_than_its_answer_does_not_count(show):
    def clear(notebook):
        notebook.cells[2].outputs = []

    def edit(notebook):
        notebook.cells[1].execution_count = 99

    assert "– not run Run its cells, and save" in " ".join(show(clear).stdout.split())
    assert "– not run The answer was run after the check" in " ".join(show(edit).stdout.split())
    assert "0 of 3.5 points" in show(edit).stdout


def test_all_that_pass_give_status_0(show):
    assert show(lambda notebook: notebook.cells.__delitem__(slice(3, None))).exit_code == 0


@pytest.mark.slow
def test_run_takes_a_fresh_kernel_and_leaves_the_file_alone(show, tmp_path):
    def mend(notebook):
        notebook.cells[3].source = "def triple(n):\n    return 3 * n"

    assert show(mend).exit_code == 1
    before = (tmp_path / "01_numbers.ipynb").read_bytes()
    done = CliRunner().invoke(cli.app, ["progress", str(tmp_path / "01_numbers.ipynb"), "--run"])
    assert done.exit_code == 0 and "3.5 of 3.5 points pass" in done.stdout
    assert (tmp_path / "01_numbers.ipynb").read_bytes() == before


def test_an_exercise_as_it_is_handed_out_is_not_run_and_its_solution_passes():
    [handed_out] = progress.read(EXERCISES / "01_what_is_chatgpt.ipynb")
    assert [check.question for check in handed_out.checks] == ["ask", "next_tokens", "reply", "agreement"]
    assert {check.state for check in handed_out.checks} == {"not run"} and handed_out.points == 10
    [solved] = progress.read(EXERCISES / "solutions" / "01_what_is_chatgpt.ipynb")
    assert solved.passed == solved.points


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no exercise: name a notebook with check cells"),
        ("{", "is not a notebook: "),
        ('{"cells": [], "nbformat": 4, "nbformat_minor": 5, "metadata": {}}', "holds no exercise"),
    ],
)
def test_what_cannot_be_shown_is_said_in_one_line_with_status_2(tmp_path, content, message):
    if content is not None:
        (tmp_path / "01_x.ipynb").write_text(content)
    done = CliRunner().invoke(cli.app, ["progress", str(tmp_path)])
    assert done.exit_code == 2 and done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1
