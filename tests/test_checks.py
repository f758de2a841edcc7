"""What a learner sees of a check, and what a grader gets of it."""

import json
import subprocess
import sys

import nbformat
import numpy as np
import openai
import pytest

from companion import checks
from companion.checks import LONGEST_TEXT, MIME, Check, clean, difference, drawn, scripted


def emitted(check):
    """What the check cell emits, as it comes out of a kernel: strict JSON."""
    return json.loads(json.dumps(check._repr_mimebundle_()[MIME], allow_nan=False))


def checked(got, expected, **arguments):
    with Check("f", points=2) as check:
        check.equal("f(1)", got, expected, **arguments)
    return check


# What the learner sees


def test_a_right_answer_earns_the_points_and_says_so_in_words():
    check = checked([1, "a"], [1, "a"])
    assert check.passed
    assert repr(check) == "f: 2 of 2 points, 1 of 1 checks passed\n✓ passed: f(1)"


def test_a_wrong_answer_is_told_what_came_what_was_expected_where_and_what_to_look_at(capsys):
    check = checked([{"role": "user"}], [{"role": "system"}], look="the role of the first message")
    assert not check.passed
    assert capsys.readouterr().out.splitlines() == [
        "f: 0 of 2 points, 0 of 1 checks passed",
        "✗ not yet: f(1)",
        "    expected: [{'role': 'system'}]",
        "    came: [{'role': 'user'}]",
        "    difference: 'user' instead of 'system' at [0]['role']",
        "    look at: the role of the first message",
    ]


def test_numbers_are_shown_with_six_digits_and_emitted_with_twelve_on_which_all_processors_agree():
    check = checked([1 / 3], [2 / 3])
    assert "difference: 0.333333 instead of 0.666667 at [0]" in repr(check)
    assert emitted(check)["values"][0]["value"] == [0.333333333333]
    [here, there] = ([value] for value in (0.8044296825069569, 0.804429682506957))
    assert emitted(checked(here, here))["values"] == emitted(checked(there, there))["values"]


def test_one_failed_check_costs_all_points_and_the_others_are_still_shown():
    with Check("f", points=3) as check:
        check.equal("f(1)", 1, 1)
        check.equal("f(2)", 1, 2)
        check.equal("f(3)", 3, 3)
    assert repr(check).startswith("f: 0 of 3 points, 2 of 3 checks passed")


def divide(number):
    return number / 0


def leave():
    raise SystemExit("bye")


def loud():
    raise ValueError("first line\nsecond line " + "x" * 10_000)


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no")


def unspeakable():
    raise Unspeakable


@pytest.mark.parametrize(
    ("answer", "line", "where"),
    [
        (lambda: divide(1), "ZeroDivisionError: division by zero", "divide"),
        (leave, "SystemExit: bye", "leave"),
        (loud, "ValueError: first line", "loud"),
        (unspeakable, "Unspeakable: an error whose message cannot be read", "unspeakable"),
        (lambda: openai.OpenAI(api_key=1 / 0), "ZeroDivisionError: division by zero", "<lambda>"),
    ],
)
def test_an_answer_that_raises_is_reported_in_one_line_and_not_raised(answer, line, where):
    with Check("f", points=1) as check:
        check.equal("f(1)", 1, 1)
        check.equal("f(2)", answer(), 2)
    assert not check.passed
    assert repr(check).splitlines()[2:] == [
        '✗ not yet: stopped at: check.equal("f(2)", answer(), 2)',
        f"    error: {line} (in {where})",
    ]
    assert emitted(check)["error"] == line


def test_an_unsolved_answer_is_told_to_put_its_code_there():
    def f():
        raise NotImplementedError  # your code here

    with Check("f", points=1) as check:
        f()
    assert "still holds its placeholder" in repr(check)


def test_a_function_that_is_not_there_is_told_to_run_the_cells_above():
    with Check("f", points=1) as check:
        not_defined_anywhere()  # noqa: F821
    assert "run the cells above" in repr(check)


