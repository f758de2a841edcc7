import json

import ipywidgets
import pytest
from bs4 import BeautifulSoup
from scripted import MODEL, Client

from companion.chat import Chat
from companion.evaluation import Answer, Sample, evaluate
from companion.widgets import LONGEST, chat_box, label, next_token_box, next_token_view, token_view


def page(html):
    return BeautifulSoup(html, "html.parser")


def press_enter(field):
    field._handle_custom_msg({"event": "submit"}, [])


def words_of(widget):
    """All that the HTML parts of a widget say."""
    if isinstance(widget, ipywidgets.HTML):
        return page(widget.value).get_text(" ", strip=True)
    return " ".join(filter(None, map(words_of, getattr(widget, "children", ()))))


def parts(box):
    """The parts a learner acts on, by their labels."""
    found = {box.description: box} if getattr(box, "description", "") else {}
    for child in getattr(box, "children", ()):
        found |= parts(child)
    return found


def a_box(*script, **arguments):
    chat = Chat(model=MODEL, client=Client(*script), **arguments)
    box = chat_box(chat)
    return chat, box, parts(box)


# The chat box


@pytest.mark.parametrize("way", ["Enter", "Send"])
def test_a_message_is_sent_and_answered(way):
    chat, box, part = a_box("Hello Ann")
    part["Message"].value = "I am Ann"
    press_enter(part["Message"]) if way == "Enter" else part["Send"].click()
    assert [message["content"] for message in chat.messages] == ["I am Ann", "Hello Ann"]
    assert words_of(box) == "user I am Ann assistant Hello Ann"
    assert part["Message"].value == ""


def test_typing_alone_sends_nothing():
    chat, _, part = a_box("Hello")
    part["Message"].value = "I am A"
    assert chat.client.requests == []


def test_the_reply_grows_as_it_is_written_and_nothing_can_be_sent_meanwhile():
    _, box, part = a_box("one two three")
    seen = []
    for html in (child for child in box.children if isinstance(child, ipywidgets.HTML)):
        html.observe(lambda _: seen.append((words_of(box), part["Send"].disabled)), "value")
    part["Message"].value = "Count"
    press_enter(part["Message"])
    said = [words for words, _ in seen]
    for grown in ("one", "one two", "one two three"):
        assert any(words.endswith(f"user Count assistant {grown}") for words in said)
    assert seen[0][1] and not part["Send"].disabled and not part["Message"].disabled


def test_an_error_is_one_line_and_the_message_stays_to_be_sent_again():
    _, box, part = a_box(RuntimeError("the server\n<b>is</b> down"), "Hello")
    part["Message"].value = "Hi"
    press_enter(part["Message"])
    (alert,) = page("".join(c.value for c in box.children if hasattr(c, "value"))).select('[role="alert"]')
    assert alert.get_text() == "RuntimeError: the server <b>is</b> down"
    assert part["Message"].value == "Hi" and not part["Message"].disabled
    press_enter(part["Message"])
    assert words_of(box) == "user Hi assistant Hello"


def test_nothing_is_sent_for_an_empty_message():
    chat, _, part = a_box("Hello")
    part["Message"].value = "  "
    press_enter(part["Message"])
    assert chat.client.requests == []


def test_clear_forgets_the_conversation():
    chat, box, part = a_box("Hello", system="Be brief.")
    part["Message"].value = "Hi"
    press_enter(part["Message"])
    part["Clear"].click()
    assert words_of(box) == "system Be brief."
    assert len(chat.messages) == 1


def test_what_was_said_before_the_box_is_in_it():
    chat = Chat(model=MODEL, client=Client("Hello <b>"))
    chat.ask("Hi")
    assert words_of(chat_box(chat)) == "user Hi assistant Hello <b>"


# Tokens


def test_tokens_are_numbered_and_their_whitespace_is_visible():
    view = token_view("To be,\n\tor <b>", model=MODEL, client=Client())
    assert "".join(view.tokens) == "To be,\n\tor <b>"
    chips = [chip.get_text() for chip in page(view._repr_html_()).select("li")]
    assert chips == ["1 To", "2 ␣be", "3 ,", "4 ⏎", "5 ⇥or", "6 ␣", "7 <", "8 b", "9 >"]
    assert page(view._repr_html_()).p.get_text() == "9 tokens"


def test_what_cannot_be_printed_is_shown_as_its_code():
    view = token_view("a\u200b\x07", model=MODEL, client=Client())
    assert "a\\u200b\\u0007" in page(view._repr_html_()).get_text().replace("1 ", "").replace(
        "2 ", ""
    ).replace("3 ", "")


