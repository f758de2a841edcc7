"""What grading costs, measured side by side in one run; nothing is asserted.

    python tests/benchmarks/grading.py [--submissions 20] [--many 500] [--nbgrader PYTHON] [--otter PYTHON]

--nbgrader and --otter are the Pythons of environments that hold nbgrader or otter-grader beside this package
and its dependencies. All grade the same submissions of one of the course's exercises: right, wrong and
unsolved answers, no two alike, with the hidden inputs. nbgrader and otter do one after the other, and know no
other way on one machine. --many submissions of a small exercise, one in ten of them empty, foreign or
hostile, show whether the grader gets slower or larger as it goes; 0 leaves them out. Run it on a machine that
does nothing else.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import nbformat
import numpy as np
import psutil
from nbformat.v4 import new_code_cell, new_notebook, new_raw_cell

from companion.grading import release

SOLUTIONS = Path(__file__).parents[2] / "exercises" / "solutions"
SEED, TIMEOUT, MIB = 7, 4, 1 << 20
GRADE = """
import json, sys
from companion.grading.grade import grade
submissions, out, exercises, options = sys.argv[1:]
if __name__ == "__main__":
    book = grade(submissions, out, exercises, **json.loads(options))
    print(json.dumps([sum(work.points for work in book.works), len(book.works)]))
"""
FLAGS = {"grade": False, "solution": False, "locked": True, "task": False, "schema_version": 3}
HOSTILE = [
    "import os\nos.kill(os.getpid(), 9)",
    "import os\nwhile True: os.fork()",
    "while True: print('x' * 10**6)",
]


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--submissions", type=int, default=20)
    parser.add_argument("--many", type=int, default=500)
    parser.add_argument(
        "--exercise", default="03_pretraining", choices=[p.stem for p in SOLUTIONS.glob("*.ipynb")]
    )
    parser.add_argument("--nbgrader", default=os.environ.get("NBGRADER_PYTHON"))
    parser.add_argument("--otter", default=os.environ.get("OTTER_PYTHON"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.submissions:
            compare(Path(folder), given)
        if given.many:
            drift(Path(folder) / "many", given.many)


def compare(folder: Path, given: argparse.Namespace) -> None:
    """Seconds a submission, and memory, on the same submissions."""
    source = release.read(SOLUTIONS / f"{given.exercise}.ipynb")
    (folder / "solutions").mkdir()
    shutil.copy(SOLUTIONS / f"{given.exercise}.ipynb", folder / "solutions")
    answers = list(submitted(source, given.submissions))
    for number, notebook in enumerate(answers):
        write(
            folder / "submissions" / f"learner-{number:03}" / given.exercise / f"{given.exercise}.ipynb",
            notebook,
        )
    places = [folder / "submissions", folder / "out", folder / "solutions"]
    seconds = {}
    for workers in (1, 2):
        shutil.rmtree(places[1], ignore_errors=True)
        seconds[f"companion, {workers} at a time"], peak, _ = grade(*places, workers=workers)
    grader, kernels = (peak[name] / MIB for name in ("grader", "kernels"))
    print(f"memory with two workers: {grader:.0f} MiB the grader, {kernels:.0f} MiB its kernels")
    if given.nbgrader:
        seconds["nbgrader autograde"] = nbgrader(given.nbgrader, folder / "nbgrader", places, given.exercise)
    if given.otter:
        seconds["otter run"] = otter(given.otter, folder / "otter", source, answers)
    for name, taken in seconds.items():
        wall, used = taken / given.submissions
        print(f"{name:24} {wall:6.2f} s a submission, {used:6.2f} s of the processor's", flush=True)
        if given.nbgrader:
            print(
                "{:24} {:6.2f} of nbgrader's     {:6.2f}".format("", *taken / seconds["nbgrader autograde"])
            )


def clock() -> np.ndarray:
    """Seconds now: of the clock, and of the processor, in processes that this one started and that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return np.array([time.perf_counter(), used.ru_utime + used.ru_stime])


