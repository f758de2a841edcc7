"""Learners' notebooks, honest and hostile, run in one batch: each earns what its code earns, and no more."""

import ctypes
import os
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from xml.etree import ElementTree

import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from companion.checks import MIME
from companion.grading import run as running
from companion.grading import sandbox
from companion.grading.backcheck import agrees, result
from companion.grading.release import is_check
from companion.grading.run import Outcome, Replay, run, solve

pytestmark = pytest.mark.slow


PR_SET_CHILD_SUBREAPER = 36
SEED, TIMEOUT = 7, 12  # seconds, of which a slow and busy machine takes six to import openai and ask in vain
FLOOD = ("flood", "timeout")  # which of the two is met first depends on the machine's speed
SETUP = "from companion.checks import Check, drawn"
CHECK = """draw = drawn("check-{0}")
with Check("{0}", points=2) as check:
    check.equal("{0}(1)", {0}(1), {1})
    check.record("hidden", [{0}(draw.randint(10, 10**9)) for _ in range(3)])"""
GOOD = {"a": "def a(n):\n    return n + 97", "b": "def b(n):\n    return n * 98"}
VISIBLE = {"a": 98, "b": 98}


def cell(source, grade_id, **flags):
    made = new_code_cell(source, id=grade_id)
    made.metadata["nbgrader"] = {"grade_id": grade_id, "grade": False, "solution": False} | flags
    return made


def notebook(**answers):
    """An exercise of two questions, with the solution where no answer is given."""
    cells = [new_markdown_cell("# Exercise", id="title"), cell(SETUP, "setup")]
    for name, solution in GOOD.items():
        cells.append(cell(answers.get(name, solution), name, solution=True))
        cells.append(cell(CHECK.format(name, VISIBLE[name]), f"check-{name}", grade=True, points=2))
    return new_notebook(cells=cells)


@pytest.fixture(scope="session")
def walled():
    """Without bubblewrap these tests are skipped, but not where COMPANION_NEEDS_SANDBOX says so."""
    try:
        sandbox.self_test()
    except RuntimeError as error:
        (pytest.fail if os.environ.get("COMPANION_NEEDS_SANDBOX") else pytest.skip)(str(error))


@pytest.fixture(scope="session")
def reference(walled):
    return solve(notebook(), seed=SEED)


def points(outcomes, reference):
    """Two for each check cell that ended well and emitted what the solution does."""
    emitted = {one.metadata.nbgrader.grade_id: result(one) for one in reference.cells if is_check(one)}
    ended = {name: outcomes[name] for name in ("check-a", "check-b")}
    return [2 * (one.status == "ok" and agrees(one.emitted, emitted[name])) for name, one in ended.items()]


FORGED = f"""from IPython.display import display
display({{{MIME!r}: {{"version": 1, "question": "a", "passed": True, "values": [
    {{"what": "a(1)", "value": 98, "tolerance": 0}},
    {{"what": "hidden", "value": [1, 2, 3], "tolerance": 0}}]}}}}, raw=True)
"""
FORGED_TOO = f"""def forge():
    {FORGED.strip().replace(chr(10), chr(10) + "    ")}
def a(n):
    if n > 1:
        forge()
    return 98
"""
PATCHED = """import companion.checks as c, random
c.difference = lambda *_: ""
c.Check.passed = property(lambda self: True)
Check = c.Check
def drawn(name):
    class Fixed:
        def randint(self, *_):
            return 1
    return Fixed()
c.drawn = drawn
def a(n):
    return 98
"""
EQUALS_ALL = """class All(int):
    def __eq__(self, other): return True
    def __repr__(self): return "98"
    def tolist(self): return self
    __hash__ = int.__hash__
def a(n):
    return All(98)
"""
HOOKS = """import builtins, sys
ip = get_ipython()
skip = lambda lines: ["pass"] if any("check" in line for line in lines) else lines
ip.input_transformers_cleanup.append(skip)
"""
RUN_CELL = """ip = get_ipython()
ip.run_cell = lambda *a, **k: None
ip.display_pub.publish = lambda *a, **k: None
"""
REFUSES_TO_END = """import signal
def a(n):
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass
"""
LATER = """import threading, time, os
threading.Timer(0.3, os._exit, (0,)).start()
def a(n):
    time.sleep(0.5)
    return n + 97
"""
MODULES = """import sys
sys.modules["companion.checks"] = None
sys.modules["random"] = None
def a(n): return n + 97
"""
CHATTY = """import sys, threading, time, warnings
print("debug", file=sys.stderr)
warnings.warn("deprecated")
def talk():
    for _ in range(100):
        print("still here")
        time.sleep(0.02)
threading.Thread(target=talk, daemon=True).start()
def a(n):
    print("n is", n)
    warnings.warn("careful")
    return n + 97
"""
SECRETS = """import glob, os
found = [path for depth in range(5) for path in glob.glob("/*" * depth + "/*.ipynb")]
found += [name for name in os.environ if "KEY" in name and os.environ[name] != "none"]
def a(n):
    return n + 97 + len(found)
"""

