"""Honest edits cost a learner nothing, hostile ones gain nothing, and nothing stops the run.

Answers are judged by running the restored cells one after the other in this process, as a kernel would: what
the check cells emit is what the solution's emit.
"""

import contextlib
import copy
import json
import random

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from companion.grading import release
from companion.grading.restore import (
    LARGEST,
    LONGEST,
    MOST_CELLS,
    MOST_NOTES,
    MOST_OWN,
    recognise,
    reference,
    restore,
)

FLAGS = {"grade": False, "solution": False, "locked": True, "task": False, "schema_version": 3}
AREA = '''import math


def area(radius):
    """The area of a circle."""
    square = radius * radius

    return math.pi * square'''
SOLVED = {
    "double": 'def double(number):\n    """Twice the number."""\n    return number + number',
    "area": AREA,
    "limit": "# The largest number that you accept\nlimit = 40 + 2",
    "both": "def low(values):\n    return min(values)\n\n\ndef high(values):\n    return max(values)",
}
BODY = "    ### BEGIN SOLUTION\n{}\n    ### END SOLUTION"


def cell(source, grade_id=None, tags=(), **flags):
    made = new_code_cell(source)
    if grade_id:
        made.metadata["nbgrader"] = FLAGS | flags | {"grade_id": grade_id}
    if tags:
        made.metadata["tags"] = list(tags)
    return made


def question(name, source, call, points=1):
    text = f"with Check({name!r}, points={points}) as check:\n    check.record('open', {call})"
    hidden = f"\n    ### BEGIN HIDDEN TESTS\n    check.record('hidden', {call})\n    ### END HIDDEN TESTS"
    answer = cell(source, name, solution=True, locked=False)
    answer.metadata["companion"] = {"wrong_answers": ["wrong = 1"]}
    return [
        new_markdown_cell(
            f"## Question {name}\n\nWrite what {name} should be, and then run the check below."
        ),
        answer,
        cell("before_the_check = 1", tags=["instructor"]),
        cell(text + hidden, f"check-{name}", grade=True, points=points),
        cell(f"print('a look at {name}:', {call})", tags=["live", "nbval-ignore-output"]),
    ]


