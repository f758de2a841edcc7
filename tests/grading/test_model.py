"""An exercise whose checks ask the course's model itself: its engine runs in the sandbox, too."""

import json
import os

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from companion.grading import release, sandbox
from companion.grading.grade import grade

pytestmark = pytest.mark.slow

FLAGS = {"grade": False, "solution": False, "locked": True, "task": False, "schema_version": 3}
SETUP = "import companion\nfrom companion.checks import Check, drawn\n\nMODEL = companion.chat_model()"
ANSWER = '''def next_token(prompt):
    """The model's most likely next token after a text."""
    ### BEGIN SOLUTION
    found = companion.client().completions.create(model=MODEL, prompt=prompt, max_tokens=1, temperature=0)
    return found.choices[0].text
    ### END SOLUTION'''
# Prompts whose next token is so likely that it is the same on every processor.
CHECK = """with Check("next_token", points=2) as check:
    check.equal("of France", next_token("The capital of France is"), " Paris", look="max_tokens=1")
    ### BEGIN HIDDEN TESTS
    for country in drawn("check-next_token").sample(["Italy", "Spain", "Germany", "Egypt", "Russia"], 3):
        check.record("of a drawn country", next_token(f"The capital of {country} is"))
    ### END HIDDEN TESTS"""
SPOILS = """
import os, pathlib
folder = pathlib.Path(os.environ["COMPANION_MODEL_PATH"])
for file in folder.iterdir():
    for action in (lambda: file.write_bytes(b""), file.unlink, lambda: os.chmod(file, 0)):
        try:
            action()
        except OSError:
            pass
"""
PLAIN_CHECK = """import os
with Check("twice", points=1) as check:
    check.equal("twice(2)", twice(2), 4)
    check.equal("there are no models to read", os.environ.get("COMPANION_MODEL_PATH"), None)"""


def cell(source, grade_id, **flags):
    return new_code_cell(source, id=grade_id, metadata={"nbgrader": FLAGS | flags | {"grade_id": grade_id}})


def exercise(answer, check, name, points, **metadata):
    cells = [
        cell(SETUP, "setup"),
        cell(answer, name, solution=True, locked=False),
        cell(check, f"check-{name}", grade=True, points=points),
    ]
    return new_notebook(cells=cells, metadata=metadata)


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """Two exercises, one that asks the model and one that does not, and submissions."""
    try:
        sandbox.self_test()
    except RuntimeError as error:
        (pytest.fail if os.environ.get("COMPANION_NEEDS_SANDBOX") else pytest.skip)(str(error))
    folder = tmp_path_factory.mktemp("course")
    (folder / "solutions").mkdir()
    twice = "def twice(n):\n    ### BEGIN SOLUTION\n    return 2 * n\n    ### END SOLUTION"
    asks = exercise(ANSWER, CHECK, "next_token", 2, companion={"model": True})
    nbformat.write(asks, folder / "solutions" / "01_asks.ipynb")
    nbformat.write(exercise(twice, PLAIN_CHECK, "twice", 1), folder / "solutions" / "02_plain.ipynb")

    def submit(learner, name, answer):
        notebook = release.strip(release.read(folder / "solutions" / name))
        notebook.cells[1].source = answer
        (folder / "submissions" / learner).mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, folder / "submissions" / learner / name)

    honest = ANSWER.replace("### BEGIN SOLUTION", "# mine").replace("### END SOLUTION", "")
    submit("ada", "01_asks.ipynb", honest)
    submit("ada", "02_plain.ipynb", "def twice(n):\n    return n + n")
    submit("bob", "01_asks.ipynb", "def next_token(prompt):\n    return ' Paris'")
    submit("cem", "01_asks.ipynb", SPOILS + honest)
    return folder


def test_the_engine_answers_in_the_sandbox_and_its_weights_cannot_be_spoilt(course):
    grade(course / "submissions", course / "grades", course / "solutions", workers=2)
    works = json.loads((course / "grades" / "checks.json").read_text())["works"]
    points = {(work["learner"], work["exercise"]): work["points"] for work in works}
    assert points == {
        ("ada", "01_asks"): 2,
        ("ada", "02_plain"): 1,
        ("bob", "01_asks"): 0,
        ("bob", "02_plain"): 0,
        ("cem", "01_asks"): 2,
        ("cem", "02_plain"): 0,
    }


def test_without_the_models_it_is_said_before_anything_is_graded(course, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_MODEL_PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"COMPANION_MODEL_PATH=.* holds no"):
        grade(course / "submissions", tmp_path / "out", course / "solutions")


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_the_mark_of_such_an_exercise_is_true_or_false(tmp_path, value):
    file = tmp_path / "01_asks.ipynb"
    nbformat.write(exercise(ANSWER, CHECK, "next_token", 2, companion={"model": value}), file)
    with pytest.raises(
        ValueError, match=r"01_asks.ipynb, companion.model is .*, but should be true or false"
    ):
        release.read(file)
