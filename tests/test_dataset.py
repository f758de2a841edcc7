"""Training examples: what is refused and with which words, what is doubtful, and how they are parted."""

import csv
import json
import math
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import scripted

from companion import dataset, shop

USER = {"role": "user", "content": "Where is my parcel?"}
ANSWER = {"role": "assistant", "content": "On its way."}
TOOL = {"type": "function", "function": {"name": "track", "parameters": {"type": "object", "properties": {}}}}


def call(id="call_1", name="track", arguments='{"order": "FW-1"}'):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


CALLS = {"role": "assistant", "content": None, "tool_calls": [call()]}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "in transit"}


def example(*messages, **more):
    return {"messages": list(messages) or [USER, ANSWER], **more}


def ask(text, answer="yes"):
    return example({"role": "user", "content": text}, {"role": "assistant", "content": answer})


def write(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


GOOD = {
    "plain": example(),
    "instructions": example({"role": "system", "content": "Be brief."}, USER, ANSWER),
    "weights": example(USER, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 1}),
    "text parts": example({"role": "user", "content": [{"type": "text", "text": "Hello"}]}, ANSWER),
    "a call and its result": example(USER, CALLS, RESULT, ANSWER, tools=[TOOL], parallel_tool_calls=False),
    "a call at the end": example(USER, CALLS, tools=[TOOL]),
    "two calls at once": example(
        USER,
        CALLS | {"tool_calls": [call("a"), call("b")]},
        RESULT | {"tool_call_id": "b"},
        RESULT | {"tool_call_id": "a", "content": ""},
        ANSWER,
        tools=[TOOL],
    ),
    "names": example(USER | {"name": "Ada"}, ANSWER),
}


@pytest.mark.parametrize("good", GOOD.values(), ids=GOOD)
def test_what_openai_documents_has_no_problem_and_comes_back_from_a_file(good, tmp_path):
    assert dataset.validate([good]) == []
    dataset.save([good], tmp_path / "train.jsonl")
    assert dataset.load(tmp_path / "train.jsonl") == [good]