# Honest, and clumsy.
HIDES = """from numpy import *
list = sum = len = [1, 2]
max, range, zip, isinstance = 0, "a-z", None, False
def a(n):
    return n + 97
"""
CLEARS = """import os, sys
os.environ.clear()
sys.stdout.close()
sys.settrace(lambda *_: None)
def a(n):
    return n + 97
"""
TOOLS = """%pip install colorama
%matplotlib inline
%pdb on
import asyncio, logging, sys, warnings
import matplotlib.pyplot as plt
import numpy as np
warnings.simplefilter("error")
logging.basicConfig(level="DEBUG")
plt.plot([1, 2])
plt.show()
async def slow(n):
    await asyncio.sleep(0)
    return n
await slow(1)
def a(n):
    logging.debug("a of %s", n)
    plt.plot([n]); plt.show(); plt.close("all")
    return np.int64(n) + 97
"""
RAISES_LATER = """%%time
def a(n):
    return n + 97
assert a(1) == 99, "my own test is wrong"
"""
ASKS = """import companion
client = companion.client()
def a(n):
    return n + 97
print(a(int(input("a number, please: "))))
"""
# What works on the learner's machine, and not here.
ELSEWHERE = """from google.colab import drive
drive.mount("/content/drive")
SUMMAND = 97
number = int(input("a number, please: "))
def a(n):
    return n + SUMMAND
print(a(number))
"""
ASKS_THE_MODEL = """import companion
client = companion.client().with_options(max_retries=0)
def a(n):
    return n + 97
messages = [{"role": "user", "content": "Hi"}]
client.chat.completions.create(model="smollm2-135m-instruct", messages=messages)
"""
# Hostile.
DEEP = """from IPython.display import display
def nested(levels):
    return 0 if not levels else {"values": [nested(levels - 1)]}
def a(n):
    display({MIME: nested(220)}, raw=True)
    return 98
""".replace("MIME", repr(MIME))
WIDE = f"""from IPython.display import display
def a(n):
    display({{{MIME!r}: {{"values": [[]] * 800_000}}}}, raw=True)
    return 98
"""
BUILTINS = """import builtins, json
builtins.isinstance = lambda *_: True
builtins.len = lambda _: 1
json.dumps = lambda *_, **__: "{}"
def a(n): return 98
"""
MIMEBUNDLE = f"""from companion import checks
def bundle(self, include=None, exclude=None):
    hidden = [{{"what": "hidden", "value": [1, 2, 3], "tolerance": 1e99}}]
    return {{{MIME!r}: {{"version": 1, "question": "a", "passed": True, "values": self.values + hidden}}}}
checks.Check._repr_mimebundle_ = bundle
checks.Check.record = lambda *_, **__: None
def a(n): return 98
"""
FRAMES = """import sys
def a(n):
    frame = sys._getframe()
    while frame:
        for values in (frame.f_locals, frame.f_globals):
            if isinstance(values.get("expected"), int):
                return values["expected"]
        frame = frame.f_back
    return 98
"""
REPLIES = """kernel = get_ipython().kernel
send = kernel.session.send
def sends(stream, kind, content=None, *rest, **more):
    if kind == "execute_reply":
        content = {"status": ["ok"], "ename": [[[[1]]]], "evalue": {"a": 1}}
    return send(stream, kind, content, *rest, **more)
kernel.session.send = sends
def a(n): return n + 97
"""
SEED_AGAIN = """import os
os.environ["COMPANION_GRADING_SEED"] = ""
def a(n): return {1: 98}.get(n, 1)
"""
STOPS = """import os, signal
def a(n):
    os.kill(os.getpid(), signal.SIGSTOP)
    return n + 97
"""
PACKAGE = """import companion, glob, os, subprocess, sys
folder = os.path.dirname(companion.__file__)
for path in glob.glob(folder + "/**/*.py", recursive=True)[:5]:
    try:
        open(path, "a").write("raise SystemExit")
    except OSError:
        pass
subprocess.run([sys.executable, "-c", "import os; os.kill(-1, 9)"])
def a(n): return n + 97
"""
FAMILY = """import os, time
for _ in range(6):
    if os.fork() == 0:
        held = bytearray(os.urandom(1 << 20)) * 1000
        time.sleep(60)
time.sleep(60)
"""