def test_a_real_models_tokens_make_up_the_text(client):
    text = "To be,\n\tor not: naïve 🙂"
    view = token_view(text, client=client)
    assert "".join(view.tokens) == text
    assert 8 <= len(view.tokens) < len(text)


def test_a_real_model_weighs_its_next_tokens(client):
    probabilities = next_token_view("The capital of France is", k=5, client=client).probabilities
    assert next(iter(probabilities)) == " Paris"
    assert len(probabilities) == 5
    assert 0.5 < sum(probabilities.values()) <= 1
    assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)


NEXT = {" mat": 0.5, " <sofa>": 0.25, " floor": 0.125}


def rows_of(html):
    return [[cell.get_text() for cell in row.select("th, td")][:2] for row in page(html).select("tbody tr")]


def test_next_tokens_are_listed_with_their_probabilities_and_what_is_left():
    view = next_token_view("The cat sat on the", model=MODEL, client=Client(next_tokens=NEXT))
    assert view.probabilities == pytest.approx(NEXT)
    assert rows_of(view._repr_html_()) == [
        ["␣mat", "50.0%"],
        ["␣<sofa>", "25.0%"],
        ["␣floor", "12.5%"],
        ["all others", "12.5%"],
    ]


def test_no_more_next_tokens_are_shown_than_asked_for():
    view = next_token_view("The cat", k=1, model=MODEL, client=Client(next_tokens=NEXT))
    assert rows_of(view._repr_html_()) == [["␣mat", "50.0%"], ["all others", "50.0%"]]


def test_the_next_token_box_shows_what_was_typed_on_enter():
    box = next_token_box(k=2, model=MODEL, client=Client(next_tokens=NEXT))
    assert words_of(box) == ""
    field = parts(box)["Text"]
    field.value = "The cat"
    press_enter(field)
    assert rows_of(box.children[1].value)[0] == ["␣mat", "50.0%"]
    field.value = ""
    press_enter(field)
    assert words_of(box) == "ValueError: the text must be a string with something in it, not ''"


def test_the_next_token_box_begins_with_its_prompt():
    box = next_token_box("The cat", model=MODEL, client=Client(next_tokens=NEXT))
    assert "The␣cat" in words_of(box)


@pytest.mark.parametrize("text", ["", None, 7])
def test_views_need_text(text):
    for view in (token_view, next_token_view):
        with pytest.raises(ValueError, match="the text must be a string"):
            view(text, model=MODEL, client=Client())


def test_a_view_of_no_next_token_is_refused():
    with pytest.raises(ValueError, match="k must be at least 1"):
        next_token_view("The cat", k=0, model=MODEL, client=Client())


# Labelling


def answers(n=3):
    return [{"id": f"s{i}", "input": f"question {i}", "answer": f"answer {i}"} for i in range(n)]


def start(path, rows=None):
    box = label(rows or answers(), ["good", "bad"], path)
    return box, parts(box)


def in_file(path):
    return [(line["id"], line["label"]) for line in map(json.loads, path.read_text().splitlines())]


def typed(part, text):
    part["Label"].value = text
    press_enter(part["Label"])


def test_answers_are_labelled_one_by_one_and_each_label_saved_at_once(tmp_path):
    path = tmp_path / "new" / "labels.jsonl"
    box, part = start(path)
    assert words_of(box) == "Answer 1 of 3, 0 labelled. user question 0 assistant answer 0"
    part["1 good"].click()
    assert words_of(box) == "Answer 2 of 3, 1 labelled. user question 1 assistant answer 1"
    assert in_file(path) == [("s0", "good")]
    part["2 bad"].click()
    assert in_file(path) == [("s0", "good"), ("s1", "bad")]
    part["1 good"].click()
    assert words_of(box) == "All 3 answers have a label. They are in labels.jsonl."
    assert part["1 good"].disabled and not part["Back"].disabled
    assert box.labels == {"s0": "good", "s1": "bad", "s2": "good"}


def test_labels_can_be_typed_by_number(tmp_path):
    box, part = start(tmp_path / "labels.jsonl")
    typed(part, " 2 ")
    assert box.labels == {"s0": "bad"} and part["Label"].value == ""
    typed(part, "0")
    assert words_of(box).startswith("Answer 1 of 3, 1 labelled. You said: bad.")
    for wrong in ("3", "0", "good", "-1", ""):
        typed(part, wrong)
        assert words_of(box).endswith(f"ValueError: {wrong!r} is none of the numbers on the buttons")
    assert box.labels == {"s0": "bad"}
    for _ in range(3):
        typed(part, "1")
    typed(part, "1")
    assert box.labels == dict.fromkeys(["s0", "s1", "s2"], "good")


