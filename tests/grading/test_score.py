"""Points are earned by agreeing in every value, and by nothing else that a kernel may say."""

import copy

import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from companion.checks import MIME
from companion.grading.run import Outcome
from companion.grading.score import Measure, plain, score, troubles

FLAGS = {"grade": False, "solution": False, "locked": True, "task": False, "schema_version": 3}


def value(what, value, tolerance=0.0):
    return {"what": what, "value": value, "tolerance": tolerance}


VALUES = [value("double(2)", 4), value("half(3)", 1.5, 0.01), value("drawn", 8), value("drawn", 10)]


def cell(name, source, values=None, **flags):
    made = new_code_cell(source, id=name, metadata={"nbgrader": FLAGS | flags | {"grade_id": name}})
    if values:
        made.outputs = [new_output("display_data", data={MIME: {"passed": True, "values": values}})]
    return made


def exercise(values=VALUES, shown=None):
    solution = "def double(n):\n    ### BEGIN SOLUTION\n    return 2 * n\n    ### END SOLUTION"
    cells = [
        cell("double", solution, solution=True, locked=False),
        cell("check", "pass", values, grade=True, points=2),
    ]
    return Measure(new_notebook(cells=cells), {"check": {0: "look here", 1: ""} if shown is None else shown})


def scored(values=VALUES, measure=None, status="ok", note="", **more):
    emitted = {"version": 1, "passed": True, "values": copy.deepcopy(values)} | more
    [found] = score({"check": Outcome(emitted, status, note)}, measure or exercise())
    return found


def test_a_cell_whose_values_all_agree_earns_its_points():
    found = scored()
    assert (found.earned, found.points, found.hidden, found.note) == (2, 2, True, "")
    assert [one.passed for one in found.values] == [True, True]
    assert found.question == "double"


def test_within_the_solutions_tolerance_is_right_and_the_learners_own_does_not_count():
    assert scored([VALUES[0], value("half(3)", 1.505), *VALUES[2:]]).earned == 2
    assert scored([VALUES[0], value("half(3)", 1.7, tolerance=9), *VALUES[2:]]).earned == 0


def test_one_wrong_hidden_value_costs_all_points_and_nothing_of_it_is_told():
    found = scored([*VALUES[:3], value("drawn", 424242)])
    assert (found.earned, found.hidden) == (0, False)
    assert [one.what for one in found.values] == ["double(2)", "half(3)"]
    assert "424242" not in repr(found)
    assert "10" not in repr(found)


def test_a_wrong_visible_value_is_explained():
    found = scored([value("double(2)", 5), *VALUES[1:]])
    first = found.values[0]
    assert (found.earned, found.hidden) == (0, True)
    assert (first.expected, first.came, first.look) == ("4", "5", "look here")
    assert first.difference == "5 instead of 4"


def test_a_cell_without_hidden_values_counts_by_its_visible_ones():
    measure = exercise(VALUES[:2])
    found = scored(VALUES[:2], measure)
    assert (found.earned, found.hidden) == (2, None)
    assert not measure.has_hidden("check")
    assert exercise().has_hidden("check")


@pytest.mark.parametrize("status", ["error", "timeout", "died", "flood", "not run"])
def test_what_did_not_end_well_earns_nothing_even_if_it_emitted_the_right_values(status):
    found = scored(status=status, note="learner said 99")
    assert found.earned == 0
    assert found.note and "99" not in found.note


def test_which_limit_was_met_first_makes_no_difference():
    assert scored(status="timeout") == scored(status="flood") == scored(status="died")


def test_a_cell_that_was_never_run_earns_nothing():
    [found] = score({}, exercise())
    assert (found.earned, found.status, found.hidden) == (0, "not run", False)
    assert [one.difference for one in found.values] == ["it was not reached"] * 2


def test_an_error_with_a_visible_input_is_told_and_with_a_hidden_one_only_that_there_was_one():
    visible = scored(VALUES[:1], error="KeyError: 'apples'")
    assert "KeyError: 'apples'" in visible.note
    hidden = scored(VALUES[:2], error="KeyError: 'secret input'")
    assert hidden.note and "secret" not in repr(hidden)
    assert visible.earned == hidden.earned == 0


def deep(levels):
    found = []
    for _ in range(levels):
        found = [found]
    return found


@pytest.mark.parametrize(
    "values",
    [
        None,
        "text",
        {"0": VALUES[0]},
        [],
        [None] * 4,
        [1, 2, 3, 4],
        ["what"] * 4,
        [[]] * 4,
        [{}] * 4,
        [{"what": one["what"]} for one in VALUES],
        [{"what": ["double(2)"], "value": 4}] * 4,
        VALUES * 2,
        VALUES[:3],
        [value("double(2)", 10**400), *VALUES[1:]],
        [VALUES[0], value("half(3)", 10**400), *VALUES[2:]],
        [value("double(2)", deep(50_000)), *VALUES[1:]],
        [value("double(2)", float("nan")), *VALUES[1:]],
        [value("double(2)", "\ud800\0"), *VALUES[1:]],
        [value("double(2)", {"<int>": "4"}), *VALUES[1:]],
        [value("double(2)", True), *VALUES[1:]],
    ],
    ids=range(20),
)
def test_whatever_a_kernel_emits_nothing_is_earned_and_nothing_raised(values):
    [found] = score({"check": Outcome({"passed": True, "values": values}, "ok")}, exercise())
    assert found.earned == 0
    repr(found).encode()


def test_values_of_a_right_result_with_something_added_are_noted():
    found = scored([*VALUES, value("more", 1)])
    assert found.earned == 0
    assert "not what this check gives out" in found.note


def test_how_an_answer_cell_ended_is_told_in_the_same_words_each_time():
    outcome = Outcome(None, "error", "TypeError: <function f at 0x7f3a> is no\n number")
    assert troubles({"double": outcome}, exercise()) == {
        "double": "It stopped with an error. TypeError: <function f> is no number"
    }
    assert troubles({"double": Outcome(None, "ok")}, exercise()) == {}


def test_a_strangers_text_becomes_one_short_line_that_can_be_written():
    text = plain("a\n\nb\ud800\u202e\x1b[31m" + "x" * 5000)
    assert text.startswith("a b\\ud800\\u202e\\x1b[31m")
    assert len(text) == 300