def submitted(source: nbformat.NotebookNode, number: int):
    """Learners' notebooks: half of the answers are right, the rest wrong or missing; none is like another."""
    questions = release.questions(source)
    for learner in range(number):
        answers = {}
        for place, question in enumerate(questions):
            options = (
                [question.answer.source] * 3
                + question.wrong_answers[:2]
                + [release.unmark(question.answer.source)]
            )
            code = options[(learner + place) % len(options)]
            lines = [line for line in code.split("\n") if not line.strip().startswith("### ")]
            answers[question.grade_id] = "\n".join([*lines, f"# learner {learner}"])
        made = release.strip(source)
        for cell in made.cells:
            cell.source = answers.get(cell.id, cell.source)
        yield made


def write(file: Path, notebook: nbformat.NotebookNode) -> None:
    """A notebook in its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, file)


def grade(submissions: Path, out: Path, exercises: Path, **options) -> tuple[np.ndarray, dict, list]:
    """Seconds as `clock` counts them, the most memory at a time, in bytes, and the grader's own over time."""
    options = json.dumps({"seed": SEED, **options})
    begun = clock()
    process = psutil.Popen([sys.executable, "-c", GRADE, submissions, out, exercises, options])
    peak, over_time = {"grader": 0, "kernels": 0}, []

    def look() -> None:
        while process.poll() is None:
            now = memory(process)
            over_time.append(now["grader"])
            peak.update({name: max(peak[name], now[name]) for name in peak})
            time.sleep(0.5)

    watcher = threading.Thread(target=look)
    watcher.start()
    if process.wait():
        raise SystemExit("the grader failed")
    taken = clock() - begun
    watcher.join()
    return taken, peak, over_time


def memory(process: psutil.Process) -> dict[str, int]:
    """Memory now, with shared pages counted once: of the grader's own processes, and of the kernels."""
    found = {"grader": 0, "kernels": 0}
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.Error:
        return found
    for one in family:
        try:
            words = " ".join(one.cmdline())
            kernel = "ipykernel_launcher" in words or "bwrap" in words
            found["kernels" if kernel else "grader"] += one.memory_full_info().pss
        except (psutil.Error, AttributeError):
            pass
    return found


def run(python: str, *words, cwd: Path) -> None:
    """A command of another environment, and what it said where it failed."""
    env = os.environ | {"PATH": f"{Path(python).parent}:{os.environ['PATH']}"}
    done = subprocess.run([python, *map(str, words)], cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}: {(done.stdout + done.stderr)[-3000:]}")


def nbgrader(python: str, folder: Path, places: list[Path], exercise: str) -> np.ndarray:
    """Seconds that `nbgrader autograde` takes for all."""
    (folder / "source" / exercise).mkdir(parents=True)
    shutil.copy(places[2] / f"{exercise}.ipynb", folder / "source" / exercise)
    shutil.copytree(places[0], folder / "submitted")
    run(python, "-m", "nbgrader", "generate_assignment", exercise, "--create", cwd=folder)
    begun = clock()
    run(python, "-m", "nbgrader", "autograde", exercise, "--create", cwd=folder)
    return clock() - begun