BAD = [  # an example, the code, and what the message names
    ([1], "not_an_object", "an array"),
    ({}, "no_messages", "missing"),
    ({"messages": []}, "no_messages", "empty"),
    ({"messages": "hello"}, "invalid_type", "a string"),
    ({"messages": [USER, "yes", ANSWER]}, "invalid_type", "messages[1]"),
    ({"prompt": "a", "completion": "b"}, "unknown_key", "'prompt'"),
    (example(functions=[]), "unknown_key", "'tools'"),
    (example(label="x"), "unknown_key", "'label'"),
    (example(USER, ANSWER | {"mood": "kind"}), "unknown_key", "messages[1]"),
    (example(USER | {"role": "human"}, ANSWER), "unknown_role", "'human'"),
    (example({"content": "Hi"}, ANSWER), "unknown_role", "missing"),
    (example(USER | {"role": {}}, ANSWER), "unknown_role", "messages[0]"),
    (example(USER, {"role": "function", "name": "f", "content": "1"}, ANSWER), "unknown_role", "'tool'"),
    (example(USER | {"name": 5}, ANSWER), "invalid_type", "messages[0].name"),
    (example({"role": "user"}, ANSWER), "no_content", "messages[0] is missing"),
    (example(USER, {"role": "assistant", "content": "  "}), "no_content", "messages[1] is empty"),
    (example({"role": "user", "content": []}, ANSWER), "no_content", "messages[0]"),
    (
        example({"role": "user", "content": [{"type": "text", "text": ""}]}, ANSWER),
        "no_content",
        "messages[0]",
    ),
    (example({"role": "user", "content": 5}, ANSWER), "invalid_content", "a number"),
    (example({"role": "user", "content": [{"type": "image_url"}]}, ANSWER), "invalid_content", "image_url"),
    (
        example({"role": "user", "content": [{"type": "text", "text": 5}, 7]}, ANSWER),
        "invalid_content",
        "[1]",
    ),
    (example(USER), "no_assistant", "assistant"),
    (example(USER, ANSWER, USER), "last_not_assistant", "last"),
    (example(USER, ANSWER | {"weight": 0}), "nothing_to_learn", "weight 0"),
    (example(USER | {"weight": 1}, ANSWER), "misplaced_weight", "messages[0]"),
    (example(USER, ANSWER | {"weight": 0.5}), "invalid_weight", "0.5"),
    (example(USER, ANSWER | {"weight": True}), "invalid_weight", "True"),
    (example(tools=[]), "invalid_tools", "leave it out"),
    (example(tools=["track"]), "invalid_tools", "tools[0]"),
    (
        example(tools=[{"type": "function", "function": {"name": "track order"}}]),
        "invalid_tools",
        "track order",
    ),
    (example(tools=[TOOL, TOOL]), "invalid_tools", "two tools"),
    (example(tools=[{**TOOL, "function": {"name": "f", "parameters": "x"}}]), "invalid_tools", "parameters"),
    (example(parallel_tool_calls="yes"), "invalid_type", "parallel_tool_calls"),
    (example(USER, CALLS), "undefined_tool", "'track'"),
    (example(USER, CALLS | {"tool_calls": []}, tools=[TOOL]), "invalid_tool_call", "tool_calls"),
    (example(USER, CALLS | {"tool_calls": [5]}, tools=[TOOL]), "invalid_tool_call", "tool_calls[0]"),
    (example(USER, CALLS | {"tool_calls": [call(id="")]}, tools=[TOOL]), "invalid_tool_call", ".id"),
    (example(USER, CALLS | {"tool_calls": [call(), call()]}, tools=[TOOL]), "invalid_tool_call", "two calls"),
    (example(USER, CALLS | {"tool_calls": [call(name=None)]}, tools=[TOOL]), "invalid_tool_call", ".name"),
    (
        example(USER, CALLS | {"tool_calls": [call(arguments={})]}, tools=[TOOL]),
        "invalid_arguments",
        "JSON string",
    ),
    (
        example(USER, CALLS | {"tool_calls": [call(arguments="[1]")]}, tools=[TOOL]),
        "invalid_arguments",
        "no object",
    ),
    (
        example(USER, CALLS | {"tool_calls": [call(arguments="{a}")]}, tools=[TOOL]),
        "invalid_arguments",
        "not JSON",
    ),
    (example(USER | {"tool_calls": [call()]}, ANSWER, tools=[TOOL]), "misplaced_tool_calls", "'user'"),
    (example(USER, CALLS, ANSWER, tools=[TOOL]), "unanswered_tool_call", "'call_1'"),
    (example(USER, RESULT, ANSWER), "unknown_tool_call", "'call_1'"),
    (example(USER, CALLS, RESULT, RESULT, ANSWER, tools=[TOOL]), "unknown_tool_call", "messages[3]"),
    (example(USER, ANSWER | {"tool_call_id": "call_1"}), "misplaced_tool_call_id", "messages[1]"),
]


@pytest.mark.parametrize(("bad", "code", "says"), BAD, ids=[f"{code}-{says}" for _, code, says in BAD])
def test_every_fault_of_an_example_is_named(bad, code, says, tmp_path):
    path = write(tmp_path / "train.jsonl", json.dumps(example()), json.dumps(bad))
    problems = dataset.validate(path)
    assert problems == dataset.validate([example(), bad])
    assert {problem.line for problem in problems} == {2}
    assert any(problem.code == code and says in problem.message for problem in problems), problems
    assert all("\n" not in str(problem) and str(problem).startswith("line 2: ") for problem in problems)


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("nonsense", "not_json", "character 1"),
        ('{"messages": [', "not_json", "Expecting value"),
        ("[" + json.dumps(example()) + ",", "not_json", "one object a line"),
        ('{"messages": NaN}', "not_json", "NaN"),
        ('{"messages": 1e999}', "not_json", "1e999"),
        ("9" * 5000, "not_json", "digits"),
        ('{"messages": [], "messages": []}', "duplicate_key", "'messages'"),
        ("[" * 100_000, "too_deep", "64"),
        ('{"a":' * 100 + "1" + "}" * 100, "too_deep", "64"),
        ('{"messages": "\\ud800"}', "not_unicode", "half"),
        (b'{"messages": "caf\xe9"}', "not_utf8", "0xe9"),
        ("", "blank_line", "delete"),
        ("  \r", "blank_line", "delete"),
        ("x" * (dataset.LONGEST_LINE + 1), "line_too_long", "8 MiB"),
    ],
)
def test_a_bad_line_is_named_and_the_lines_around_it_are_read(line, code, says, tmp_path):
    bad = json.dumps(example(USER))
    path = write(tmp_path / "train.jsonl", json.dumps(example()), line, bad)
    found = {problem.line: problem for problem in dataset.validate(path)}
    assert found.keys() == {2, 3}
    assert found[2].code == code and says in found[2].message
    assert found[3].code == "no_assistant"


