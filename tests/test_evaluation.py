"""Samples put to solvers of every kind, what is kept of each, and what two runs tell."""

import _thread
import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import openai
import pytest
import scripted
from bs4 import BeautifulSoup

from companion import backend, evaluation, evaluation_log
from companion.chat import Chat
from companion.evaluation import Answer, Sample, Score, compare, evaluate, load

FIVE = [Sample(f"question {i}", target=str(i), id=f"s{i}") for i in range(5)]
HANGS = 1.0  # seconds that are enough to give a hanging solver up


def exact(answer, sample):
    return answer.text == sample.target


def number_in(text):
    return text.split()[-1]


def run(solver=number_in, samples=FIVE, scorers=exact, **options):
    return evaluate(solver, samples, scorers, **{"progress": False, **options})


@pytest.fixture
def service(monkeypatch):
    """A scripted client as the backend's."""

    def install(*script):
        client = scripted.Client(*script)
        monkeypatch.setattr(backend, "client", lambda: client)
        return client

    return install


# What is asked


def test_results_keep_the_order_of_the_samples_whatever_the_order_of_the_answers():
    def solver(text):
        time.sleep(0.05 if number_in(text) == "0" else 0)
        return number_in(text)

    records = list(run(solver, concurrency=4))
    assert [record.sample.id for record in records] == ["s0", "s1", "s2", "s3", "s4"]
    assert [record.answer.text for record in records] == ["0", "1", "2", "3", "4"]
    assert all(record.scores == {"exact": Score(True)} for record in records)


def test_as_many_samples_are_with_the_solver_at_once_as_concurrency_says():
    together = threading.Barrier(5)
    found = run(lambda text: str(together.wait(timeout=20)), concurrency=5)
    assert not any(record.answer.error for record in found)
    inside, most = [], []

    def solver(text):
        inside.append(text)
        most.append(len(inside))
        time.sleep(0.01)
        inside.remove(text)
        return text

    run(solver, concurrency=2)
    assert max(most) <= 2


def test_a_model_gets_the_input_the_options_and_a_seed_for_each_epoch(service):
    client = service(*"abcd")
    samples = [
        Sample("one"),
        Sample([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "two"}]),
    ]
    found = run("small", samples, epochs=2, seed=7, concurrency=1, timeout=9, temperature=0.5)
    assert [request["seed"] for request in client.requests] == [7, 7, 8, 8]
    assert {(r["model"], r["temperature"], r["timeout"]) for r in client.requests} == {("small", 0.5, 9)}
    assert client.requests[0]["messages"] == [{"role": "user", "content": "one"}]
    assert client.requests[1]["messages"] == samples[1].input
    assert [(r.sample.input, r.epoch, r.answer.text) for r in found] == [
        ("one", 0, "a"),
        ("one", 1, "c"),
        (samples[1].input, 0, "b"),
        (samples[1].input, 1, "d"),
    ]
    first = next(iter(found)).answer
    assert first.messages == [{"role": "user", "content": "one"}, {"role": "assistant", "content": "a"}]
    assert first.usage["total_tokens"] == first.usage["prompt_tokens"] + first.usage["completion_tokens"] > 0


def test_no_seed_is_sent_where_none_is_wanted(service):
    client = service("a")
    run("small", FIVE[:1], seed=None)
    assert "seed" not in client.requests[0]


def test_the_same_question_is_asked_once_and_scored_for_each_sample(service):
    client = service("1", "other")
    samples = [Sample("same", "1", "a"), Sample("else", "1", "b"), Sample("same", "2", "c")]
    found = run("small", samples, concurrency=1)
    assert len(client.requests) == 2
    assert [(r.answer.text, r.scores["exact"].value) for r in found] == [
        ("1", True),
        ("other", False),
        ("1", False),
    ]


def test_a_function_is_asked_for_each_sample_since_it_may_answer_otherwise():
    asked = []
    run(asked.append, [Sample("same", id="a"), Sample("same", id="b")])
    assert asked == ["same", "same"]


def test_a_function_with_a_seed_gets_it():
    found = run(lambda text, seed: f"{text} {seed}", FIVE[:1], epochs=2, seed=3)
    assert [record.answer.text for record in found] == ["question 0 3", "question 0 4"]


