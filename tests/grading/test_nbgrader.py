"""The exercises are nbgrader's, too: its rules hold for sources and for what learners get.

nbgrader brings 334 MB and is no requirement. Its rules for metadata are tested here without it. What it makes
of the notebooks itself is tested where it is installed: here, or for the Python that NBGRADER_PYTHON names,
in an environment of its own.
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jsonschema
import nbformat
import pytest

from companion.grading import release

FOLDER = Path(__file__).parents[2] / "exercises"
SOURCES = sorted((FOLDER / "solutions").glob("*.ipynb"))
NOTEBOOKS = [*SOURCES, *sorted(FOLDER.glob("*.ipynb"))]

# https://nbgrader.readthedocs.io/en/stable/contributor_guide/metadata.html
SCHEMA_3 = {
    "type": "object",
    "required": ["schema_version", "grade", "locked", "solution"],
    "additionalProperties": False,
    "properties": {
        "schema_version": {"const": 3},
        **{flag: {"type": "boolean"} for flag in ("grade", "locked", "solution", "task")},
        "grade_id": {"type": "string", "pattern": "^[a-zA-Z0-9_-]+$"},
        "points": {"type": "number", "minimum": 0},
        "checksum": {"type": "string", "minLength": 32, "maxLength": 32},
        "cell_type": {"enum": ["raw", "code", "markdown"]},
    },
}


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_the_metadata_follow_nbgraders_schema_and_its_rules_for_a_notebook(file):
    notebook = nbformat.read(file, 4)
    names = []
    for cell in notebook.cells:
        if (meta := cell.metadata.get("nbgrader")) is None:
            continue
        jsonschema.validate(meta, SCHEMA_3)
        names.append(meta["grade_id"])
        assert meta.get("cell_type", cell.cell_type) == cell.cell_type
        assert "points" in meta or not meta["grade"]
        if cell.cell_type == "markdown" and not meta.get("task"):
            assert meta["grade"] == meta["solution"]
    assert names and len(names) == len(set(names))


@pytest.fixture(scope="module")
def python():
    """A Python that has nbgrader."""
    found = sys.executable if find_spec("nbgrader") else os.environ.get("NBGRADER_PYTHON")
    if not found:
        pytest.skip("nbgrader is not installed, and NBGRADER_PYTHON does not say where")
    return found


def told(python, *words, cwd=None):
    """What a command of this Python says; it calls others that lie beside it."""
    env = os.environ | {"PATH": f"{Path(python).parent}:{os.environ['PATH']}"}
    done = subprocess.run([python, *map(str, words)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


VALIDATE = """
import sys, nbformat
from nbgrader.nbgraderformat import MetadataValidator
for file in sys.argv[1:]:
    MetadataValidator().validate_nb(nbformat.read(file, 4))
    print("valid", file)
"""


def test_nbgraders_own_validator_of_metadata_finds_nothing(python):
    said = told(python, "-c", VALIDATE, *NOTEBOOKS)
    assert said.count("valid") == len(NOTEBOOKS) and "Cell type has changed" not in said


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_nbgrader_makes_the_learners_notebook_from_a_source_as_release_does(python, source, tmp_path):
    (tmp_path / "source" / "exercise").mkdir(parents=True)
    shutil.copy(source, tmp_path / "source" / "exercise")
    stub = json.dumps({"python": release.PLACEHOLDER})
    config = f"c = get_config()\nc.ClearSolutions.code_stub = {stub}\n"
    (tmp_path / "nbgrader_config.py").write_text(config)
    told(python, "-m", "nbgrader", "generate_assignment", "exercise", "--create", cwd=tmp_path)
    theirs = nbformat.read(tmp_path / "release" / "exercise" / source.name, 4)
    ours = release.strip(release.read(source))
    checks = [cell.source for cell in ours.cells if release.is_check(cell)]
    assert [cell.source.rstrip() for cell in theirs.cells if release.is_check(cell)] == checks
    answers = [cell.source for cell in ours.cells if release.is_answer(cell)]
    assert [cell.source for cell in theirs.cells if release.is_answer(cell)] == answers


@pytest.mark.slow
def test_nbgraders_validate_runs_a_solution_without_complaint(python, tmp_path):
    shutil.copy(FOLDER / "solutions" / "03_pretraining.ipynb", tmp_path / "x.ipynb")
    assert "Success" in told(python, "-m", "nbgrader", "validate", "x.ipynb", cwd=tmp_path)