# An answer to question a, the points of a and of b, and how the cells ended that did not end well.
SUBMISSIONS = {
    "honest": (GOOD["a"], [2, 2], {}),
    "other way": ("a = lambda n: sum([n, 97])", [2, 2], {}),
    "chatty": (CHATTY, [2, 2], {}),
    "wrong": ("def a(n):\n    return 98", [0, 2], {}),
    "unsolved": ("def a(n):\n    raise NotImplementedError", [0, 2], {}),
    "syntax": ("def a(n)\n    return 98", [0, 2], {"a": "error"}),
    "exit": ("def a(n):\n    return n + 97\nexit()", [2, 2], {}),
    "sys.exit": ("import sys\ndef a(n):\n    sys.exit(0)", [0, 2], {}),
    "input": ("def a(n):\n    return int(input())", [0, 2], {}),
    "recursion": ("def a(n):\n    return a(n) + 1", [0, 2], {}),
    "endless": ("def a(n):\n    while True: pass", [0, 2], {"check-a": "timeout"}),
    "refuses to end": (REFUSES_TO_END, [0, 2], {"check-a": "timeout"}),
    "endless cell": ("import itertools\nfor _ in itertools.count(): pass", [0, 2], {"a": "timeout"}),
    "killed": ("import os\nos.kill(os.getpid(), 9)", [0, 2], {"a": "died"}),
    "killed in the check": ("import os\ndef a(n): os._exit(3)", [0, 2], {"check-a": "died"}),
    "killed later": (LATER, [0, 2], {"a": "died"}),
    "crash": ("import ctypes\ndef a(n): ctypes.string_at(0)", [0, 2], {"check-a": "died"}),
    "deep crash": ("exec('(' * 10**6)\ndef a(n): return n + 97", [2, 2], {"a": "error"}),
    "flood": ("def a(n):\n    while True: print('x' * 1000, flush=True)", [0, 2], {"check-a": FLOOD}),
    "one large message": (
        f"from IPython.display import display\ndef a(n): display({{{MIME!r}: 'x' * (70 << 20)}}, raw=True)",
        [0, 2],
        {"check-a": FLOOD},
    ),
    "forks": ("import os\ndef a(n):\n    while True: os.fork()", [0, 2], {"check-a": "died"}),
    "memory": ("def a(n): return len(bytearray(10**11))", [0, 2], {}),
    "forged": (FORGED + "def a(n): return 98", [0, 2], {}),
    "forged in the check": (FORGED_TOO, [0, 2], {}),
    "patched": (PATCHED, [0, 0], {}),
    "equals all": (EQUALS_ALL, [0, 2], {}),
    "transformer": (HOOKS, [0, 0], {}),
    "run_cell": (RUN_CELL, [0, 0], dict.fromkeys(["check-a", "b", "check-b"], "timeout")),
    "modules": (MODULES, [2, 2], {}),
    "finds no notebook": (SECRETS, [2, 2], {}),
    "hides builtins": (HIDES, [2, 2], {}),
    "own test fails": (RAISES_LATER, [2, 2], {"a": "error"}),
    "asks the learner": (ASKS, [2, 2], {"a": "error"}),
    "works elsewhere": (ELSEWHERE, [2, 2], {"a": "error"}),
    "asks the model": (ASKS_THE_MODEL, [2, 2], {"a": "error"}),
    "prints much": ("def a(n):\n    print('x' * 1_000_000)\n    return n + 97", [2, 2], {}),
    "shadows the check": ("check = draw = values = None\ndef a(n): return n + 97", [2, 2], {}),
    "emits deep": (DEEP, [0, 2], {}),
    "emits wide": (WIDE, [0, 2], {}),
    "builtins": (BUILTINS, [0, 2], {"a": ("timeout", "died")}),
    "mimebundle": (MIMEBUNDLE, [0, 0], {}),
    "frames": (FRAMES, [0, 2], {}),
    "forges replies": (REPLIES, [0, 2], {"a": "timeout"}),
    "another seed": (SEED_AGAIN, [0, 2], {}),
    "clears its environment": (CLEARS, [2, 2], {}),
    "stops itself": (STOPS, [0, 2], {"check-a": "timeout"}),
    "kills all that it sees": (PACKAGE, [0, 2], {"a": "died"}),
    "memory in parts": (FAMILY, [0, 2], {"a": ("died", "timeout")}),
    "shuts down": ("get_ipython().kernel.do_shutdown(False)\ndef a(n): return n + 97", [2, 2], {}),
    "long error": ("def a(n): raise ValueError('x' * (30 << 20))", [0, 2], {}),
    "markers": ("# NBVAL_SKIP\n# NBVAL_IGNORE_OUTPUT\ndef a(n): return 98", [0, 2], {}),
    "surrogates": (
        "def a(n): raise ValueError('\\ud800' * 10)\nraise KeyError('\\ud800')",
        [0, 2],
        {"a": "error"},
    ),
}


