"""nbval runs every chapter and every solution again and compares what they show with what is stored.

COMPANION_TEST_MINUTES is for machines that have only so much time: when a test run is older, the notebooks
that are still to come are skipped. Without it, all are run.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
NUMBERED = [path for path in CHAPTERS if path.stem[:2].isdigit()]
SOLUTIONS = sorted((ROOT / "exercises" / "solutions").glob("*.ipynb"))
NOTEBOOKS = CHAPTERS + SOLUTIONS
IGNORED = {"nbval-ignore-output", "nbval-skip"}
BEGAN = time.monotonic()
MINUTES = float(os.environ.get("COMPANION_TEST_MINUTES", "inf"))


def ids(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=ids(NOTEBOOKS))
def test_a_run_gives_the_outputs_that_are_stored(notebook, client):
    if time.monotonic() > BEGAN + 60 * MINUTES:
        pytest.skip(f"the {MINUTES:g} minutes of COMPANION_TEST_MINUTES are over")
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "--nbval-cell-timeout=1500"]
    command += ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(notebook)]
    command += ["-p", "companion.json_schema"]  # imported before nbval, which would import it the slow way
    # Figures are shown by the kernel's own backend, whatever this process was told to use.
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"} | {
        "COLUMNS": "200"
    }
    done = subprocess.run(command, cwd=notebook.parent, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=ids(NOTEBOOKS))
def test_a_notebook_was_run_from_top_to_bottom_and_has_outputs_that_are_compared(notebook):
    cells = [cell for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    compared = [cell for cell in cells if cell.outputs and not IGNORED & set(cell.metadata.get("tags", ()))]
    assert len(compared) >= 3
    errors = [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert not errors


@pytest.mark.parametrize("chapter", CHAPTERS, ids=ids(CHAPTERS))
def test_a_figure_has_a_caption_and_alt_text(chapter):
    for cell in nbformat.read(chapter, 4).cells:
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", ())):
            shown = cell.metadata.get("mystnb", {})
            assert len(shown.get("image", {}).get("alt", "")) > 40, cell.id
            assert len(shown.get("figure", {}).get("caption", "")) > 40, cell.id


@pytest.mark.parametrize("chapter", NUMBERED, ids=lambda path: path.stem)
def test_a_quiz_has_five_questions_with_one_right_option_each_and_feedback_for_all(chapter):
    cells = [cell.source for cell in nbformat.read(chapter, 4).cells if cell.cell_type == "markdown"]
    (quiz,) = [text for text in cells if "## Check yourself" in text]
    questions = re.split(r"(?m)^\*\*\d\. ", quiz)[1:]
    assert len(questions) == 5
    places = []
    for question in questions:
        option = r"<details( class=\"right\")?><summary>(.+?)</summary>\n\n(.+?)\n\n</details>"
        options = re.findall(option, question, re.S)
        assert 3 <= len(options) <= 4, question[:80]
        right = [bool(mark) for mark, _, _ in options]
        assert sum(right) == 1, question[:80]
        assert all(len(feedback) > 20 for _, _, feedback in options), question[:80]
        places.append(right.index(True))
    assert len(set(places)) > 1


def test_every_chapter_and_its_exercise_go_by_one_name():
    chapters = {path.stem for path in NUMBERED}
    assert {path.stem for path in SOLUTIONS} == chapters
    assert {path.stem for path in (ROOT / "exercises").glob("*.ipynb")} == chapters