@pytest.fixture(scope="module")
def source():
    def body(code):
        return BODY.format(code)

    double = SOLVED["double"].replace("    return number + number", body("    return number + number"))
    area = AREA.split("    square")[0] + body("    square" + AREA.split("    square")[1])
    limit = "# The largest number that you accept\n### BEGIN SOLUTION\nlimit = 40 + 2\n### END SOLUTION"
    both = "\n\n\n".join(
        "\n".join([first, body(rest)])
        for first, rest in (f.split("\n") for f in SOLVED["both"].split("\n\n\n"))
    )
    made = new_notebook(
        cells=[
            new_markdown_cell("# Exercise\n\nFour questions about numbers, one below the other."),
            cell("from random import Random\n\nunit = 1\n\n\ndef given(x):\n    return x + unit", "setup"),
            *question("double", double, "double(21)", 2),
            *question("area", area, "round(area(given(2)), 3)"),
            *question("limit", limit, "limit"),
            *question("both", both, "[low([3, 1, 2]), high([3, 1, 2])]", 3),
            new_markdown_cell("That is all."),
        ],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    made.cells[1].outputs = [nbformat.v4.new_output("stream", text="stored")]
    release.questions(made)
    return made


@pytest.fixture
def solved(source):
    """A learner's notebook, all answered, as plain JSON."""
    notebook = release.strip(source)
    for made in notebook.cells:
        made.source = SOLVED.get(name(made), made.source)
    return json.loads(nbformat.writes(notebook))


def name(cell):
    return cell["metadata"].get("nbgrader", {}).get("grade_id")


def find(notebook, grade_id):
    return next(cell for cell in notebook["cells"] if name(cell) == grade_id)


def place(notebook, grade_id):
    return notebook["cells"].index(find(notebook, grade_id))


def text(cell):
    return "".join(cell["source"])


def put(notebook, index, source, **metadata):
    made = {"cell_type": "code", "metadata": metadata, "source": source, "outputs": [], "execution_count": 1}
    notebook["cells"].insert(index, made)


def written(notebook):
    return json.dumps(notebook).encode()


class Check:
    """A stand-in that emits to a list."""

    emitted = ()

    def __init__(self, question, points):
        self.values = []

    def record(self, what, value):
        self.values.append([what, value])

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        Check.emitted = self.values if error is None else None
        return True


def run(notebook):
    """What each question's check cell emits when all cells run, errors or not, in one namespace."""
    space, emitted = {"Check": Check, "print": lambda *_: None}, {}
    for made in notebook.cells:
        if made.cell_type == "code":
            with contextlib.suppress(Exception):
                exec(compile(made.source, made.id, "exec"), space)
            if (name(made) or "").startswith("check-"):
                emitted[name(made).removeprefix("check-")] = Check.emitted
            Check.emitted = None
    return emitted


def right(submission, source):
    """The questions whose answers arrive, and the notes."""
    restored = restore(submission if isinstance(submission, bytes) else written(submission), source)
    assert restored.status == "ok", restored.notes
    nbformat.validate(restored.notebook)
    expected = run(reference(source))
    return {q for q, values in run(restored.notebook).items() if values == expected[q]}, restored.notes


ALL = set(SOLVED)


def said(notes, *words):
    return any(all(word.lower() in note.lower() for word in words) for note in notes)


# The restored notebook


def test_a_solved_notebook_is_restored_without_a_note(source, solved):
    assert right(solved, source) == (ALL, [])


def test_an_unsolved_notebook_earns_nothing_and_gets_no_note(source):
    assert right(nbformat.writes(release.strip(source)).encode(), source) == (set(), [])


def test_the_notebook_is_the_instructors_but_for_the_answers(source, solved):
    find(solved, "double")["metadata"]["tags"] = ["nbval-skip", "raises-exception"]
    notebook = restore(written(solved), source).notebook
    mine = [c for c in source.cells if "live" not in c.metadata.get("tags", [])]
    assert [c.cell_type for c in notebook.cells] == [c.cell_type for c in mine]
    for made, given in zip(notebook.cells, mine, strict=True):
        assert made.source == (SOLVED.get(name(given)) or given.source)
        assert made.metadata == {k: v for k, v in given.metadata.items() if k != "companion"}
        assert made.get("outputs", []) == []
    assert notebook.metadata == {"kernelspec": source.metadata.kernelspec}
    everything = nbformat.writes(notebook)
    assert "hidden" in everything and "before_the_check" in everything
    assert not any(leak in everything for leak in ("wrong = 1", "BEGIN SOLUTION", "stored", "a look at"))


def test_the_reference_holds_the_solutions_and_passes(source):
    notebook = reference(source)
    nbformat.validate(notebook)
    assert set(run(notebook)) == ALL and None not in run(notebook).values()
    assert "wrong = 1" not in nbformat.writes(notebook) and "a look at" not in nbformat.writes(notebook)


def test_restoring_twice_gives_the_same_and_changes_no_source(source, solved):
    before = copy.deepcopy(source)
    for made in solved["cells"]:
        made["metadata"] = {}
    put(solved, 3, "mine = 1")
    first, second = restore(written(solved), source), restore(written(solved), source)
    assert first == second and source == before


# Honest and clumsy: each of these costs nothing


def lose_metadata(notebook, rng):
    for made in notebook["cells"]:
        made["metadata"] = {"id": "colab", "colab": {}}


def lose_one_cells_metadata(notebook, rng):
    rng.choice(notebook["cells"])["metadata"] = {}


def lose_ids(notebook, rng):
    for made in notebook["cells"]:
        made.pop("id", None)


def same_ids(notebook, rng):
    for made in notebook["cells"]:
        made["id"] = "same"


def new_ids(notebook, rng):
    for made in notebook["cells"]:
        made["id"] = f"{rng.randrange(16**8):08x}"


def copy_a_cell(notebook, rng):
    index = rng.randrange(len(notebook["cells"]))
    notebook["cells"].insert(index + 1, copy.deepcopy(notebook["cells"][index]))


def print_for_debugging(notebook, rng):
    made = find_answer(notebook, rng)
    if made:
        made["source"] = text(made) + "\nprint('here', 1)"


def edit_a_check(notebook, rng):
    for made in notebook["cells"]:
        if "with Check" in text(made) and rng.random() < 0.5:
            made["source"] = text(made).replace("check.record", "check .record") + "\n    print('passed?')"


def delete_a_given_cell(notebook, rng):
    given = [c for c in notebook["cells"] if "with Check" in text(c) or c["cell_type"] == "markdown"]
    if len(given) > 5:
        notebook["cells"].remove(rng.choice(given))


def move_a_cell(notebook, rng):
    made = notebook["cells"].pop(rng.randrange(len(notebook["cells"])))
    notebook["cells"].insert(rng.randrange(len(notebook["cells"]) + 1), made)


def make_markdown_code(notebook, rng):
    texts = [made for made in notebook["cells"] if made["cell_type"] == "markdown"]
    if texts:
        rng.choice(texts).update(cell_type="code", outputs=[], execution_count=None)


def make_an_answer_markdown(notebook, rng):
    if made := find_answer(notebook, rng):
        made["cell_type"] = "markdown"


def use_windows_line_ends(notebook, rng):
    for made in notebook["cells"]:
        made["source"] = text(made).replace("\r\n", "\n").replace("\n", "\r\n")


def store_sources_as_lists(notebook, rng):
    for made in notebook["cells"]:
        made["source"] = text(made).splitlines(keepends=True)


def play(notebook, rng):
    code = rng.choice(["print(given(1))", "1 / 0", "tries = [double(3)]", "for i in range(3):\n    print(i)"])
    put(notebook, rng.randrange(len(notebook["cells"]) + 1), code)


def add_a_helper(notebook, rng):
    made = find_answer(notebook, rng)
    if made and "number + number" in text(made):
        made["source"] = text(made).replace("number + number", "twice_of(number)")
        above = notebook["cells"].index(made)
        put(notebook, above, "def twice_of(number):\n    return 2 * number")


def split_an_answer(notebook, rng):
    made = find_answer(notebook, rng)
    lines = text(made).replace("\r\n", "\n").split("\n") if made else []
    if len(lines) > 2:
        cut = rng.choice([i for i in range(1, len(lines)) if lines[i].strip()])
        index = notebook["cells"].index(made)
        metadata = copy.deepcopy(made["metadata"]) if rng.random() < 0.5 else {}
        made["source"] = "\n".join(lines[:cut]).rstrip()
        put(notebook, index + 1, "\n".join(lines[cut:]), **metadata)


def import_in_the_setup(notebook, rng):
    for made in notebook["cells"]:
        if "def given" in text(made) and made["cell_type"] == "code" and "sqrt" not in text(made):
            made["source"] = "from math import sqrt\n" + text(made)
            break


def find_answer(notebook, rng):
    begins = ("def double", "import math", "limit = ", "def low")
    found = [c for c in notebook["cells"] if c["cell_type"] == "code" and any(b in text(c) for b in begins)]
    return rng.choice([c for c in found if "with Check" not in text(c)] or [None])


EDITS = [
    lose_metadata,
    lose_one_cells_metadata,
    lose_ids,
    same_ids,
    new_ids,
    copy_a_cell,
    print_for_debugging,
    edit_a_check,
    delete_a_given_cell,
    move_a_cell,
    make_markdown_code,
    use_windows_line_ends,
    store_sources_as_lists,
    play,
    import_in_the_setup,
]
# These cut an answer's text, and come last: print in the middle of a cut function is no honest edit.
ONCE = [add_a_helper, split_an_answer, make_an_answer_markdown]


@pytest.mark.parametrize("edit", EDITS + ONCE, ids=lambda edit: edit.__name__)
def test_an_honest_edit_loses_no_answer(edit, source, solved):
    for seed in range(10):
        notebook = copy.deepcopy(solved)
        edit(notebook, random.Random(seed))
        found, notes = right(notebook, source)
        assert found == ALL, (seed, notes)


@pytest.mark.parametrize("seed", range(150))
def test_no_sequence_of_honest_edits_loses_an_answer(seed, source, solved):
    rng = random.Random(seed)
    edits = [*rng.choices(EDITS, k=rng.randrange(1, 7)), rng.choice(ONCE)]
    for edit in edits:
        edit(solved, rng)
    found, notes = right(solved, source)
    assert found == ALL, ([edit.__name__ for edit in edits], notes)


def test_a_byte_order_mark_other_encodings_and_old_formats_are_read(source, solved):
    solved["cells"][0]["source"] = "# Übung"
    content = json.dumps(solved, ensure_ascii=False)
    for encoding, word in [("utf-8-sig", "byte-order"), ("utf-16", "byte-order"), ("cp1252", "Windows-1252")]:
        found, notes = right(content.encode(encoding), source)
        assert found == ALL and said(notes, word)


def test_nbformat_3_is_read(source, solved):
    for made in solved["cells"]:
        made["input"] = made.pop("source")
        made.pop("id")
    old = {"nbformat": 3, "nbformat_minor": 0, "metadata": {}, "worksheets": [{"cells": solved["cells"]}]}
    found, notes = right(old, source)
    assert found == ALL and said(notes, "old format")


def test_nbformats_own_version_3_without_nbgraders_metadata_is_read(source, solved):
    old = nbformat.convert(nbformat.reads(json.dumps(solved), as_version=4), 3)
    found, _ = right(nbformat.writes(old, version=3).encode(), source)
    assert found == ALL


def test_outputs_of_50_mb_are_left_behind(source, solved):
    output = {"output_type": "stream", "name": "stdout", "text": ["line [0] {1}\n"] * 2_500_000}
    find(solved, "double")["outputs"] = [output]
    content = written(solved)
    assert len(content) > 40_000_000
    restored = restore(content, source)
    assert restored.status == "ok" and len(nbformat.writes(restored.notebook)) < 20_000


def test_of_copies_the_first_counts_that_is_not_the_stub_and_the_note_says_which(source, solved):
    stub = copy.deepcopy(find(json.loads(nbformat.writes(release.strip(source))), "double"))
    wrong = copy.deepcopy(stub) | {"source": "def double(number):\n    return 0"}
    at = place(solved, "double")
    solved["cells"][at + 1 : at + 1] = [wrong]
    solved["cells"].insert(at, stub)
    found, notes = right(solved, source)
    assert found == ALL
    assert said(notes, "double", "cell 5 counted", "cell 6, its copy, did not")
    assert said(notes, "cell 5 counted, and not cell 4, which is as it was handed out")


def test_of_copies_without_metadata_the_first_counts_too(source, solved):
    at = place(solved, "double")
    put(solved, at + 1, "def double(number):\n    return 0")
    lose_metadata(solved, None)
    lose_ids(solved, None)
    found, notes = right(solved, source)
    assert found == ALL and said(notes, "cell 4 counted", "cell 5, its copy, did not")


def test_a_copy_that_only_raises_gives_way_to_one_that_is_finished(source, solved):
    at = place(solved, "double")
    begun = copy.deepcopy(find(solved, "double"))
    begun["source"] = (
        "def double(number):\n    print(number)\n    raise NotImplementedError  # your code here"
    )
    solved["cells"].insert(at, begun)
    assert right(solved, source)[0] == ALL


def test_an_answer_written_beside_its_untouched_cell_counts(source, solved):
    for where in (0, place(solved, "double") + 1, len(solved["cells"])):
        notebook = copy.deepcopy(solved)
        code = text(find(notebook, "double"))
        find(notebook, "double")["source"] = release.unmark(source.cells[3].source)
        put(notebook, where, code)
        found, notes = right(notebook, source)
        assert found == ALL and said(notes, "since it defines double")


def test_two_answers_in_one_cell_count_both(source, solved):
    find(solved, "double")["source"] = SOLVED["double"] + "\n\n\n" + SOLVED["area"]
    solved["cells"].remove(find(solved, "area"))
    assert right(solved, source)[0] == ALL


def test_an_answer_written_into_the_check_cell_counts(source, solved):
    solved["cells"].remove(find(solved, "double"))
    check = find(solved, "check-double")
    check["source"] = SOLVED["double"] + "\n\n\n" + text(check)
    assert right(solved, source)[0] == ALL


def test_a_helper_is_carried_along_and_moved_up_where_it_came_too_late(source, solved):
    find(solved, "double")["source"] = "def double(number):\n    return outer(number)"
    put(solved, len(solved["cells"]), "from operator import add")
    put(solved, len(solved["cells"]), "def outer(number):\n    return inner(number)")
    put(solved, len(solved["cells"]), "inner = lambda number: add(number, number)")
    found, notes = right(solved, source)
    assert found == ALL
    assert said(notes, "was moved up, since question double needs it")


def test_what_was_added_to_the_setup_or_a_check_is_kept_and_what_was_changed_is_not(source, solved):
    setup = find(solved, "setup")
    setup["source"] = "import math, random as r\n" + text(setup).replace("unit = 1", "unit = 99")
    setup["source"] += "\n\n\ndef helper(x):\n    return x * 2"
    check = find(solved, "check-area")
    check["source"] = "from math import (\n    tau,\n)\n" + text(check).replace("radius", "5")
    find(solved, "double")["source"] = "def double(number):\n    return helper(number) * math.copysign(1, 1)"
    find(solved, "area")["source"] = "def area(radius):\n    return tau / 2 * radius**2"
    found, notes = right(solved, source)
    assert found == ALL
    assert said(notes, "cell setup was changed, and the instructor's was used")
    assert said(notes, "check cell check-area was changed")


def test_a_formatter_on_save_is_not_a_change_of_the_stub(source):
    notebook = json.loads(nbformat.writes(release.strip(source)))
    stub = find(notebook, "double")
    stub["source"] = text(stub).replace('"""', "'''") + "\n\n# to do\n"
    put(notebook, 0, SOLVED["double"])
    assert right(notebook, source)[0] == {"double"}


def test_deleted_cells_are_the_instructors_again_and_said(source, solved):
    for grade_id in ("setup", "check-area", "limit"):
        solved["cells"].remove(find(solved, grade_id))
    found, notes = right(solved, source)
    assert found == ALL - {"limit"}
    assert said(notes, "cell setup is missing") and said(notes, "check cell check-area is missing")
    assert said(notes, "Question limit: no answer was found")


def test_a_magic_on_top_of_an_answer_stays(source, solved):
    find(solved, "double")["source"] = "%%time\n" + SOLVED["double"]
    notebook = restore(written(solved), source).notebook
    assert find(notebook, "double").source == "%%time\n" + SOLVED["double"]


# What is not a submission


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is empty"),
        (b"\xef\xbb\xbf \n", "it is empty"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"\n<html>", "web page"),
        (b"{", "not JSON"),
        (b"\x80\x04\x95pickle", "not JSON"),
        (b"PK\x03\x04", "not JSON"),
        (b"[]", "not a notebook"),
        (b"null", "not a notebook"),
        (b"{}", "no cells"),
        (b'{"cells": {}}', "no cells"),
        (b'{"cells": [' + b"9" * 5000 + b"]}", "cannot be read"),
        (b'{"cells": ' + b"[" * 100_000, "too deeply"),
        (b'{"cells": [], "metadata": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, "too deeply"),
        (b" " * (LARGEST + 1), "bytes"),
    ],
    ids=range(15),
)
def test_what_cannot_be_read_is_not_submitted_and_says_why(content, why, source):
    restored = restore(content, source)
    assert (restored.notebook, restored.status) == (None, "not submitted")
    assert why in restored.notes[0] and "\n" not in restored.notes[0]