def test_a_byte_order_mark_an_old_encoding_and_an_empty_file_are_said_once(tmp_path):
    line = json.dumps(example(), ensure_ascii=False)
    assert [p.code for p in dataset.validate(write(tmp_path / "a", b"\xef\xbb\xbf" + line.encode()))] == [
        "bom"
    ]
    assert [p.code for p in dataset.validate(write(tmp_path / "b", f"{line}\n{line}".encode("utf-16")))] == [
        "not_utf8"
    ]
    assert [(p.line, p.code) for p in dataset.validate(write(tmp_path / "c", b""))] == [(0, "empty_file")]
    assert [p.code for p in dataset.validate([])] == ["empty_file"]


def test_windows_line_ends_are_read(tmp_path):
    path = write(tmp_path / "train.jsonl", json.dumps(example()) + "\r", json.dumps(example()) + "\r", "")
    assert dataset.load(path) == [example(), example()]


def test_objects_that_json_cannot_write_are_problems_of_their_example():
    circle = example()
    circle["messages"][0] = circle
    deep = []
    for _ in range(100_000):
        deep = [deep]
    found = dataset.validate(
        [example(), {"messages": {1, 2}}, {"messages": math.nan}, circle, {"messages": deep}]
    )
    assert [problem.line for problem in found] == [2, 3, 4, 5]
    assert all(problem.code == "not_json" for problem in found)