@pytest.fixture(scope="session")
def batch(reference, tmp_path_factory):
    """All submissions, graded at once; the folder, the outcomes, and processes that were left."""
    folder = tmp_path_factory.mktemp("batch")
    # A process whose parent dies becomes this one's child: nobody else's kernels are taken for the batch's.
    adopt = ctypes.CDLL(None).prctl
    assert adopt(PR_SET_CHILD_SUBREAPER, 1) == 0
    before = set(psutil.Process().children(recursive=True))
    notebooks = {name: notebook(a=answer) for name, (answer, _, _) in SUBMISSIONS.items()}
    outcomes = run(
        notebooks, dict.fromkeys(notebooks, reference), seed=SEED, folder=folder, workers=2, timeout=TIMEOUT
    )
    _, left = psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, timeout=30)
    adopt(PR_SET_CHILD_SUBREAPER, 0)
    return folder, notebooks, outcomes, left


@pytest.mark.parametrize("name", SUBMISSIONS)
def test_a_submission_earns_what_its_code_earns_whatever_the_others_do(name, batch, reference):
    _, expected, ends = SUBMISSIONS[name]
    outcomes = batch[2][name]
    assert points(outcomes, reference) == expected, outcomes
    bad = {cell: one.status for cell, one in outcomes.items() if one.status != "ok"}
    assert bad.keys() == ends.keys()
    assert all(status in ends[cell] for cell, status in bad.items())
    assert all(one.note for one in outcomes.values() if one.status != "ok")


def test_no_kernel_is_left_when_a_batch_is_done(batch):
    assert [one.as_dict(["name", "cmdline", "status"]) for one in batch[3]] == []