def another(source):
    """The exercise with everything called otherwise, but for a set-up that exercises share."""
    text = nbformat.writes(source)
    for old, new in [("double", "halve"), ("area", "edge"), ("limit", "floor"), ("both", "none")]:
        text = text.replace(old, new).replace(old.capitalize(), new.capitalize())
    return nbformat.reads(text.replace("low", "under").replace("high", "over"), as_version=4)


def test_another_exercise_of_the_course_is_not_this_one_with_or_without_metadata(source, solved):
    other = another(source)
    assert restore(written(solved), other).status == "not submitted"
    assert recognise(written(solved), {"other": other, "this": source}) == "this"
    lose_metadata(solved, None)
    lose_ids(solved, None)
    assert restore(written(solved), other).status == "not submitted"
    assert recognise(written(solved), {"other": other, "this": source}) == "this"


def test_a_foreign_notebook_is_not_submitted(source):
    cells = [
        new_markdown_cell("# My trip"),
        new_code_cell("import pandas\n\nlow = 1"),
        new_code_cell("1 + 1"),
    ]
    restored = restore(nbformat.writes(new_notebook(cells=cells)).encode(), source)
    assert restored.status == "not submitted" and "not of this exercise" in restored.notes[0]
    assert recognise(b"<html>", {"this": source}) is None
    assert restore(b'{"cells": []}', source).status == "not submitted"