def test_one_bad_line_in_ten_thousand_is_found_in_bounded_memory(tmp_path):
    line = json.dumps(example({"role": "user", "content": "Where is it? " * 80}, ANSWER))
    path = write(tmp_path / "train.jsonl", *[line] * 7_654, line[:-2], *[line] * 2_345)
    assert path.stat().st_size > 10e6
    tracemalloc.start()
    problems = dataset.validate(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [problem.line for problem in problems] == [7_655]
    assert peak < 1e6


def test_of_many_problems_the_rest_is_counted(tmp_path):
    problems = dataset.validate(write(tmp_path / "train.jsonl", *["x"] * 1_500))
    assert len(problems) == dataset.MOST_PROBLEMS + 1
    assert problems[-1] == dataset.Problem(0, "more_problems", "500 more problems were found")


def test_load_and_save_refuse_what_does_not_validate_and_leave_the_file_as_it_was(tmp_path):
    path = tmp_path / "train.jsonl"
    dataset.save([example()], path)
    with pytest.raises(dataset.DatasetError, match="line 2: 'messages' is empty") as caught:
        dataset.save([example(), {"messages": []}], path)
    assert [problem.line for problem in caught.value.problems] == [2]
    assert dataset.load(path) == [example()]
    assert [file.name for file in tmp_path.iterdir()] == ["train.jsonl"]
    with pytest.raises(dataset.DatasetError, match=r"train\.jsonl.*\nline 1: not JSON"):
        dataset.load(write(path, *["nonsense"] * 7))
    with pytest.raises(FileNotFoundError):
        dataset.load(tmp_path / "nothing.jsonl")


def test_what_is_saved_is_utf8_one_object_a_line(tmp_path):
    dataset.save([ask("Grüße\naus Köln 🎒\u2028ja")] * 2, tmp_path / "train.jsonl")
    raw = (tmp_path / "train.jsonl").read_bytes()
    assert raw.count(b"\n") == 2 and raw.endswith(b"\n")
    assert "Grüße".encode() in raw


PERSONAL = [
    ("write to jo.fox@mail.co.uk please", "email_address"),
    ("card 4111 1111 1111 1111", "card_number"),
    ("card 378282246310005", "card_number"),
    ("IBAN GB82 WEST 1234 5698 7654 32", "iban"),
    ("PAY TO DE89370400440532013000 NOW", "iban"),
    ("CALL GB82 WEST 1234 5698 7654 32 TODAY", "iban"),
    ("ring +44 20 7946 0958", "phone_number"),
    ("ring 07700 900123 or 0117 496 0123", "phone_number"),
    ("we live in BS1 4DJ", "postcode"),
]
HARMLESS = [
    "order FW-10400 of 2026-11-03 for 1,234.50",
    "tracking PP598029050, NP612114482",
    "4111 1111 1111 1112 is refused by Luhn, and so is 0000 0000 0000 0000",
    "GB82 WEST 1234 5698 7654 33",
    "articles 1234567890123456 and 10 000 000 pieces",
    "write @support, not at home",
    "sizes 36 37 38 39 40 41, EAN 4006381333931",
    "version 10.0.0.1 at 12:30 on 03-11-2026",
]


@pytest.mark.parametrize(("text", "code"), PERSONAL)
def test_personal_data_is_pointed_out_without_being_repeated(text, code):
    problems = [p for p in dataset.review([ask("hello"), ask(text)]) if p.line == 2]
    assert [problem.code for problem in problems] == [code]
    assert not any(len(word) > 4 and word in problems[0].message for word in text.split()[1:])


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_like_personal_data_is_left_alone(text):
    assert [p.code for p in dataset.review([ask(text)])] == ["few_examples"]


def test_personal_data_in_a_tools_arguments_is_seen():
    calls = CALLS | {"tool_calls": [call(arguments='{"email": "a@b.co"}')]}
    assert "email_address" in {p.code for p in dataset.review([example(USER, calls, tools=[TOOL])])}


def test_duplicates_and_contradictions_name_the_earlier_line():
    examples = [
        ask("My card was declined at checkout today", "payment"),
        ask("Which tent is the lightest?", "product"),
        ask("My card was declined at checkout today", "payment"),
        ask("My card was declined at checkout today", "account"),
        ask("My card was declinde at checkout today!", "payment"),
    ]
    found = {p.line: (p.code, p.message) for p in dataset.review(examples) if p.line}
    assert {line: code for line, (code, _) in found.items()} == {
        3: "duplicate",
        4: "conflicting_answers",
        5: "near_duplicate",
    }
    assert all("line 1" in message for _, message in found.values())


def test_fernways_tickets_have_no_twins():
    examples = dataset.from_tickets(shop.tickets())
    assert not {"duplicate", "near_duplicate", "conflicting_answers"} & {
        p.code for p in dataset.review(examples)
    }


def test_an_instruction_that_all_share_makes_no_twins():
    instruction = "Name the intent of the following message from a customer of our shop. " * 5
    words = ["tent", "boots", "stove", "jacket", "rope", "lamp", "map", "poles", "knife", "bottle", "socks"]
    asked = [ask(f"{instruction}\n{a} {b}") for a in words for b in words if a < b]
    assert "near_duplicate" not in {p.code for p in dataset.review(asked)}


def made_up(n, labels=4, seed=0):
    rng = np.random.default_rng(seed)
    words = [f"{a}{b}{c}" for a in "bdfgkl" for b in "aeiou" for c in ("rt", "mp", "ck", "sh", "ll", "zz")]
    return [ask(" ".join(rng.choice(words, 12)), f"label-{i % labels}") for i in range(n)]


def label_of(one):
    return one["messages"][-1]["content"]


def test_a_split_is_whole_stratified_and_the_same_for_a_seed():
    examples = made_up(200)
    parts = dataset.split(examples, 0.15, 0.1, stratify=label_of, seed=3)
    assert [len(part) for part in parts] == [150, 30, 20]
    position = {id(one): i for i, one in enumerate(examples)}
    for part in parts:
        assert [position[id(one)] for one in part] == sorted(position[id(one)] for one in part)
        counts = pd.Series([label_of(one) for one in part]).value_counts()
        assert len(counts) == 4 and counts.max() - counts.min() <= 2
    assert sorted(position[id(one)] for part in parts for one in part) == list(range(200))
    labels = [label_of(one) for one in examples]
    assert parts == dataset.split(examples, 0.15, 0.1, stratify=labels, seed=3)
    assert parts != dataset.split(examples, 0.15, 0.1, stratify=labels, seed=4)


def test_rare_labels_do_not_all_end_on_one_side():
    train, validation, test = dataset.split(made_up(60, labels=60), 0.2, 0.2, stratify=label_of)
    assert (len(train), len(validation), len(test)) == (36, 12, 12)


def test_near_twins_stay_together():
    examples = made_up(60)
    twins = [ask(one["messages"][0]["content"] + "!", "other") for one in examples]
    typos = [ask(one["messages"][0]["content"].replace("a", "aa", 1)) for one in examples]
    parts = dataset.split(examples + twins + typos, 0.3)
    where = {one["messages"][0]["content"]: i for i, part in enumerate(parts) for one in part}
    assert len(parts.train) == 126 and len(parts.validation) == 54
    for family in zip(examples, twins, typos, strict=True):
        assert len({where[one["messages"][0]["content"]] for one in family}) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"validation": -0.1}, "-0.1"),
        ({"validation": 0.6, "test": 0.4}, "train on"),
        ({"stratify": ["a"]}, "1 labels for 8"),
    ],
)
def test_a_split_that_cannot_be_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        dataset.split(made_up(8), **arguments)