def test_pressing_stop_ends_the_cell():
    with pytest.raises(KeyboardInterrupt), Check("f", points=1):
        raise KeyboardInterrupt


def test_html_shows_the_same_words_and_runs_nothing_of_the_learners():
    shown = checked("<script>alert(1)</script>", "x")._repr_mimebundle_()["text/html"]
    assert "✗ not yet" in shown and "f: 0 of 2 points" in shown
    assert "<script>" not in shown


# What the grader gets


def test_the_values_are_emitted_and_what_was_expected_is_not():
    with Check("f", points=2) as check:
        check.equal("f(1)", (1, 0.5), "SECRET", tolerance=0.1, look="SECRET")
        check.record("f(2)", "unseen")
    assert emitted(check) == {
        "version": 1,
        "question": "f",
        "passed": False,
        "values": [
            {"what": "f(1)", "value": [1, 0.5], "tolerance": 0.1},
            {"what": "f(2)", "value": "unseen", "tolerance": 0.0},
        ],
    }


def test_a_recorded_value_is_not_shown():
    with Check("f", points=1) as check:
        check.record("f(2)", "unseen")
    assert repr(check) == "f: 1 of 1 points, 0 of 0 checks passed"


def test_a_value_is_emitted_as_it_was_when_it_was_checked():
    value = [1]
    with Check("f", points=1) as check:
        check.equal("f(1)", value, [1])
        value.append(2)
    assert emitted(check)["values"][0]["value"] == [1]


class Hostile:
    def __repr__(self):
        raise RuntimeError("no")

    def __eq__(self, other):
        return True

    __hash__ = None


class EqualsAll(str):
    def __eq__(self, other):
        return True

    __hash__ = None


def cyclic():
    value = []
    value.append(value)
    return value


def deep():
    value = []
    for _ in range(100_000):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        10**5000,
        "\ud800",
        {"\ud800": 1},
        "x" * 10**7,
        list(range(10**6)),
        [[0] * 1000] * 1000,
        {number: number for number in range(5000)},
        np.zeros((2000, 2000)),
        object(),
        divide,
        ValueError,
        {1, "a", None},
        b"\xff",
        Hostile(),
        EqualsAll("a"),
        cyclic(),
        deep(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_comes_is_emitted_as_json_of_limited_size(value):
    check = checked(value, "something else")
    assert not check.passed
    assert len(json.dumps(emitted(check), ensure_ascii=False).encode()) < 400_000
    assert len(repr(check)) < 2_000


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        ((1, 2), [1, 2]),
        (np.array([1, 2]), [1, 2]),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        ({"a": np.float64("nan")}, {"a": float("nan")}),
        (0.1 + 0.2, 0.3),
        (2, 2.0),
        ({3, 1}, {1, 3}),
    ],
)
def test_values_that_mean_the_same_pass(got, expected):
    assert checked(got, expected).passed


@pytest.mark.parametrize(
    ("got", "expected", "said"),
    [
        (True, 1, "True instead of a number"),
        (None, "", "None instead of a text"),
        ("1", 1, "a text instead of a number"),
        ({1: 2}, {"1": 2}, "'1' is missing"),
        ({"a": 1, "b": 2}, {"a": 1}, "'b' is not asked for"),
        ([1, 2], [1], "the length is 2 instead of 1"),
        ([[1], [2]], [[1], [3]], "2 instead of 3 at [1][0]"),
        ((n for n in [1]), [1], "a value of type generator instead of a list"),
        (float("nan"), 1.0, "a value of type float instead of a number"),
        (10**400, 1.0, "a value of type int instead of a number"),
    ],
)
def test_the_first_difference_is_named(got, expected, said):
    assert difference(clean(got), clean(expected)) == said


def test_numbers_may_differ_by_the_tolerance_and_no_more():
    assert checked([0.52], [0.5], tolerance=0.03).passed
    assert not checked([0.54], [0.5], tolerance=0.03).passed