def test_answers_alone_without_metadata_are_enough(source):
    cells = [new_code_cell(code) for code in SOLVED.values()]
    assert right(nbformat.writes(new_notebook(cells=cells)).encode(), source)[0] == ALL


def test_answers_deleted_altogether_are_a_submission_without_points(source, solved):
    solved["cells"] = [made for made in solved["cells"] if name(made) not in ALL]
    assert right(solved, source)[0] == set()


# Hostile


def test_metadata_of_wrong_types_and_broken_cells_cost_only_themselves(source, solved):
    junk = [None, 5, "x", [], ["ask"], {"a": {}}, True, 1e308]
    for value in junk:
        solved["cells"] += [
            value,
            {"cell_type": value, "source": value, "metadata": value, "id": value},
            {"cell_type": "code", "source": [value, "1"], "metadata": {"nbgrader": value, "tags": value}},
            {
                "cell_type": "code",
                "source": "2",
                "metadata": {"nbgrader": {"grade_id": value, "solution": value}},
            },
        ]
    solved["metadata"], solved["nbformat"] = "x", []
    assert right(solved, source)[0] == ALL


@pytest.mark.parametrize("seed", range(60))
def test_no_damage_to_the_json_stops_the_run(seed, source, solved):
    rng = random.Random(seed)
    junk = [None, -1, "check-double", [], {}, [[]], {"grade_id": []}, "\ud800", True]

    def damage(value):
        if rng.random() < 0.03:
            return copy.deepcopy(rng.choice(junk))
        if isinstance(value, dict):
            return {key: damage(item) for key, item in value.items()}
        return [damage(item) for item in value] if isinstance(value, list) else value

    restored = restore(written(damage(solved)), source)
    if restored.status == "ok":
        nbformat.validate(restored.notebook)
        nbformat.writes(restored.notebook).encode()