def test_even_a_handful_gets_its_validation():
    assert [len(part) for part in dataset.split(made_up(5), 0.2)] == [4, 1, 0]


def test_a_description_counts_tokens_at_the_endpoint_and_reckons_with_the_last_job():
    weighted = example(USER, ANSWER | {"weight": 0}, USER, ANSWER)
    examples = [
        weighted,
        example(USER, CALLS, RESULT, ANSWER, tools=[TOOL]),
        example(USER, CALLS, tools=[TOOL]),
    ]
    succeeded = scripted.job("succeeded", "ftjob-1", created_at=100, finished_at=160, trained_tokens=600)
    service = scripted.Service(jobs=[scripted.job("running", "ftjob-2"), succeeded])
    found = dataset.describe(
        examples, service.client, "scripted", n_epochs=2, price_per_million=25, context=30
    )
    assert found.roles == {"user": 4, "assistant": 5, "tool": 1}
    assert found.turns == (2, 1, 1)
    sent = service.sent("POST", "/responses/input_tokens")
    counted = [len(json.dumps([body["input"], body.get("tools")]).split()) for body in sent]
    assert sorted(found.tokens) == sorted(counted)
    assert found.too_long == [line for line, n in enumerate(found.tokens, 1) if n > 30] != []
    assert found.training_tokens == 2 * sum(counted)
    assert found.minutes == pytest.approx(found.training_tokens / 10 / 60)
    assert found.cost == pytest.approx(found.training_tokens * 25 / 1e6)


def test_messages_are_counted_as_the_responses_api_takes_them():
    service = scripted.Service()
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    last = CALLS | {"tool_calls": [call("call_2")], "content": "Wait.", "weight": 1}
    dataset.describe([example(parts, CALLS, RESULT, last, tools=[TOOL])], service.client, "scripted")
    (sent,) = service.sent("POST", "/responses/input_tokens")
    written = {"type": "function_call", "name": "track", "arguments": '{"order": "FW-1"}'}
    assert sent == {
        "model": "scripted",
        "input": [
            {"role": "user", "content": "a\nb"},
            {**written, "call_id": "call_1"},
            {"type": "function_call_output", "call_id": "call_1", "output": "in transit"},
            {"role": "assistant", "content": "Wait."},
            {**written, "call_id": "call_2"},
            {"type": "function_call_output", "call_id": "call_2", "output": ""},
        ],
        "tools": [{"type": "function", **TOOL["function"]}],
    }


def test_without_a_job_the_minutes_come_from_the_machine():
    service = scripted.Service(jobs=[scripted.job("failed")])
    assert 0 < dataset.describe([example()], service.client, "scripted").minutes < 1


def test_without_a_client_nothing_is_said_of_tokens():
    found = dataset.describe(made_up(3), price_per_million=5)
    assert (found.tokens, found.too_long, found.minutes, found.cost) == (None, None, None, None)
    assert "token" not in str(found)
    with pytest.raises(ValueError, match="model is missing"):
        dataset.describe(made_up(3), scripted.Service().client)


def test_a_description_is_a_table_with_headers_in_jupyter():
    page = dataset.describe(made_up(3), scripted.Service().client, "scripted")._repr_html_()
    assert page.startswith("<table><caption>") and page.count('<th scope="row"') == page.count("<tr>") == 7