def otter(python: str, folder: Path, source: nbformat.NotebookNode, answers: list) -> np.ndarray:
    """Seconds that `otter run` takes for all, in otter's own format of the same exercise."""
    config = "# ASSIGNMENT CONFIG\nfiles: []\nrun_tests: false\nexport_cell: false\ncheck_all_cell: false"
    cells = [new_raw_cell(config)]
    for cell in source.cells:
        if "live" in cell.metadata.get("tags", []) or cell.cell_type != "code":
            continue
        if release.is_answer(cell):
            text = cell.source.replace("### BEGIN", "# BEGIN").replace("### END", "# END")
            name = cell.metadata.nbgrader.grade_id
            cells += [new_raw_cell(f"# BEGIN QUESTION\nname: {name}"), new_raw_cell("# BEGIN SOLUTION")]
            cells += [new_code_cell(text), new_raw_cell("# END SOLUTION"), new_raw_cell("# BEGIN TESTS")]
        elif release.is_check(cell):
            cells += [new_code_cell(cell.source), new_raw_cell("# END TESTS"), new_raw_cell("# END QUESTION")]
        else:
            cells.append(new_code_cell(cell.source))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    made = new_notebook(cells=cells, metadata={"kernelspec": kernel})
    write(folder / "exercise.ipynb", made)
    run(python, "-m", "otter", "assign", "exercise.ipynb", "dist", "--no-run-tests", cwd=folder)
    [autograder] = (folder / "dist" / "autograder").glob("*.zip")
    given = nbformat.read(folder / "dist" / "student" / "exercise.ipynb", 4)
    stubs = [
        place for place, cell in enumerate(given.cells) if cell.cell_type == "code" and "..." in cell.source
    ]
    for number, answer in enumerate(answers):
        codes = [cell.source for cell in answer.cells if release.is_answer(cell)]
        for place, code in zip(stubs, codes, strict=True):
            given.cells[place].source = code
        write(folder / f"learner-{number:03}" / "exercise.ipynb", given)
    begun = clock()
    for number in range(len(answers)):
        here = folder / f"learner-{number:03}"
        run(python, "-m", "otter", "run", "-a", autograder, "-o", here, here / "exercise.ipynb", cwd=here)
    return clock() - begun


def drift(folder: Path, number: int) -> None:
    """Whether the grader gets slower or larger over many submissions."""

    def cell(source: str, name: str, **flags) -> nbformat.NotebookNode:
        return new_code_cell(source, id=name, metadata={"nbgrader": FLAGS | flags | {"grade_id": name}})

    solution = "def double(n):\n    ### BEGIN SOLUTION\n    return 2 * n\n    ### END SOLUTION"
    check = 'with Check("double", points=1) as check:\n    check.equal("double(2)", double(2), 4)\n'
    check += '    ### BEGIN HIDDEN TESTS\n    check.record("drawn", double(drawn("d").random()))\n'
    check += "    ### END HIDDEN TESTS"
    cells = [
        cell("from companion.checks import Check, drawn", "setup"),
        cell(solution, "double", solution=True, locked=False),
        cell(check, "check-double", grade=True, points=1),
    ]
    write(folder / "solutions" / "01_small.ipynb", new_notebook(cells=cells))
    released = release.strip(release.read(folder / "solutions" / "01_small.ipynb"))
    expected = 0
    for learner in range(number):
        file = folder / "submissions" / f"learner {learner:03}" / "01_small" / "01_small.ipynb"
        answer = f"def double(n):\n    return n * 2  # {learner}"
        kind = learner % 30
        if kind == 3:
            answer = HOSTILE[learner // 30 % len(HOSTILE)]
        expected += kind not in (3, 13, 23)
        released.cells[1].source = answer
        write(file, new_notebook(cells=[new_code_cell("1 + 1")]) if kind == 13 else released)
        if kind == 23:
            file.write_text("")
    taken, _, over_time = grade(
        folder / "submissions", folder / "out", folder / "solutions", workers=2, timeout=TIMEOUT
    )
    works = json.loads((folder / "out" / "checks.json").read_text())["works"]
    earned = sum(work["points"] for work in works)
    ends = sorted(file.stat().st_mtime for file in (folder / "out" / ".work" / "results").glob("*.json"))
    part = len(ends) // 5
    first, last = ends[part] - ends[0], ends[-1] - ends[-1 - part]
    print(
        f"{number} submissions: {taken[0] / number:.2f} s each; {earned:g} points of {expected} that were due"
    )
    print(f"throughput of the last fifth / of the first: {first / last:.2f}")
    fifth = len(over_time) // 5
    means = [sum(part) / len(part) / MIB for part in (over_time[fifth : 2 * fifth], over_time[-fifth:])]
    print(
        f"the grader's memory: {means[0]:.0f} MiB in the second fifth of the time, {means[1]:.0f} in the last"
    )


if __name__ == "__main__":
    main()