def test_a_chat_begins_anew_for_each_sample(service):
    client = service("before", [("look_up", '{"id": "17"}')], "It is on its way.", "Hello.")

    def look_up(id: str) -> str:
        """Find an order."""
        return f"{id} was sent"

    chat = Chat("Be kind.", model="small", tools=[look_up], temperature=0.5)
    chat.ask("Earlier.")
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Bye"},
    ]
    found = list(run(chat, [Sample("Where is 17?"), Sample(turns)], concurrency=1, max_tokens=9))
    system = {"role": "system", "content": "Be kind."}
    assert client.requests[1]["messages"] == [system, {"role": "user", "content": "Where is 17?"}]
    assert client.requests[3]["messages"] == [system, *turns]
    assert {(r["temperature"], r["max_tokens"], r["seed"]) for r in client.requests[1:]} == {(0.5, 9, 0)}
    answer = found[0].answer
    assert answer.text == "It is on its way."
    assert answer.tool_calls == [{"name": "look_up", "arguments": '{"id": "17"}', "result": "17 was sent"}]
    assert [message["role"] for message in answer.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert len(chat.messages) == 3 and chat.usage.requests == 1


def test_a_completion_with_tool_calls_and_a_chats_reply_are_answers(service):
    client = service([("look_up", "{}")], "Hello.")
    completion = client.chat.completions.create(model="small", messages=[{"role": "user", "content": "x"}])
    reply = Chat(model="small").ask("Hi")
    answers = {
        "question 0": completion,
        "question 1": reply,
        "question 2": Answer("mine", usage={"total_tokens": 3}),
        "question 3": Answer("mine", messages=None, tool_calls=None, usage=completion.usage),
    }
    found = [record.answer for record in run(answers.get, FIVE[:4])]
    assert found[3].usage["total_tokens"] == completion.usage.total_tokens
    assert (found[0].text, found[0].tool_calls) == ("", [{"name": "look_up", "arguments": "{}"}])
    assert (found[1].text, found[1].error) == ("Hello.", None) and found[1].usage["total_tokens"] > 0
    assert (found[2].text, found[2].usage) == ("mine", {"total_tokens": 3})


def test_only_the_first_samples_are_taken_and_no_more_are_read():
    read = []
    found = run(samples=(read.append(sample) or sample for sample in FIVE), limit=2)
    assert len(found) == len(read) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"samples": []}, "no samples"),
        (
            {"samples": [Sample("a", id="x"), Sample("b"), Sample("c", id="x")]},
            "samples 1 and 3 have the same id 'x'",
        ),
        ({"samples": [Sample("a", "t"), Sample("a", "t")]}, "samples 1 and 2"),
        ({"samples": ["a"]}, "sample 1 must be a Sample, not 'a'"),
        ({"samples": [Sample("a"), Sample([])]}, "input of sample 2"),
        ({"samples": [Sample(5)]}, "not 5"),
        ({"samples": [Sample([{"content": "x"}])]}, "input of sample 1"),
        ({"scorers": []}, "no scorers"),
        ({"scorers": ["exact"]}, "'exact'"),
        ({"scorers": [exact, exact]}, "two scorers are named 'exact'"),
        ({"solver": 5}, "not 5"),
        ({"temperature": 0}, "temperature: only models"),
        ({"solver": "small", "messages": []}, "messages"),
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"concurrency": 0}, "concurrency"),
        ({"limit": 0}, "limit"),
        ({"timeout": 0}, "timeout"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_asked(options, says, tmp_path):
    asked = []
    with pytest.raises(ValueError) as refused:
        run(**{"solver": asked.append, "log": tmp_path / "log.jsonl", **options})
    assert says in str(refused.value)
    assert not asked and not list(tmp_path.iterdir())


def test_a_scorer_cannot_have_the_name_of_a_column():
    def answer(answer, sample):
        return True

    with pytest.raises(ValueError, match="'answer'"):
        run(scorers=answer)


def test_no_endpoint_is_an_error_and_not_a_run_without_answers(monkeypatch):
    def gone():
        raise RuntimeError("no endpoint")

    monkeypatch.setattr(backend, "client", gone)
    with pytest.raises(RuntimeError, match="no endpoint"):
        run("small")


# What goes wrong is kept


def leave(text):
    sys.exit(3)


def broken(text):
    raise ValueError("no answer to this")


@pytest.mark.parametrize(
    ("solver", "says"),
    [
        (broken, "ValueError: no answer to this"),
        (leave, "SystemExit: 3"),
        (lambda text: None, "returned None"),
        (lambda text: 5, "returned int (5)"),
        (lambda text: Answer(None), "without a text"),
        (lambda text: Answer("x", usage={(1, 2): 3}), "TypeError: keys must be"),
        (lambda text: time.sleep(600), "no answer within 1 s"),
    ],
)
def test_a_sample_without_an_answer_says_why_and_is_not_scored(solver, says):
    found = run(lambda text: solver(text) if text == "question 2" else number_in(text), timeout=HANGS)
    records = list(found)
    assert says in records[2].answer.error and records[2].answer.text is None
    assert records[2].scores["exact"] == Score(None, explanation="no answer")
    assert [record.answer.text for record in records if not record.answer.error] == ["0", "1", "3", "4"]
    ((_, failure),) = found.failures.iterrows()
    assert (failure.id, failure.what) == ("s2", "answer") and says in failure.reason
    assert repr(found).startswith("<lambda>: 4 of 5 answered")


def test_an_answer_of_10_mb_is_cut_and_says_so(tmp_path):
    found = run(
        lambda text: Answer("y" * 10_000_000, messages=[{"role": "user", "content": "z" * 10_000_000}]),
        FIVE[:2],
        log=tmp_path / "log.jsonl",
    )
    for record in found:
        assert record.answer.text.startswith(
            "y" * evaluation.LONGEST + "… [cut: it had 10,000,000 characters]"
        )
    assert (tmp_path / "log.jsonl").stat().st_size < 3 * evaluation.LONGEST


def test_solvers_that_hang_hold_up_neither_the_others_nor_the_end_of_the_process(tmp_path):
    code = """
import sys, time
from companion.evaluation import Sample, evaluate
def solver(text):
    if text in "abc":
        time.sleep(600)
    return text
samples = [Sample(text) for text in "abcdefgh"]
run = evaluate(solver, samples, lambda answer, sample: True, concurrency=2, timeout=1, progress=False)
print([record.answer.text for record in run])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str([None, None, None, *"defgh"]), done.stderr


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "gave None"),
        (float("nan"), "gave nan"),
        (np.float64("inf"), "gave inf"),
        ([1], "gave list"),
        (Score(None, explanation="no target"), "no target"),
        (ZeroDivisionError("zero"), "ZeroDivisionError: zero"),
    ],
)
def test_what_cannot_be_scored_has_no_value_and_says_why(value, says):
    def scorer(answer, sample):
        if isinstance(value, Exception):
            raise value
        return value

    found = run(scorers=scorer)
    for record in found:
        assert record.scores["scorer"].value is None and says in record.scores["scorer"].explanation
    assert len(found.failures) == 5
    assert found.summary().loc["scorer", "missing"] == 5
    assert "not defined" in repr(found)


def test_a_scorer_that_hangs_costs_one_score_and_no_answer():
    def slow(answer, sample):
        time.sleep(600 if sample.id == "s1" else 0)
        return 1.0

    records = list(run(scorers=[exact, slow], timeout=HANGS, concurrency=2))
    assert [record.answer.text for record in records] == ["0", "1", "2", "3", "4"]
    assert [record.scores["exact"].value for record in records] == [True] * 5
    assert [record.scores["slow"].value for record in records] == [1.0, None, 1.0, 1.0, 1.0]
    assert "no score within 1 s" in records[1].scores["slow"].explanation


def test_numpys_values_are_scores():
    values = {"s0": np.bool_(True), "s1": np.float32(0.5), "s2": np.int64(2), "s3": "label", "s4": 1}
    found = run(scorers=lambda answer, sample: values[sample.id])
    assert [record.scores["<lambda>"].value for record in found] == [True, 0.5, 2, "label", 1]


# The log


class Asked(list):
    """A solver that remembers what it was asked."""

    __name__ = "solver"

    def __call__(self, text):
        self.append(text)
        return number_in(text)


def test_a_finished_run_is_loaded_and_not_asked_again(tmp_path):
    log = tmp_path / "new" / "log.jsonl"
    first, again = Asked(), Asked()
    found = run(first, log=log, epochs=2, name="mine")
    assert len(first) == 10
    assert list(run(again, log=log, epochs=2)) == list(load(log)) == list(found)
    assert not again
    assert load(log).name == "mine"
    assert [path.name for path in log.parent.iterdir()] == ["log.jsonl"]


def test_a_line_that_a_kill_has_cut_is_asked_again_and_nothing_else(tmp_path):
    log = tmp_path / "log.jsonl"
    whole = list(run(Asked(), log=log, concurrency=1))
    content = log.read_bytes()
    for cut in (1, 30, len(content.splitlines()[-1]), len(content.splitlines()[-1]) + 5):
        log.write_bytes(content[:-cut])
        missing = ["question 4"] if cut < len(content.splitlines()[-1]) + 1 else ["question 3", "question 4"]
        assert len(load(log)) == 5 - len(missing)
        assert f"{len(missing)} not asked yet" in repr(load(log))
        again = Asked()
        found = list(run(again, log=log, concurrency=1))
        assert again == missing
        assert [(r.sample, r.answer.text, r.scores) for r in found] == [
            (r.sample, r.answer.text, r.scores) for r in whole
        ]
        assert list(load(log)) == found


KILLED = """
import os, sys, time
from companion.evaluation import Sample, evaluate
log, asked = sys.argv[1:]
def solver(text):
    with open(asked, "a") as file:
        file.write(text + "\\n")
    time.sleep(0.005)
    return text.upper()
def right(answer, sample):
    return answer.text == sample.target
samples = [Sample(f"text {i}", f"TEXT {i}") for i in range(200)]
evaluate(solver, samples, right, log=log, concurrency=4, progress=False)
"""


def test_a_run_that_is_killed_again_and_again_answers_everything_once(tmp_path):
    log, asked = tmp_path / "log.jsonl", tmp_path / "asked"
    command = [sys.executable, "-c", KILLED, str(log), str(asked)]
    kills = 0
    for lines in (20, 90, 150):
        with subprocess.Popen(command) as process:
            while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < lines):
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        kills += process.returncode == -signal.SIGKILL
        assert len(load(log)) >= lines - 1
    assert kills == 3
    subprocess.run(command, check=True, timeout=60)
    found = load(log)
    assert len(found) == 200 and all(record.scores["right"].value for record in found)
    times = asked.read_text().splitlines()
    assert set(times) == {f"text {i}" for i in range(200)}
    # Asked again is only what was with the solver when it was killed: four at most.
    assert len(times) - 200 <= 4 * kills
    positions = [json.loads(line)["position"] for line in log.read_text().splitlines()[1:]]
    assert sorted(positions) == list(range(200))


def test_an_answer_that_is_in_the_log_serves_other_samples_that_ask_the_same(service, tmp_path):
    log = tmp_path / "log.jsonl"
    samples = [Sample("same", str(i), f"s{i}") for i in range(3)]
    service("1")
    run("small", samples, log=log)
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:2]))
    client = service()
    assert [record.scores["exact"].value for record in run("small", samples, log=log)] == [False, True, False]
    assert client.requests == []


def test_a_run_that_goes_on_asks_again_only_what_had_no_answer(service, tmp_path):
    log = tmp_path / "log.jsonl"
    request = openai.APIConnectionError(request=None)
    service("0", request, "2", request, "4")
    first = run("small", log=log, concurrency=1)
    assert [record.answer.text for record in first] == ["0", None, "2", None, "4"]
    assert set(first.failures.id) == {"s1", "s3"} and "APIConnectionError" in first.failures.reason[0]
    client = service("1", "3")
    second = run("small", log=log, concurrency=1)
    assert [request["messages"][0]["content"] for request in client.requests] == ["question 1", "question 3"]
    assert [record.answer.text for record in second] == ["0", "1", "2", "3", "4"]
    assert list(load(log)) == list(second)


def test_an_endpoint_that_goes_away_is_asked_again_when_it_is_back(monkeypatch, tmp_path):
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body["messages"][0]["content"])
            if len(asked) == 8:
                self.server.away = True
            if self.server.away:
                self.close_connection = True  # without an answer
                return
            message = {"role": "assistant", "content": number_in(asked[-1])}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            reply = {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
            content = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    samples = [Sample(f"question {i}", str(i)) for i in range(20)]
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.away = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        monkeypatch.setattr(
            backend, "client", lambda: openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        )
        first = run("small", samples, log=tmp_path / "log.jsonl", concurrency=1)
        assert len(first) == 20 and len(first.failures) == 13
        assert all("APIConnectionError" in reason for reason in first.failures.reason)
        server.away, asked[:] = False, asked[:7] + ["padding"] * 2
        second = run("small", samples, log=tmp_path / "log.jsonl", concurrency=3)
        server.shutdown()
    assert len(second.failures) == 0 and second.estimate("exact").value == 1
    assert sorted(asked[9:]) == sorted(sample.input for sample in samples[7:])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"solver": len}, '{"function": "len"} now'),
        ({"samples": FIVE[:3]}, "samples: 5"),
        ({"samples": [Sample("other", id=sample.id) for sample in FIVE]}, "samples: 5"),
        ({"scorers": [exact, len]}, 'scorers: ["exact"] there, ["exact", "len"] now'),
        ({"epochs": 2}, "epochs: 1 there, 2 now"),
        ({"seed": 9}, "seed: 0 there, 9 now"),
    ],
)
def test_a_log_of_another_evaluation_is_refused_and_left_as_it_is(change, says, tmp_path):
    log = tmp_path / "log.jsonl"
    run(log=log)
    before = log.read_bytes()
    with pytest.raises(ValueError) as refused:
        run(log=log, **change)
    assert says in str(refused.value) and str(log) in str(refused.value)
    assert log.read_bytes() == before


def test_another_request_or_another_chat_is_another_evaluation(service, tmp_path):
    service("a", "b")
    run("small", FIVE[:1], log=tmp_path / "model.jsonl", temperature=0)
    with pytest.raises(ValueError, match=r'request: {"temperature": 0} there, {"temperature": 1} now'):
        run("small", FIVE[:1], log=tmp_path / "model.jsonl", temperature=1)
    run(Chat("Be kind.", model="small"), FIVE[:1], log=tmp_path / "chat.jsonl")
    with pytest.raises(ValueError, match=r"solver: .*Be kind.*Be short"):
        run(Chat("Be short.", model="small"), FIVE[:1], log=tmp_path / "chat.jsonl")


@pytest.mark.parametrize(
    "content", ["my notes", "my notes\n", '{"messages": []}\n', "[]\n", '{"format": 1}\n']
)
def test_a_file_that_is_no_log_is_refused_and_left_as_it_is(content, tmp_path):
    file = tmp_path / "notes"
    file.write_text(content)
    for use in (load, lambda path: run(log=path)):
        with pytest.raises(ValueError, match="is no log of"):
            use(file)
    assert file.read_text() == content


def test_two_processes_do_not_write_one_log(tmp_path):
    def solver(text):
        with pytest.raises(RuntimeError, match="another process"):
            run(log=log)
        return "refused"

    log = tmp_path / "log.jsonl"
    assert next(iter(run(solver, FIVE[:1], log=log))).answer.text == "refused"


@pytest.fixture
def interruptible():
    """Ctrl-C is heard also where pytest was started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_the_log_whole_and_says_how_to_go_on(tmp_path, capsys, interruptible):
    log, stopped = tmp_path / "log.jsonl", threading.Event()

    def solver(text):
        if text == "question 3" and not stopped.is_set():
            stopped.set()
            _thread.interrupt_main()
            time.sleep(1)
        return number_in(text)

    with pytest.raises(KeyboardInterrupt):
        run(solver, log=log, concurrency=1)
    assert f"stopped after 3 of 5 samples: the same call, with log={str(log)!r}" in capsys.readouterr().err
    assert [record.sample.id for record in load(log)] == ["s0", "s1", "s2"]
    before = log.read_bytes()
    time.sleep(1.2)  # the thread comes back, and what it brings is not written any more
    assert log.read_bytes() == before
    assert len(run(solver, log=log)) == 5


def test_a_log_that_cannot_be_written_ends_the_run(tmp_path, monkeypatch):
    def full(self, line, place, answered):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation_log.Log, "append", full)
    with pytest.raises(OSError, match="No space"):
        run(log=tmp_path / "log.jsonl")