def test_cells_that_claim_to_be_checks_are_not(source, solved):
    fake = find(solved, "check-double")["metadata"] | {"tags": ["instructor"]}
    put(solved, 0, "with Check('double', points=100) as check:\n    check.record('open', 42)", **fake)
    invented = {"nbgrader": FLAGS | {"grade_id": "bonus", "grade": True, "points": 1000}}
    put(solved, 1, "1", **invented)
    restored = restore(written(solved), source)
    checks = [made for made in restored.notebook.cells if made.metadata.get("nbgrader", {}).get("grade")]
    assert [made.source for made in checks] == [c.source for c in source.cells if release.is_check(c)]
    assert sum(made.metadata.nbgrader.points for made in checks) == 7
    assert said(restored.notes, "claims to be 'bonus'")
    assert said(restored.notes, "Cell 1: check cell check-double was changed")


def test_comments_and_tags_for_nbval_are_taken_out(source, solved):
    markers = [
        "# NBVAL_SKIP",
        "  ## NBVAL_IGNORE_OUTPUT",
        "#NBVAL_RAISES_EXCEPTION",
        "x = 1\u2028# NBVAL_SKIP",
        "# PYTEST_VALIDATE_IGNORE_OUTPUT",
        "# NBVNBVAL_AL_SKIP",
        "x = 2\x0c#NBVAL_CHECK_OUTPUT\x1c# NBVAL_SKIP",
    ]
    from nbval.plugin import find_comment_markers

    find(solved, "double")["source"] = "\n".join([*markers, SOLVED["double"], "name = 'NBVAL_SKIP'"])
    put(solved, 0, "\n".join(markers), tags=["nbval-skip"])
    check = find(solved, "check-double")
    check["source"] = "# NBVAL_SKIP\n" + text(check)
    restored = restore(written(solved), source)
    for made in restored.notebook.cells:
        assert not list(find_comment_markers(made.source))
        assert "nbval-skip" not in made.metadata.get("tags", [])
    assert "name = 'NBVAL_SKIP'" in find(restored.notebook, "double").source
    assert said(restored.notes, "comments for nbval")


