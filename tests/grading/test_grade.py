"""A folder of submissions, honest and not, graded once in the sandbox: what lies in the folder of grades."""

import copy
import csv
import json
import os
import random
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import filelock
import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from typer.testing import CliRunner

from companion import cli
from companion.grading import grade as grading
from companion.grading import release, run
from companion.grading.collect import collect, safe_name
from companion.grading.grade import grade

pytestmark = pytest.mark.slow
SOLUTIONS = Path(__file__).parents[2] / "exercises" / "solutions"


FLAGS = {"grade": False, "solution": False, "locked": True, "task": False, "schema_version": 3}
DOUBLE = '''def double(number):
    """Twice the number."""
    ### BEGIN SOLUTION
    return number + number
    ### END SOLUTION'''
GREET = '''def greet(name):
    """A greeting."""
    ### BEGIN SOLUTION
    return f"Hello, {name}!"
    ### END SOLUTION'''
CHECK_DOUBLE = """with Check("double", points=2) as check:
    check.equal("double(2)", double(2), 4, look="what + does")
    check.equal("double('ab')", double("ab"), "abab")
    ### BEGIN HIDDEN TESTS
    draw = drawn("check-double")
    for _ in range(3):
        check.record("a drawn number", double(draw.randint(10, 10**9)))
    ### END HIDDEN TESTS"""
CHECK_GREET = """with Check("greet", points=1.5) as check:
    check.equal("greet('Ada')", greet("Ada"), "Hello, Ada!", look="the <comma>")"""

RIGHT = "def double(number):\n    return 2 * number"
HARD_CODED = "def double(number):\n    return {2: 4, 'ab': 'abab'}.get(number, 0)"
HELLO = "def greet(name):\n    return 'Hello, ' + name + '!'"
SCRIPT = "def greet(name):\n    return '<script>alert(1)</script></pre>'"
FLOOD = f"while True:\n    print('x' * 1_000_000)\n\n{RIGHT}"

TIMEOUT = 6  # seconds for a cell
CMD, UMLAUT = "=cmd|' !A0", "Ümläut Ö'Hara"
POINTS = {"ada": 3.5, "bob": 0, "cem": 0, "dot": 0, CMD: 2, UMLAUT: 1.5}


def cell(source, grade_id, **flags):
    return new_code_cell(source, id=grade_id, metadata={"nbgrader": FLAGS | flags | {"grade_id": grade_id}})


def write(file, notebook):
    file.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, file)


