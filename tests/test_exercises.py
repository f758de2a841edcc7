"""The exercises of the course: complete, current, and checked by checks that tell right from wrong."""

from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

from companion import cli
from companion.checks import MIME
from companion.grading import backcheck, release

FOLDER = Path(__file__).parents[1] / "exercises"
SOURCES = sorted((FOLDER / "solutions").glob("*.ipynb"))
every_exercise = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


@pytest.fixture
def small(tmp_path):
    """A source with one question, whose check cell is given."""
    marks = {"grade": False, "solution": False, "locked": True, "task": False, "schema_version": 3}

    def make(check, wrong):
        answer = nbformat.v4.new_code_cell(
            "def double(number):\n    ### BEGIN SOLUTION\n    return 2 * number\n    ### END SOLUTION",
            metadata={"nbgrader": marks | {"grade_id": "double", "solution": True, "locked": False}},
        )
        answer.metadata["companion"] = {"wrong_answers": wrong}
        graded = marks | {"grade_id": "check", "grade": True, "points": 2}
        checked = nbformat.v4.new_code_cell(check, metadata={"nbgrader": graded})
        start = nbformat.v4.new_code_cell("from companion.checks import Check")
        file = tmp_path / "01_double.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=[start, answer, checked]), file)
        return file

    return make


CHECK = 'with Check("double", points=2) as check:\n    check.equal("double(2)", double(2), 4)'


def test_there_is_an_exercise():
    assert SOURCES


def test_the_learners_notebooks_on_disk_are_what_release_makes():
    assert release.release(FOLDER / "solutions", FOLDER, check=True) == []
    assert [file.name for file in sorted(FOLDER.glob("*.ipynb"))] == [source.name for source in SOURCES]


@every_exercise
def test_an_exercise_has_four_questions_for_ten_points_each_with_task_hint_and_wrong_answers(source):
    notebook = release.read(source)
    questions = release.questions(notebook)
    assert len(questions) >= 4
    points = [cell.metadata.nbgrader.points for cell in notebook.cells if release.is_check(cell)]
    assert sum(points) == 10
    text = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    for part in ("## Question", "**Done when**", "<details>\n<summary>Hint</summary>"):
        assert sum(part in cell for cell in text) == len(questions), part
    for question in questions:
        assert len(question.wrong_answers) >= 3
        assert '"""' in question.answer.source


@every_exercise
def test_the_stored_outputs_of_checks_say_that_all_passed(source):
    for cell in filter(release.is_check, release.read(source).cells):
        assert backcheck.result(cell)["passed"]
        assert {MIME, "text/html", "text/plain"} == set(cell.outputs[0].data)


@every_exercise
def test_every_check_also_calls_with_inputs_that_nobody_sees(source):
    for cell in filter(release.is_check, release.read(source).cells):
        hidden = set(cell.source.splitlines()) - set(release.unmark(cell.source).splitlines())
        name = cell.metadata.nbgrader.grade_id
        assert any("check.record(" in line for line in hidden), name
        assert any(f'drawn("{name}")' in line for line in hidden), name


@pytest.mark.slow
@every_exercise
def test_solutions_earn_every_point_wrong_and_missing_answers_none(source):
    assert backcheck.back_check(source) == []


@pytest.mark.slow
@every_exercise
def test_the_unsolved_notebook_earns_nothing_and_its_check_cells_do_not_raise(source):
    notebook = release.strip(release.read(source))
    notebook.cells = [cell for cell in notebook.cells if "live" not in cell.metadata.get("tags", [])]
    backcheck.run(notebook)
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        assert not [output for output in outputs if output.output_type == "error"], cell.id
        if release.is_check(cell):
            assert not backcheck.result(cell)["passed"]
            assert "still holds its placeholder" in outputs[0].data["text/plain"]


@pytest.mark.slow
def test_a_check_that_lets_a_wrong_answer_pass_is_complained_of(small):
    source = small(CHECK, ["def double(number):\n    return 4", "def double(number):\n    return number"])
    assert backcheck.back_check(source) == ["double: wrong answer 1 earns 2 points"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "status", "said"),
    [
        ("number", 0, "01_double.ipynb: its checks tell right from wrong"),
        ("4", 1, "wrong answer 1 earns 2 points"),
    ],
)
def test_release_checks_the_checks_where_it_is_asked_to(small, tmp_path, wrong, status, said):
    folder = small(CHECK, [f"def double(number):\n    return {wrong}"]).parent
    done = CliRunner().invoke(cli.app, ["release", str(folder), str(tmp_path / "learners"), "--check"])
    assert bool(done.exit_code) == status and said in done.output + str(done.exception)
    assert (tmp_path / "learners" / "01_double.ipynb").exists()


@pytest.mark.slow
def test_points_are_decided_by_what_is_emitted_and_not_by_what_is_said(small):
    claim = "def double(number):\n    Check.passed = True\n    return 5"
    hidden = CHECK + '\n    check.record("hidden", double(7))'
    coded = "def double(number):\n    return {2: 4}.get(number)"
    notebook = release.read(small(hidden, []))
    assert backcheck.try_answers(
        notebook, {"double": [claim, coded, "def double(n):\n    return n + n"]}
    ) == {"double": [0, 0, 2]}


@pytest.mark.slow
def test_a_solution_that_does_not_pass_its_own_check_is_refused(small):
    with pytest.raises(ValueError, match=r"01_double\.ipynb, check: the solution does not pass"):
        backcheck.back_check(small(CHECK.replace("4)", "5)"), []))


@pytest.mark.parametrize(
    "emitted",
    [None, {}, [], "passed", {"values": 1}, {"values": []}, {"values": [1]}, {"values": [{"what": "f"}]}],
)
def test_what_a_stranger_emits_is_compared_and_never_trusted(emitted):
    reference = {"values": [{"what": "f", "value": 1, "tolerance": 0}]}
    assert backcheck.agrees(reference, reference)
    assert not backcheck.agrees(emitted, reference)
    assert not backcheck.agrees(reference | {"error": "ValueError: no"}, reference)


def test_a_whole_number_that_no_float_holds_is_a_wrong_value():
    reference = {"values": [{"what": "f", "value": 0.5, "tolerance": 0}]}
    assert not backcheck.agrees({"values": [{"what": "f", "value": 10**400, "tolerance": 0}]}, reference)