def test_surrogates_and_nul_become_a_character_that_can_be_written(source, solved):
    find(solved, "double")["source"] = SOLVED["double"] + "\n# \ud800 \0 \U0001f600"
    found, notes = right(solved, source)
    assert found == ALL and said(notes, "Cell 4 holds characters that no text has")
    restored = restore(written(solved), source)
    assert "\U0001f600" in find(restored.notebook, "double").source
    nbformat.writes(restored.notebook).encode()


def test_a_huge_cell_is_left_out_and_the_others_count(source, solved):
    put(solved, 0, "#" * (LONGEST + 1))
    find(solved, "area")["source"] = "x = 1\n" * LONGEST
    found, notes = right(solved, source)
    assert found == ALL - {"area"} and said(notes, "was left out")


def test_many_huge_cells_are_left_out_from_where_they_are_too_much(source, solved):
    for _ in range(90):
        put(solved, len(solved["cells"]), "import (\n" * (LONGEST // 10))
    found, notes = right(solved, source)
    assert found == ALL and said(notes, "those after 5,000,000 were left out")


def test_very_many_cells_are_cut_and_the_notes_too(source, solved):
    for _ in range(MOST_OWN + 50):
        put(solved, len(solved["cells"]), "1")
    restored = restore(written(solved), source)
    own = [made for made in restored.notebook.cells if made.id.startswith("own-")]
    assert len(own) == MOST_OWN and len(restored.notes) == MOST_NOTES + 1
    solved["cells"] += [{"cell_type": "code", "source": "def low(", "metadata": {}}] * 300_000
    restored = restore(written(solved), source)
    assert restored.status == "ok" and said(restored.notes, f"after the first {MOST_CELLS}")


@pytest.mark.parametrize(
    "code",
    [
        "a" * 900_000,
        "a, " * 300_000,
        "a" * 400_000 + ":" * 400_000,
        "def " * 200_000,
        "import (" * 100_000,
        "import (\n" * 100_000,
        "(" * 900_000,
        "@\n" * 400_000,
        " \n" * 400_000 + "x",
        "_ " * 400_000,
        "\t" * 900_000 + "#",
        "from " + " " * 800_000,
    ],
    ids=range(12),
)
@pytest.mark.parametrize("grade_id", ["double", "setup", None])
def test_texts_that_slow_a_search_down_do_not_hang_it(code, grade_id, source, solved):
    if grade_id:
        find(solved, grade_id)["source"] = code
    else:
        put(solved, 5, code)
    answers = restore(written(solved), source).notebook
    assert find(answers, "area").source == SOLVED["area"]