def test_a_run_without_a_log_leaves_no_file_behind():
    found = run()
    path = Path(found.path)
    assert path.exists() and len(list(found)) == 5
    del found
    gc.collect()
    assert not path.exists()


def test_transcripts_stay_in_the_file():
    samples = [Sample(f"question {i}") for i in range(2000)]
    tracemalloc.start()
    found = run(lambda text: "y" * 50_000, samples)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 2000 and os.path.getsize(found.path) > 100e6
    assert peak < 10e6


def test_texts_come_back_from_the_log_as_they_were():
    odd = "half \ud83d, \x00, \u2028, ä\n\r\"'</script>"
    samples = [
        Sample(odd, target={"deep": [1, None, odd]}, id=odd, metadata={"when": Path("x"), "n": np.int64(3)})
    ]
    (record,) = run(lambda text: text, samples)
    assert record.sample.input == record.answer.text == record.sample.id == odd
    assert record.sample.target == {"deep": [1, None, odd]}
    assert record.sample.metadata == {"when": "x", "n": 3}


def test_a_missing_target_is_none_also_as_pandas_writes_it():
    seen = []
    run(
        samples=[Sample("a", float("nan")), Sample("b")],
        scorers=lambda answer, sample: seen.append(sample.target),
    )
    assert seen == [None, None]