def test_a_label_can_be_changed_by_going_back_and_the_last_one_holds(tmp_path):
    path = tmp_path / "labels.jsonl"
    box, part = start(path)
    assert part["Back"].disabled
    part["1 good"].click()
    part["1 good"].click()
    part["Back"].click()
    part["Back"].click()
    part["2 bad"].click()
    assert words_of(box).startswith("Answer 3 of 3, 2 labelled.")
    assert box.labels == start(path)[0].labels == {"s0": "bad", "s1": "good"}
    assert in_file(path) == [("s0", "good"), ("s1", "good"), ("s0", "bad")]


def test_labelling_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "labels.jsonl"
    start(path)[1]["1 good"].click()
    box, part = start(path)
    assert words_of(box).startswith("Answer 2 of 3, 1 labelled.")
    part["2 bad"].click()
    assert start(path, answers(2))[0].labels == {"s0": "good", "s1": "bad"}


def test_a_line_that_was_cut_off_costs_that_label_only(tmp_path):
    path = tmp_path / "labels.jsonl"
    _, part = start(path)
    part["1 good"].click()
    part["1 good"].click()
    path.write_bytes(path.read_bytes()[:-20])
    box, part = start(path)
    assert box.labels == {"s0": "good"}
    part["2 bad"].click()
    assert start(path)[0].labels == box.labels == {"s0": "good", "s1": "bad"}


def test_a_label_that_cannot_be_saved_is_not_taken(tmp_path):
    (tmp_path / "file").write_text("")
    box, part = start(tmp_path / "file" / "labels.jsonl")
    part["1 good"].click()
    assert box.labels == {} and words_of(box).startswith("Answer 1 of 3, 0 labelled.")
    assert "Error: " in words_of(box)


@pytest.mark.parametrize("line", ['{"format": "another log"}', '{"id": "s0", "label": "fine"}', "[1]"])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, line):
    path = tmp_path / "labels.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"line 1 of .* is none of these labels \(good, bad\)"):
        start(path)
    assert path.read_text() == line + "\n"


def test_what_models_wrote_is_shown_as_text_and_cut_where_it_is_long(tmp_path):
    rows = answers(2)
    rows[0] |= {"answer": "<script>alert(1)</script>", "target": {"a": "<b>"}}
    rows[1] |= {"answer": "a" * 10_000_000, "input": [{"role": "system", "content": "Be <brief>."}]}
    box, part = start(tmp_path / "labels.jsonl", rows)
    assert "<script" not in box.children[1].value
    assert words_of(box).endswith('assistant <script>alert(1)</script> reference {"a": "<b>"}')
    part["1 good"].click()
    assert "system Be <brief>." in words_of(box)
    assert words_of(box).endswith("a… (10,000,000 characters in all)")
    assert len(words_of(box)) < LONGEST + 500


def test_a_runs_answers_can_be_labelled_and_one_without_a_text_says_why(tmp_path):
    def solve(input):
        return Answer(None, error="no <idea>") if input == "b" else input.upper()

    samples = [Sample("a", "A", id="first"), Sample("b", id="second")]
    run = evaluate(solve, samples, lambda answer, sample: True, epochs=2, progress=False)
    box, part = start(tmp_path / "labels.jsonl", run)
    assert words_of(box) == "Answer 1 of 2, 0 labelled. user a assistant A reference A"
    part["1 good"].click()
    assert words_of(box).endswith("user b assistant (no answer: no <idea>)")
    part["2 bad"].click()
    assert box.labels == {"first": "good", "second": "bad"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no answers"),
        ([{"input": "a", "answer": "b"}], "the id of answer 1, None, is no text"),
        ([*answers(1), *answers(1)], "the id of answer 2, 's0', is there twice"),
    ],
)
def test_answers_need_an_id_each(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        label(rows, ["good", "bad"], tmp_path / "labels.jsonl")


@pytest.mark.parametrize("labels", [[], ["good"], ["good", "good"], ["good", 1], ["good", ""]])
def test_labels_must_differ(tmp_path, labels):
    with pytest.raises(ValueError, match="labels must be at least two different texts"):
        label(answers(), labels, tmp_path / "labels.jsonl")