def submit(file, source, **answers):
    """A learner's notebook, as released, with these answers."""
    notebook = release.strip(source)
    for one in notebook.cells:
        one.source = answers.get(one.id, one.source)
    write(file, notebook)


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A folder with exercises and submissions of one."""
    folder = tmp_path_factory.mktemp("course")
    source = new_notebook(
        cells=[
            cell("from companion.checks import Check, drawn", "setup"),
            cell(DOUBLE, "double", solution=True, locked=False),
            cell(CHECK_DOUBLE, "check-double", grade=True, points=2),
            cell(GREET, "greet", solution=True, locked=False),
            cell(CHECK_GREET, "check-greet", grade=True, points=1.5),
        ]
    )
    write(folder / "solutions" / "01_tiny.ipynb", source)
    other = copy.deepcopy(source)
    for one in other.cells[1:]:
        one.metadata.nbgrader.grade_id = f"other-{one.id}"
        one.source = one.source.replace("double", "triple").replace("greet", "part")
    write(folder / "solutions" / "02_other.ipynb", other)
    source = release.read(folder / "solutions" / "01_tiny.ipynb")
    subs = folder / "submissions"
    submit(subs / "ada" / "01_tiny" / "01_tiny.ipynb", source, double=RIGHT, greet=HELLO)
    submit(subs / "bob" / "01_tiny" / "nb.ipynb", source, double=HARD_CODED)
    (subs / "cem" / "01_tiny").mkdir(parents=True)
    (subs / "cem" / "01_tiny" / "01_tiny.ipynb").write_text("")
    foreign = new_notebook(cells=[new_markdown_cell("# Recipes"), new_code_cell("bake()")])
    write(subs / "dot" / "01_tiny" / "01_tiny.ipynb", foreign)
    submit(subs / CMD / "01_tiny" / "01_tiny.ipynb", source, double=RIGHT, greet=SCRIPT)
    submit(subs / f"{UMLAUT}_01_tiny.ipynb", source, double=FLOOD, greet=HELLO)
    return folder


@pytest.fixture(scope="module")
def walled():
    """Without bubblewrap these tests are skipped or fail, as asked."""
    try:
        grading.sandbox.self_test()
    except RuntimeError as error:
        (pytest.fail if os.environ.get("COMPANION_NEEDS_SANDBOX") else pytest.skip)(str(error))


@pytest.fixture(scope="module")
def graded(course, walled):
    """The grading of all, by two workers."""
    folders = (course / "submissions", course / "grades", course / "solutions")
    return grade(*folders, workers=2, seed=7, timeout=TIMEOUT)


@pytest.fixture(scope="module")
def grades(course, graded):
    """The folder of grades."""
    return course / "grades"


@pytest.fixture(scope="module")
def rows(grades):
    """The gradebook's rows by the learner's name, as a spreadsheet shows it."""
    with open(grades / "gradebook.csv", encoding="utf-8-sig", newline="") as file:
        return {row["learner"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def works(grades):
    """The works in checks.json by learner."""
    return {work["learner"]: work for work in json.loads((grades / "checks.json").read_text())["works"]}


def page(grades, learner):
    return (grades / "feedback" / safe_name(learner) / "01_tiny.html").read_text()


def written(folder):
    """All that is for the instructor, by path."""
    files = (file for file in folder.rglob("*") if file.is_file() and ".work" not in file.parts)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


# What it comes to


def test_everyone_gets_what_they_earned_whatever_others_do(works):
    assert {name: work["points"] for name, work in works.items()} == POINTS


def test_the_gradebook_says_the_same_and_guards_names_that_begin_like_a_formula(rows):
    assert {name.lstrip("'"): float(row["points"]) for name, row in rows.items()} == POINTS
    assert f"'{CMD}" in rows and CMD not in rows
    assert all(row["of"] == "3.5" for row in rows.values())


def test_only_exercises_of_which_something_was_submitted_have_a_column(rows):
    assert "01_tiny" in rows["ada"] and "02_other" not in rows["ada"]


def test_what_cannot_be_graded_is_not_submitted_and_says_why(rows):
    assert rows["ada"]["status"] == rows["bob"]["status"] == "ok"
    assert rows["cem"]["status"] == rows["dot"]["status"] == "not submitted"
    assert "empty" in rows["cem"]["notes"] and "not of this exercise" in rows["dot"]["notes"]


def test_a_flood_costs_its_own_question_only_and_is_noted(works, rows):
    assert [check["earned"] for check in works[UMLAUT]["checks"]] == [0, 1.5]
    assert "double: It was stopped: it took too much time" in rows[UMLAUT]["notes"]


def test_answers_hard_coded_for_visible_inputs_earn_nothing(works):
    double = works["bob"]["checks"][0]
    assert all(value["passed"] for value in double["values"])
    assert (double["hidden"], double["earned"]) == (False, 0)


def test_the_command_says_what_it_did_and_which_checks_are_weaker(graded, monkeypatch):
    asked = {}
    monkeypatch.setattr(grading, "grade", lambda *folders, **options: asked.update(options) or graded)
    options = ["--out", "grades", "--exercises", "solutions", "--workers", "3", "--seed", "7"]
    done = CliRunner().invoke(cli.app, ["grade", "submissions", *options])
    assert done.exit_code == 0
    assert asked == {"workers": 3, "seed": 7, "sandboxed": True}
    assert "6 learners, 1 exercise, seed 7: 2 not submitted, 4 ok" in done.stdout
    assert done.stderr == "without hidden tests, and so weaker: 01_tiny/check-greet\n"


# What learners read


def test_feedback_says_what_was_expected_what_came_and_the_hint(grades):
    found = page(grades, "bob")
    assert "NotImplementedError" in found and "0 of 3.5 points" in found
    evil = page(grades, CMD)
    for text in ("Hello, Ada!", "&lt;script&gt;alert(1)", "the &lt;comma&gt;"):
        assert text in evil


def test_no_file_says_a_hidden_input_or_its_answer(grades):
    draw = random.Random("7:check-double")
    hidden = [number for _ in range(3) for number in [draw.randint(10, 10**9)]]
    text = b"".join(written(grades).values()).decode()
    assert not [number for one in hidden for number in (one, 2 * one) if str(number) in text]


def test_pages_hold_no_element_of_a_learners(grades):
    tags = set()

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.add(tag)
            assert not [name for name, _ in attributes if name.startswith("on")]

    for file in [*grades.glob("feedback/*/*.html"), grades / "overview.html"]:
        Parser().feed(file.read_text())
    assert not tags & {"script", "iframe", "object", "link", "form", "svg"}


def test_every_learner_with_a_file_has_a_page_that_the_overview_links(grades):
    pages = {str(file.relative_to(grades)) for file in grades.glob("feedback/*/*.html")}
    assert pages == {f"feedback/{safe_name(name)}/01_tiny.html" for name in POINTS}
    overview = (grades / "overview.html").read_text()
    assert all(f'href="{name}"' in overview for name in pages)


# Again


def test_an_interrupted_run_goes_on_where_it_stopped_and_gives_the_same_bytes(course, grades, monkeypatch):
    before = written(grades)
    results = sorted((grades / ".work" / "results").glob("*.json"))
    assert len(results) == 4
    fine = [
        file for file in results if '"flood"' not in (text := file.read_text()) and '"timeout"' not in text
    ]
    fine[0].unlink()
    left = grades / ".work" / "results" / "companion-killed"
    left.mkdir()
    ran = []
    session = run._session

    def counted(texts, *rest, **options):
        ran.append(len(texts))
        session(texts, *rest, **options)

    monkeypatch.setattr(run, "_session", counted)
    grade(course / "submissions", grades, course / "solutions", workers=1, timeout=TIMEOUT)
    assert ran == [1]
    assert written(grades) == before
    assert not left.exists()


def test_other_company_order_and_number_of_workers_change_no_byte(course, grades, works, tmp_path):
    for name in (CMD, "ada"):  # in the other order than by name
        shutil.copytree(course / "submissions" / name, tmp_path / "few" / name)
    out = tmp_path / "out"
    grade(tmp_path / "few", out, course / "solutions", workers=1, seed=7, timeout=TIMEOUT)
    assert json.loads((out / "checks.json").read_text())["works"] == [works[CMD], works["ada"]]
    assert all(page(out, name) == page(grades, name) for name in (CMD, "ada"))


def test_a_second_grader_on_the_same_folder_is_refused_in_one_line(course, grades, monkeypatch):
    before = written(grades)
    words = [
        "companion",
        "grade",
        course / "submissions",
        "--out",
        grades,
        "--exercises",
        course / "solutions",
    ]
    monkeypatch.setattr(sys, "argv", [*map(str, words)])
    with filelock.FileLock(grades / ".work" / "lock", timeout=0), pytest.raises(SystemExit) as end:
        cli.main()
    assert (
        end.value.code == f"companion: another grader works on {grades}: wait for it, or give another --out"
    )
    assert written(grades) == before


def test_a_grader_killed_in_mid_run_goes_on_and_a_second_one_beside_it_is_refused(course, walled, tmp_path):
    [source, *_] = grading._sources(course / "solutions").values()
    for number in range(6):
        answer = f"import time\ntime.sleep(0.4)\n{RIGHT}  # {number}"
        submit(tmp_path / "subs" / f"learner-{number}" / "01_tiny.ipynb", source, double=answer)
    folders = [tmp_path / "subs", tmp_path / "out", course / "solutions"]
    options = ["--out", folders[1], "--exercises", folders[2], "--workers", "2", "--seed", "7"]
    code = "from companion.cli import main; main()"
    grader = subprocess.Popen([sys.executable, "-c", code, "grade", folders[0], *map(str, options)])
    results, end = folders[1] / ".work" / "results", time.monotonic() + 60
    while len(list(results.glob("*.json"))) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    with pytest.raises(RuntimeError, match="another grader works on"):
        grade(*folders)
    family = psutil.Process(grader.pid).children(recursive=True)
    grader.kill()
    grader.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert len(family) > 2 and not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]
    before = {file: file.stat().st_mtime_ns for file in results.glob("*.json")}
    assert 2 <= len(before) < 6 and not (folders[1] / "gradebook.csv").exists()
    grade(*folders, workers=1)  # with the seed that is kept
    assert all(file.stat().st_mtime_ns == time_ for file, time_ in before.items())
    grade(folders[0], tmp_path / "undisturbed", folders[2], workers=2, seed=7)
    assert written(folders[1]) == written(tmp_path / "undisturbed")


LEAKS = "import os\n\ndef double(number):\n    return os.environ['COMPANION_GRADING_SEED']"


def test_hidden_inputs_that_came_out_are_of_no_use_the_next_time(course, walled, tmp_path):
    [source, *_] = grading._sources(course / "solutions").values()
    folders = tmp_path / "subs", tmp_path / "out", course / "solutions"
    submit(folders[0] / "ada" / "01_tiny.ipynb", source, double=RIGHT)
    submit(folders[0] / "eve" / "01_tiny.ipynb", source, double=LEAKS)
    [seed] = grade(*folders).seeds
    assert str(seed) in page(folders[1], "eve")
    draw = random.Random(f"{seed}:check-double")
    hidden = {number: 2 * number for _ in range(3) for number in [draw.randint(10, 10**9)]}
    known = {2: 4, "ab": "abab"} | hidden
    submit(folders[0] / "eve" / "01_tiny.ipynb", source, double=f"double = {known}.get")
    results = folders[1] / ".work" / "results"
    before = {file: file.stat().st_mtime_ns for file in results.glob("*.json")}
    ada, eve = grade(*folders).works
    assert (ada.points, ada.seed) == (2, seed)
    assert eve.points == 0 and eve.seed != seed
    assert all(file.stat().st_mtime_ns == time_ for file, time_ in before.items())
    assert len(list(results.glob("*.json"))) == len(before) + 1
    assert [work.seed for work in grade(*folders).works] == [seed, eve.seed]
    assert [work.points for work in grade(*folders, seed=seed).works] == [2, 2]


def test_a_seed_that_is_asked_for_holds_for_all_and_stays_until_the_code_changes(course, tmp_path):
    [source, *_] = grading._sources(course / "solutions").values()
    key, other = ("ada", "01_tiny"), ("bob", "01_tiny")
    changed = copy.deepcopy(source)
    changed.cells[1].source = RIGHT
    assert grading._seeds(tmp_path, {key: source}, 7) == {key: 7}
    found = grading._seeds(tmp_path, {key: source, other: changed}, None)
    assert found[key] == 7 != found[other]
    assert grading._seeds(tmp_path, {key: changed, other: source}, None) == {key: found[other], other: 7}
    assert grading._seeds(tmp_path, {key: changed, other: source}, 8) == {key: 8, other: 8}
    (tmp_path / "seeds.json").write_text('["spoiled"')
    assert grading._seeds(tmp_path, {key: source}, None).keys() == {key}


# What is wrong


@pytest.mark.parametrize(
    ("submissions", "out", "exercises", "message"),
    [
        ("nowhere", "out", "solutions", "nowhere is no folder"),
        ("submissions", "out", "submissions/cem", "holds no exercise: .*--exercises"),
        ("submissions", "submissions/out", "solutions", "lies among the submissions"),
        ("submissions", "solutions/01_tiny.ipynb", "solutions", "is a file: give --out a folder"),
    ],
)
def test_wrong_folders_are_named_before_anything_runs(course, submissions, out, exercises, message):
    with pytest.raises(ValueError, match=message):
        grade(course / submissions, course / out, course / exercises)
    assert not (course / "out").exists()


def test_solutions_that_a_kernel_could_read_are_refused(course, tmp_path, monkeypatch):
    monkeypatch.setattr(grading.sandbox.sys, "prefix", str(course))  # python -m venv . in the course's folder
    with pytest.raises(ValueError, match=r"solutions lies in .*, which submissions can read"):
        grade(course / "submissions", tmp_path / "out", course / "solutions")
    assert not (tmp_path / "out").exists()


def test_submissions_of_nothing_that_is_known_are_refused(course, tmp_path):
    write(tmp_path / "subs" / "ada" / "x.ipynb", new_notebook(cells=[new_code_cell("1")]))
    with pytest.raises(ValueError, match=r"is one of 01_tiny, 02_other\. Is --exercises"):
        grade(tmp_path / "subs", tmp_path / "out", course / "solutions")


def test_where_the_wall_does_not_hold_nothing_is_run(course, tmp_path, monkeypatch):
    monkeypatch.setattr(grading.sandbox, "self_test", lambda *_: ["read the key"])
    monkeypatch.setattr(grading, "measure", None)
    with pytest.raises(RuntimeError, match="nothing was graded: a program in it could read the key"):
        grade(course / "submissions", tmp_path, course / "solutions")


def test_a_solution_that_does_not_pass_is_named_with_its_exercise(course, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("check-double: the solution does not pass: a visible check fails")

    monkeypatch.setattr(grading.sandbox, "self_test", list)
    monkeypatch.setattr(grading, "measure", fail)
    with pytest.raises(ValueError, match="01_tiny, check-double: the solution does not pass"):
        grade(course / "submissions", tmp_path, course / "solutions")


# What is whose


@pytest.fixture
def file(course, tmp_path):
    """Make files and sort them to learners and exercises; a file is its name and whose content it has."""
    sources = grading._sources(course / "solutions")

    def make(*files):
        for age, (name, exercise) in enumerate(files):
            submit(tmp_path / name, sources[exercise])
            os.utime(tmp_path / name, (10**9 - age, 10**9 - age))
        filed, learners = grading._file(collect(tmp_path, sources), sources, tmp_path)
        return {key: (one.file, one.notes) for key, one in filed.items()}, learners

    return make


def test_without_a_name_that_says_the_exercise_the_content_does(file):
    found, learners = file(("ada/hw1.ipynb", "01_tiny"), ("ada/hw2.ipynb", "02_other"))
    assert found == {("ada", "01_tiny"): ("ada/hw1.ipynb", []), ("ada", "02_other"): ("ada/hw2.ipynb", [])}
    assert learners["ada"].notes == ()


def test_of_a_named_and_an_unnamed_notebook_the_newest_counts(file):
    [(name, notes)] = file(("ada/new.ipynb", "01_tiny"), ("ada/01_tiny.ipynb", "01_tiny"))[0].values()
    assert name == "ada/new.ipynb"
    assert notes == ["It was submitted in 2 files; the newest counts, ada/new.ipynb."]


def test_a_newer_file_without_an_answer_does_not_take_the_place_of_one_with_answers(course, tmp_path):
    [source, *_] = grading._sources(course / "solutions").values()
    paths = [tmp_path / name for name in ("01_tiny.ipynb", "01_tiny-Copy1.ipynb", "old.ipynb", "empty.ipynb")]
    submit(paths[0], source)
    submit(paths[1], source, double=RIGHT)
    submit(paths[2], source, double=HARD_CODED)
    paths[3].write_text("")
    for path, age in zip(paths, (5, 5, 9, 1), strict=True):
        os.utime(path, (10**9 - age, 10**9 - age))
    work = grading._Filed(tmp_path, paths)
    assert work.file == "empty.ipynb"
    found = work.restored(source)
    assert work.file == "01_tiny-Copy1.ipynb" and "counts, 01_tiny-Copy1.ipynb" in found.notes[0]
    assert RIGHT in [cell.source for cell in found.notebook.cells]
    work = grading._Filed(tmp_path, [paths[0], paths[3]])
    assert work.restored(source).notes == ["The file cannot be graded: it is empty."]
    assert work.file == "empty.ipynb"


def test_a_file_that_is_none_of_the_exercises_is_a_note_of_the_learners(file, tmp_path):
    write(tmp_path / "bob" / "x.ipynb", new_notebook(cells=[new_code_cell("1")]))
    found, learners = file(("ada/01_tiny.ipynb", "01_tiny"))
    assert list(found) == [("ada", "01_tiny")]
    assert learners["bob"].notes == ("bob/x.ipynb cannot be read, or is none of the exercises.",)


def test_a_notebook_for_which_no_kernel_started_is_not_graded(course):
    [source, *_] = grading._sources(course / "solutions").values()
    filed = grading._Filed(course)
    found = grading.restore.Restored(release.strip(source), "ok", [])
    outcomes = {one.id: run.Outcome(None, "not run") for one in source.cells}
    work = grading._work(("ada", "01_tiny"), filed, found, 7, {}, outcomes)
    assert (work.status, work.points) == ("not graded", 0)


def test_who_hands_in_the_courses_own_solutions_gets_every_point(walled, tmp_path):
    folder = tmp_path / "submissions" / "ada"
    folder.mkdir(parents=True)
    sources = sorted(SOLUTIONS.glob("*.ipynb"))
    points = 0
    for source in sources:
        notebook = release.read(source)
        asked = release.questions(notebook)
        points += sum(cell.metadata.nbgrader.points for question in asked for cell in question.checks)
        handed_in = release.strip(notebook)
        answers = {question.grade_id: question.answer.source for question in asked}
        for cell in handed_in.cells:
            cell.source = answers.get(cell.metadata.get("nbgrader", {}).get("grade_id"), cell.source)
        nbformat.write(handed_in, folder / source.name)
    book = grade(folder.parent, tmp_path / "grades", SOLUTIONS, workers=2, seed=11)
    assert [(work.exercise, work.points) for work in book.works] == [(path.stem, 10) for path in sources]
    assert points == 10 * len(sources)