# What is shown


@pytest.fixture(scope="module")
def mixed():
    """Five samples: three right, one wrong, one without an answer; one of them also without a label."""

    def label(answer, sample):
        return Score("<b>blue</b>" if sample.id != "s0" else None, answer.text, "why <i>not</i>")

    def solver(text):
        if text == "question 4":
            raise ValueError("<script>alert(1)</script>")
        return "<script>alert(2)</script>" if text == "question 3" else number_in(text)

    samples = [Sample(s.input, s.target, s.id, {"topic": f"t{s.id}"}) for s in FIVE]
    return run(solver, samples, [exact, label], name="<mixed>")


def test_the_frame_has_a_row_a_sample_and_its_columns(mixed):
    frame = mixed.frame()
    assert list(frame) == [*evaluation.COLUMNS, "exact", "label", "metadata.topic"]
    assert frame.id.tolist() == ["s0", "s1", "s2", "s3", "s4"]
    assert frame.exact.mean() == 0.75 and frame.exact.isna().tolist() == [False] * 4 + [True]
    assert frame.label[1] == "<b>blue</b>" and frame.label.isna().sum() == 2
    assert frame["metadata.topic"][2] == "ts2" and frame.target[2] == "2"


def test_the_summary_has_an_interval_or_says_why_not(mixed):
    summary = mixed.summary()
    assert (summary.value["exact"], summary.n["exact"], summary.missing["exact"]) == (0.75, 4, 1)
    assert 0 < summary.low["exact"] < 0.75 < summary.high["exact"] < 1
    assert np.isnan(summary.value["label"]) and "labels" in summary.why["label"]
    assert (summary.n["label"], summary.missing["label"]) == (3, 2)
    assert "4 of 5 answered" in repr(mixed) and "not defined: these are labels" in repr(mixed)