def test_long_texts_that_differ_behind_the_cut_differ():
    assert not checked("x" * LONGEST_TEXT + "a", "x" * LONGEST_TEXT + "b").passed
    assert checked("x" * LONGEST_TEXT + "a", "x" * LONGEST_TEXT + "a").passed


def test_an_address_in_memory_does_not_count():
    assert checked(object(), object()).passed


# Hidden inputs


def inputs(name):
    return [drawn(name).random(), drawn(name).randint(1, 10**9)]


def test_hidden_inputs_are_the_same_for_the_same_cell_and_seed_and_differ_otherwise(monkeypatch):
    monkeypatch.setattr(checks, "_SEED", "")
    assert inputs("a") == inputs("a") != inputs("b")
    unseeded = inputs("a")
    monkeypatch.setattr(checks, "_SEED", "1")
    seeded = inputs("a")
    assert seeded == inputs("a") != unseeded
    monkeypatch.setattr(checks, "_SEED", "2")
    assert inputs("a") not in (seeded, unseeded)


def test_hidden_inputs_are_the_same_on_every_machine(monkeypatch):
    monkeypatch.setattr(checks, "_SEED", "7")
    assert drawn("check-shout").randint(1, 10**6) == 810813


# The scripted model


@pytest.fixture
def nobody():
    """A client of a server that does not exist."""
    return openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0)


def test_a_script_answers_in_the_models_place_and_keeps_what_was_sent(nobody):
    messages = [{"role": "user", "content": "Hello"}]
    with scripted(lambda request: request["messages"][-1]["content"].upper()) as requests:
        completion = nobody.chat.completions.create(model="m", messages=messages, temperature=0)
    messages.append({"role": "assistant", "content": "later"})
    assert completion.choices[0].message.content == "HELLO"
    assert requests == [{"model": "m", "messages": messages[:1], "temperature": 0}]


def test_a_message_object_of_the_sdk_is_recorded_as_a_message(nobody):
    with scripted("Hi") as requests:
        first = nobody.chat.completions.create(model="m", messages=[])
        nobody.chat.completions.create(model="m", messages=[first.choices[0].message])
    assert requests[1]["messages"] == [{"role": "assistant", "content": "Hi"}]


def test_scripted_tokens_come_in_the_scripts_order_and_as_many_as_asked_for(nobody):
    with scripted({"a": -3.0, "b": -1.0, "c": -2.0, "d": -1.5}):
        completion = nobody.completions.create(model="m", prompt="x", max_tokens=1, logprobs=3)
        without = nobody.completions.create(model="m", prompt="x", max_tokens=1)
    assert completion.choices[0].text == "b"
    assert list(completion.choices[0].logprobs.top_logprobs[0].items()) == [("b", -1), ("c", -2), ("d", -1.5)]
    assert without.choices[0].logprobs is None


def test_after_the_block_requests_leave_again_also_when_it_raised(nobody):
    with pytest.raises(ZeroDivisionError), scripted("Hi"):
        divide(1)
    with pytest.raises(openai.APIConnectionError):
        nobody.chat.completions.create(model="m", messages=[])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"model": "m"}, "messages"),
        ({"messages": []}, "model"),
        ({"model": "m", "messages": [], "stream": True}, "stream"),
    ],
)
def test_a_request_that_the_script_cannot_answer_names_what_is_wrong(nobody, arguments, error):
    with scripted("Hi"), pytest.raises((TypeError, ValueError), match=error):
        nobody.chat.completions.create(**arguments)


def test_a_check_loads_neither_widgets_nor_numpy_nor_the_sdk():
    code = (
        "import sys, companion.checks; print({'ipywidgets', 'IPython', 'numpy', 'openai'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_dict_that_was_read_from_a_notebook_is_a_dict():
    stored = nbformat.from_dict({"base": 34, "of": [{"right": True}]})
    assert difference({"base": 34, "of": [{"right": True}]}, stored) == ""
    assert (
        difference({"base": 34, "of": [{"right": False}]}, stored)
        == "False instead of True at ['of'][0]['right']"
    )