def test_the_folder_holds_the_results_and_a_case_for_each_cell_and_nothing_else(batch):
    folder, notebooks, _, _ = batch
    assert sorted(path.name for path in folder.iterdir()) == ["junit.xml", "results"]
    assert len(list((folder / "results").iterdir())) == len(notebooks)
    cases = ElementTree.parse(folder / "junit.xml").findall(".//testcase")
    assert len(cases) == 5 * len(notebooks)
    passed = [one.get("name") for one in cases if not [part for part in one if part.tag != "properties"]]
    earned = [sum(pair) // 2 for _, pair, _ in SUBMISSIONS.values()]
    assert sum(name.startswith("check-") for name in passed) == sum(earned)


def test_no_case_shows_a_hidden_value_or_a_learners_word(batch, reference):
    text = (batch[0] / "junit.xml").read_text()
    hidden = [value["value"] for one in reference.cells if is_check(one) for value in result(one)["values"]]
    for value in (str(number) for values in hidden if isinstance(values, list) for number in values):
        assert value not in text
    assert "def a" not in text and "deprecated" not in text


def test_a_second_run_reads_what_is_there_and_runs_what_is_missing(batch, reference, monkeypatch):
    folder, notebooks, outcomes, _ = batch
    ran = []

    def session(todo, results, *_, **__):
        ran.append(len(todo))

    monkeypatch.setattr(running, "_session", session)
    options = {"seed": SEED, "folder": folder, "timeout": TIMEOUT, "workers": 2}
    references = dict.fromkeys(notebooks, reference)
    assert run(notebooks, references, **options) == outcomes
    assert ran == []
    honest = {"x": notebooks["honest"]}
    run(honest, {"x": reference}, **options | {"seed": SEED + 1})
    run({"x": notebook(a="def a(n): return 5")}, {"x": reference}, **options)
    assert ran == [1, 1, 1, 1]  # each is tried twice, since this session leaves no file


def test_a_result_that_is_cut_off_is_run_again(batch, reference, tmp_path):
    folder, notebooks, outcomes, _ = batch
    [file] = [file for file in (folder / "results").glob("*.json") if '"timeout"' not in file.read_text()][:1]
    whole = file.read_text()
    file.write_text(whole[:-20])
    (folder / "results" / "companion-left").mkdir()
    options = {"seed": SEED, "folder": folder, "timeout": TIMEOUT}
    again = run(notebooks, dict.fromkeys(notebooks, reference), **options)
    assert again == outcomes and file.read_text() == whole
    assert not (folder / "results" / "companion-left").exists()


def test_order_workers_and_machine_do_not_change_an_outcome(batch, reference, tmp_path):
    _, notebooks, outcomes, _ = batch
    names = ["wrong", "syntax", "honest"]
    some = {name: notebooks[name] for name in names}
    with ProcessPoolExecutor(2, get_context("spawn")) as executor:
        found = run(
            some,
            dict.fromkeys(some, reference),
            seed=SEED,
            folder=tmp_path,
            timeout=TIMEOUT,
            executor=executor,
        )
    assert list(found) == names
    assert found == {name: outcomes[name] for name in names}


def test_honest_work_with_installs_plots_logs_and_a_debugger_earns_its_points(reference, tmp_path):
    found = run({"x": notebook(a=TOOLS)}, {"x": reference}, seed=SEED, folder=tmp_path)
    assert points(found["x"], reference) == [2, 2]
    assert {one.status for one in found["x"].values()} == {"ok"}


def test_without_a_sandbox_an_honest_notebook_gets_the_same(reference, tmp_path):
    honest = {"honest": notebook(), "wrong": notebook(a="def a(n): return 98")}
    found = run(
        honest, dict.fromkeys(honest, reference), seed=SEED, folder=tmp_path, sandbox=False, timeout=TIMEOUT
    )
    assert [points(one, reference) for one in found.values()] == [[2, 2], [0, 2]]


def test_another_seed_draws_other_hidden_inputs(reference):
    other = solve(notebook(), seed=SEED + 1)
    assert result(other.cells[3])["values"][0] == result(reference.cells[3])["values"][0]
    assert result(other.cells[3])["values"][1] != result(reference.cells[3])["values"][1]


def test_a_solution_that_does_not_pass_is_refused_with_its_cell(walled):
    with pytest.raises(ValueError, match="check-a: the solution does not pass"):
        solve(notebook(a="def a(n): return 5"), seed=SEED)


def test_a_reference_that_lacks_a_check_cell_is_refused(tmp_path):
    with pytest.raises(ValueError, match="x: the reference has no result for check-a"):
        run({"x": notebook()}, {"x": notebook()}, seed=SEED, folder=tmp_path)


def test_a_sandbox_with_holes_grades_nothing(batch, reference, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "self_test", lambda *_: ["read the key"])
    with pytest.raises(RuntimeError, match="nothing was graded: a program in it could read the key"):
        run({"x": notebook()}, {"x": reference}, seed=SEED, folder=tmp_path)
    assert list((tmp_path / "results").iterdir()) == []


def test_a_notebook_that_no_kernel_starts_for_is_not_run_and_not_kept(reference, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "_session", lambda *_, **__: None)
    found = run({"x": notebook()}, {"x": reference}, seed=SEED, folder=tmp_path)
    assert {one.status for one in found["x"].values()} == {"not run"}


# Which cells are run again


class Script:
    """A kernel whose cells are their outcomes: a status, or `later:N` for a death N cells later."""

    def __init__(self, log, takes=0.0):
        self.log, self.takes, self.dead, self.fuse = log, takes, False, None

    def execute(self, code, timeout):
        self.log.append(code)
        if code == "timeout":
            time.sleep(self.takes)
        if self.fuse is not None:
            self.dead = True
            return Outcome(None, "died")
        if code.startswith("fuse"):
            self.fuse = code
        return Outcome(None, code.split()[0] if code.split()[0] in ("timeout", "error", "died") else "ok", "")

    def alive(self):
        return not self.dead

    def dies_within(self, seconds):
        return bool(self.fuse and seconds)

    def stop(self):
        self.log.append("stop")


def replayed(*cells, takes=0.0, timeout=10.0):
    log = []
    replay = Replay(cells, lambda: Script(log, takes), timeout)
    return [replay.outcome(number).status for number in range(len(cells))], log


def test_after_a_timeout_all_cells_that_had_ended_are_run_again_but_not_the_culprit():
    statuses, log = replayed("set up", "error a", "timeout", "b", "c")
    assert statuses == ["ok", "error", "timeout", "ok", "ok"]
    assert log == ["set up", "error a", "timeout", "stop", "set up", "error a", "b", "c"]


def test_a_kernel_that_dies_is_tried_once_more_before_the_cell_is_blamed():
    statuses, log = replayed("set up", "died", "b")
    assert statuses == ["ok", "died", "ok"]
    assert log.count("died") == 2


def test_a_cell_that_kills_the_kernel_later_is_found_and_left_out():
    statuses, log = replayed("set up", "fuse", "a", "b")
    assert statuses == ["ok", "ok", "ok", "ok"]
    assert log.count("fuse") == 2 and log[-2:] == ["a", "b"]


def test_a_notebook_has_its_time_and_what_comes_after_is_not_run():
    statuses, _ = replayed("set up", *["timeout"] * 3, "b", takes=0.2, timeout=0.05)
    assert statuses == ["ok", "timeout", "timeout", "timeout", "not run"]


def test_what_a_learners_cell_defines_counts_even_if_it_raises_and_a_check_cell_is_left_alone():
    log = []
    replay = Replay(["error a", "error b"], lambda: Script(log), 10, learners={0})
    assert [replay.outcome(number).status for number in range(2)] == ["error", "error"]
    assert [code for code in log if "error a" in code][1:] and "_define" in log[1] and log[2:] == ["error b"]


def test_cells_before_one_that_is_asked_for_are_run_first():
    log = []
    replay = Replay(["a", "b", "c"], lambda: Script(log), 10)
    assert replay.outcome(2).status == "ok"
    assert log == ["a", "b", "c"]


@pytest.fixture
def ends(monkeypatch):
    """pytest ends with a status, and runs nothing."""
    monkeypatch.setattr(sandbox, "self_test", lambda *_: [])

    def end(status):
        done = subprocess.CompletedProcess([], status, b"usage: no", b"")
        monkeypatch.setattr(running.subprocess, "run", lambda *_, **__: done)

    return end


def earlier(folder):
    """A folder with the result of an earlier grading."""
    (folder / "results").mkdir()
    (folder / "results" / "earlier.json").write_text(running.to_json({}))
    return folder


@pytest.mark.parametrize("before", [lambda folder: folder, earlier], ids=["first", "again"])
def test_pytest_that_cannot_start_is_said(before, reference, tmp_path, ends):
    ends(4)
    with pytest.raises(RuntimeError, match="usage: no"):
        run({"x": notebook()}, {"x": reference}, seed=SEED, folder=before(tmp_path))


def test_a_notebook_that_takes_pytest_with_it_does_not_stop_the_others(reference, tmp_path, ends):
    ends(-9)
    found = run({"x": notebook()}, {"x": reference}, seed=SEED, folder=earlier(tmp_path))
    assert {one.status for one in found["x"].values()} == {"not run"}