def test_one_sample_and_equal_scores_have_no_interval_that_is_wrong():
    one = run(samples=FIVE[:1], scorers=lambda answer, sample: 0.5).estimate("<lambda>")
    assert (one.value, one.low) == (0.5, None) and "one sample" in one.why
    equal = run(scorers=lambda answer, sample: 0.5).estimate("<lambda>")
    assert (equal.value, equal.low) == (0.5, None) and "equal" in equal.why
    right = run().estimate("exact")  # all right, and still not sure
    assert right.value == right.high == 1 and right.low < 0.7


def test_samples_of_one_conversation_count_for_less():
    alone = [Sample(f"question {i}", "0" if i < 20 else "x", f"s{i}") for i in range(40)]
    together = [Sample(s.input, s.target, s.id, {"conversation": int(s.id[1:]) // 10}) for s in alone]
    wide, narrow = (run(lambda text: "0", samples).estimate("exact") for samples in (together, alone))
    assert wide.value == narrow.value == 0.5
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_a_samples_epochs_are_one_value_and_not_many():
    answers = iter("0x" * 10)
    found = run(
        lambda text: next(answers), [Sample("q", "0", f"s{i}") for i in range(10)], epochs=2, concurrency=1
    )
    assert (found.estimate("exact").value, found.estimate("exact").n) == (0.5, 10)


def test_the_table_for_jupyter_is_escaped(mixed):
    page = BeautifulSoup(mixed._repr_html_(), "html.parser")
    assert "<mixed>: 4 of 5 answered" in page.caption.text
    assert [row.th.text for row in page.find_all("tr")] == ["exact", "label"]
    assert "0.75" in page.find_all("td")[0].text


def test_the_report_shows_every_transcript_as_text(mixed, tmp_path):
    assert mixed.report(tmp_path / "report.html") == tmp_path / "report.html"
    text = (tmp_path / "report.html").read_text()
    page = BeautifulSoup(text, "html.parser")
    assert page.h1.text == "<mixed>" and not page.find_all(["script", "i", "b"])
    entries = page.main.find_all("details")
    assert [entry["class"][0] for entry in entries] == ["none", "right", "right", "wrong", "none"]
    assert "<script>alert(2)</script>" in entries[3].text and "why <i>not</i>" in entries[3].text
    assert "<script>alert(1)</script>" in entries[4].text
    assert {box["id"] for box in page.find_all("input")} == {"all", "wrong", "right", "none", "label"}
    assert "http" not in text


def test_a_report_can_hold_half_a_character_and_tool_calls(tmp_path):
    call = {"id": "c", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    found = run(lambda text: Answer("half \ud83d", messages=messages), FIVE[:1])
    assert "calls" in found.report(tmp_path / "report.html").read_text()


# Two runs


def pair(old, new, **options):
    """A comparison of two runs whose scores are given, sample by sample; None is not scored."""
    runs = []
    for scores in (old, new):
        samples = [
            Sample(f"q{i}", id=f"s{i}", metadata=options.get("metadata", {})) for i in range(len(scores))
        ]
        value = dict(zip((s.id for s in samples), scores, strict=True))
        runs.append(run(lambda text: text, samples, lambda answer, sample, value=value: value[sample.id]))
    return compare(*runs, margin=options.get("margin", 0.0))


@pytest.mark.parametrize(
    ("old", "new", "margin", "verdict"),
    [
        ([1] * 80 + [0] * 20, [1] * 50 + [0] * 50, 0, "worse"),
        ([1] * 50 + [0] * 50, [1] * 80 + [0] * 20, 0, "better"),
        ([1] * 80 + [0] * 20, [1] * 78 + [0] * 22, 0, "cannot tell"),
        ([1] * 80 + [0] * 20, [1] * 60 + [0] * 40, 0.1, "worse"),
        ([1] * 80 + [0] * 20, [1] * 60 + [0] * 40, 0.2, "cannot tell"),
        ([1] * 50 + [0] * 50, [1] * 80 + [0] * 20, 0.5, "better"),
        ([1] * 50, [1] * 50, 0, "cannot tell"),
        ([0.5] * 50, [0.5] * 50, 0, "cannot tell"),
        ([1], [0], 0, "cannot tell"),
        ([0.1, 0.2, 0.3, 0.5] * 10, [0.3, 0.3, 0.6, 0.9] * 10, 0, "better"),
        ([None, 1, 1], [1, None, 1], 0, "cannot tell"),
        ([None, 1], [1, None], 0, "cannot tell"),
    ],
)
def test_the_verdict_follows_the_interval_of_the_difference(old, new, margin, verdict):
    found = pair(old, new, margin=margin)
    assert found.verdict == verdict, found
    assert str(found).startswith(f"<lambda>: {verdict}\n")


def test_a_system_that_fails_more_often_is_worse_though_the_rest_is_as_good():
    failing = pair([1] * 40, [1] * 30 + [None] * 10)
    assert failing.verdict == "worse" and failing.scored.worse == 10, failing
    assert "scored" in str(failing) and "10 worse" not in str(failing.difference)
    assert pair([1] * 30 + [None] * 10, [1] * 40).verdict == "cannot tell"
    assert pair([1] * 40, [1] * 39 + [None], margin=0.05).verdict == "cannot tell"


def test_a_log_is_refused_once_the_function_was_rewritten(tmp_path):
    def first(text):
        return "1"

    def second(text):
        return "2"

    second.__name__ = "first"
    run(first, FIVE, log=tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match="solver"):
        run(second, FIVE, log=tmp_path / "log.jsonl")


def test_a_log_is_refused_once_another_value_was_filled_into_a_function(tmp_path):
    asked = []

    def answer(text, word):
        asked.append(text)
        return word

    first, second = partial(answer, word="1"), partial(answer, word="2")
    run(first, FIVE, log=tmp_path / "log.jsonl")
    run(first, FIVE, log=tmp_path / "log.jsonl")
    assert len(asked) == len(FIVE)
    with pytest.raises(ValueError, match="solver"):
        run(second, FIVE, log=tmp_path / "log.jsonl")


def test_a_set_is_written_the_same_way_by_every_process():
    code = "from companion.evaluation_log import as_json; print(as_json({'a', 'b', 'c', 'd'}).decode())"
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "123"
    }
    assert said == {'["a", "b", "c", "d"]\n'}


def test_a_comparison_says_what_changed_and_what_was_left_out():
    old = run(lambda text: number_in(text), FIVE[:4], name="old prompt")
    samples = [FIVE[0], Sample("question 1", "one", "s1"), FIVE[2], FIVE[3], FIVE[4]]
    new = run(lambda text: None if text == "question 0" else "2", samples, name="new prompt")
    found = compare(old, new)
    assert found.left_out == {"without a score in new": 1, "with another target": 1, "only in new": 1}
    assert found.changed[["id", "old_score", "new_score", "old_answer", "new_answer"]].values.tolist() == [
        ["s3", 1.0, 0.0, "3", "2"]
    ]
    text = str(found)
    assert (
        "old prompt: 1.00" in text and "new prompt: 0.50" in text and "0 better, 1 worse, 1 the same" in text
    )
    assert "1 with another target" in text
    assert [row.th.text for row in BeautifulSoup(found._repr_html_(), "html.parser").find_all("tr")] == [
        line.split("  ")[1] for line in text.splitlines()[1:]
    ]


def test_too_few_samples_to_tell_says_how_many_would_do():
    found = pair([1] * 16 + [0] * 4, [1] * 13 + [0] * 6 + [1])
    assert found.verdict == "cannot tell" and found.difference.difference.value == pytest.approx(-0.1)
    # Connor's formula: a fifth of the samples differ, by 0.1 in all.
    expected = (1.959964 * 0.2**0.5 + 0.841621 * (0.2 - 0.01) ** 0.5) ** 2 / 0.1**2
    assert found.needed == pytest.approx(expected, abs=1)
    assert f"about {found.needed:,} samples" in str(found)


def test_more_samples_are_needed_for_graded_scores_too():
    drawn = random.Random(0)
    old = [drawn.random() for _ in range(40)]
    new = [value + drawn.gauss(0.05, 0.3) for value in old]
    found = pair(old, new)
    assert found.verdict == "cannot tell"
    d = np.subtract(new, old)
    assert found.needed == pytest.approx((2.802 * d.std(ddof=1) / d.mean()) ** 2, rel=0.1)


def test_epochs_are_averaged_before_they_are_compared():
    once = run(lambda text: "0", FIVE)
    answers = iter(["0", "x"] * 5)
    twice = run(lambda text: next(answers), FIVE, epochs=2, concurrency=1)
    found = compare(once, twice)
    assert found.difference.difference.n == 5
    assert found.changed.new_score.tolist() == [0.5] and found.changed.old_score.tolist() == [1]


def test_conversations_make_a_difference_less_sure():
    old, new = [1] * 80 + [0] * 20, [1] * 60 + [0] * 40
    alone = pair(old, new).difference.difference
    runs = []
    for scores in (old, new):
        samples = [Sample(f"q{i}", id=f"s{i}", metadata={"conversation": i // 20}) for i in range(100)]
        value = dict(zip((s.id for s in samples), scores, strict=True))
        runs.append(run(lambda text: text, samples, lambda answer, sample, value=value: value[sample.id]))
    together = compare(*runs).difference.difference
    assert together.value == alone.value
    assert together.high - together.low > 2 * (alone.high - alone.low)


def conversations(scores):
    """A run of 40 samples, each in a conversation of its own."""
    samples = [Sample(f"q{i}", id=f"s{i}", metadata={"conversation": i}) for i in range(40)]
    answers = {sample.input: score for sample, score in zip(samples, scores, strict=True)}
    return run(
        lambda text: None if answers[text] is None else text,
        samples,
        lambda answer, sample: answers[sample.input],
    )


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ([1] * 40, [0] * 40, "worse"),
        ([0] * 40, [1] * 40, "better"),
        ([1] * 40, [None] * 40, "worse"),
        ([1] * 40, [1] * 40, "cannot tell"),
        ([0.5] * 40, [0.25] * 40, "worse"),
    ],
)
def test_a_change_that_is_the_same_everywhere_is_told_though_it_has_no_interval(old, new, verdict):
    found = compare(conversations(old), conversations(new))
    assert found.verdict == verdict, found
    if None not in new:
        assert pair(old, new).verdict == verdict


def test_a_change_of_one_sample_that_is_within_the_margin_or_alone_is_not_told():
    assert pair([1], [0]).verdict == pair([0.5], [0.25]).verdict == "cannot tell"
    assert pair([0.5] * 40, [0.45] * 40, margin=0.1).verdict == "cannot tell"


def test_runs_that_cannot_be_compared_are_refused():
    first = run()
    with pytest.raises(ValueError, match="no sample in common"):
        compare(first, run(samples=[Sample("question 9", id="other")]))
    both = run(scorers=[exact, len_of])
    with pytest.raises(ValueError, match=r"which scorer.*exact, len_of"):
        compare(both, both)
    with pytest.raises(ValueError, match="no scorer 'other': choose one of exact, len_of"):
        compare(both, both, "other")
    assert compare(both, first).scorer == "exact"
    with pytest.raises(ValueError, match="share none"):
        compare(first, run(scorers=len_of))
    labels = run(scorers=lambda answer, sample: "label")
    with pytest.raises(ValueError, match="labels"):
        compare(labels, labels)
    with pytest.raises(ValueError, match="margin must be 0 or more, not -1"):
        compare(first, first, margin=-1)


def len_of(answer, sample):
    return len(answer.text)


def test_a_gate_stops_a_worse_solver_and_lets_others_pass_20_times_of_20():
    """A solver that is right on 65 % instead of 90 % fails the gate, one that is as good as before passes."""
    samples = [Sample(f"question {i}", str(i)) for i in range(300)]

    def solver(share, seed):
        return lambda text: number_in(text) if random.Random(f"{seed} {text}").random() < share else "no"

    def gate(old, new):
        comparison = compare(old, new, margin=0.05)
        assert comparison.verdict != "worse", comparison

    for seed in range(20):
        old = run(solver(0.9, f"old {seed}"), samples)
        gate(old, run(solver(0.9, f"same {seed}"), samples))
        with pytest.raises(AssertionError, match=r"exact: worse\n.*old.*0\.\d+ \("):
            gate(old, run(solver(0.65, f"worse {seed}"), samples))


# With the model
@pytest.mark.slow
def test_the_local_model_is_evaluated_twice_alike(client, tmp_path):
    samples = [Sample("Say hello."), Sample("Name a colour."), Sample("Where is my parcel?")]

    def said(answer, sample):
        return bool(answer.text.strip())

    once = run(backend.chat_model(), samples, said, max_tokens=8, temperature=0, concurrency=1)
    again = run(backend.chat_model(), samples, said, max_tokens=8, temperature=0, concurrency=1)
    assert [record.answer.text for record in once] == [record.answer.text for record in again]
    assert once.estimate("said").value == 1 and (once.frame().tokens > 8).all()