def test_a_table_becomes_examples_with_one_label():
    frame = pd.DataFrame({"q": ["Hi", "Bye"], "intent": ["greet", "leave"]})
    made = dataset.from_table(frame, "q", "intent", system="Name the intent.")
    assert made[1] == example(
        {"role": "system", "content": "Name the intent."},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "leave"},
    )
    assert dataset.validate(made) == []


def test_several_columns_become_json_in_their_order():
    frame = pd.DataFrame(
        {"q": ["Hi"], "n": np.array([3]), "b": [None], "when": [pd.Timestamp("2026-11-20")], "a": ["ü"]}
    )
    (made,) = dataset.from_table(frame, "q", ["n", "b", "when", "a"])
    assert made["messages"][-1]["content"] == '{"n":3,"b":null,"when":"2026-11-20 00:00:00","a":"ü"}'


@pytest.mark.parametrize(
    ("frame", "label", "says"),
    [
        ({"q": ["a"], "y": ["b"]}, "z", "no column 'z'"),
        ({"q": ["a", None], "y": ["b", "c"]}, "y", "row 1 .* 'q'"),
        ({"q": ["a", "b"], "y": ["b", float("nan")]}, "y", "row 1 .* 'y'"),
    ],
)
def test_a_table_with_holes_is_refused_by_row_and_column(frame, label, says):
    with pytest.raises(ValueError, match=says):
        dataset.from_table(pd.DataFrame(frame), "q", label)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_csv_file_becomes_examples_whatever_parts_its_columns(separator, tmp_path):
    rows = [["id", "text", "category"], ["1", "Where is it,\nplease; \t?", "007"], ["2", "Grüße", "None"]]
    with open(tmp_path / "t.csv", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    made = dataset.from_csv(tmp_path / "t.csv", "text", "category")
    said = [[message["content"] for message in one["messages"]] for one in made]
    assert said == [["Where is it,\nplease; \t?", "007"], ["Grüße", "None"]]
    several = dataset.from_csv(tmp_path / "t.csv", "text", ["id", "category"])
    assert several[0]["messages"][-1]["content"] == '{"id":"1","category":"007"}'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"text,label\n", "is empty"),
        ("text,label\nGr\u00fc\u00dfe,a\n".encode("latin-1"), "not UTF-8"),
        (b"text;category\na;b\n", "no column 'label': the table has text, category"),
        (b"text,label\na,b\nc,\n", "row 1 .* 'label'"),
        (b"text,label\na,b\nHello, you,c\n", "line 3: 3 values in 2 columns"),
        (b'text,label\na,b\n"' + b"a" * 200_000 + b'",c\n', "line 3: field larger"),
    ],
)
def test_a_csv_file_that_is_no_table_of_text_and_label_is_refused(content, says, tmp_path):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        dataset.from_csv(tmp_path / "t.csv", "text", "label")


def test_tickets_become_triage():
    frame = shop.tickets()
    made = dataset.from_tickets(frame)
    assert len(made) == 600 and dataset.validate(made) == []
    for one, ticket in zip(made, frame.itertuples(), strict=True):
        user, assistant = one["messages"]
        assert user["content"].endswith(ticket.text.strip())
        answer = json.loads(assistant["content"])
        assert list(answer) == ["intent", "urgency", "order_id"]
        assert answer == {
            "intent": ticket.intent,
            "urgency": ticket.urgency,
            "order_id": ticket.slots.get("order_id"),
        }
        assert assistant["content"] == json.dumps(answer, separators=(",", ":"))
    with_subject = frame["subject"].notna().to_numpy().nonzero()[0][0]
    assert made[with_subject]["messages"][0]["content"].startswith(frame["subject"][with_subject] + "\n\n")


def test_dialogues_become_one_example_each_that_ends_with_the_assistant():
    made = dataset.from_dialogues(shop.dialogues(), system="You are Fernway.")
    assert len(made) == 60 and dataset.validate(made) == []
    assert all(one["messages"][0]["role"] == "system" for one in made)
    (cut,) = dataset.from_dialogues([{"messages": [USER, ANSWER, USER]}])
    assert cut == example(USER, ANSWER)
