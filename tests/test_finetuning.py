"""Jobs against a scripted service, through the real SDK: what is sent, what is shown, what is waited for."""

import json
import math
import re
import sys
from types import SimpleNamespace

import httpx2
import openai
import pytest
import scripted

from companion import backend, dataset, finetuning

EXAMPLES = [
    {"messages": [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Hello"}]}
    for i in range(12)
]
AWAY = httpx2.ConnectError("nobody listens")
EVENTS = [
    scripted.event(0),
    *(scripted.event(i, {"step": i, "total_steps": 6, "train_loss": 3 / i}) for i in range(1, 5)),
    scripted.event(5, {"step": 4, "total_steps": 6, "train_loss": 0.75, "valid_loss": 0.9}),
    scripted.event(6),
    scripted.event(7, {"step": 5, "total_steps": 6, "train_loss": 0.6, "train_mean_token_accuracy": 0.8}),
    scripted.event(8, {"step": 6, "total_steps": 6, "train_loss": 0.5, "valid_loss": 0.7}),
]
DONE = {"status": "succeeded", "fine_tuned_model": "ft:scripted:1"}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Sleeping only moves the clock."""
    now = [0.0]
    clock = SimpleNamespace(
        sleep=lambda seconds: now.__setitem__(0, now[0] + seconds),
        monotonic=lambda: now[0],
        time=lambda: 1000,
    )
    monkeypatch.setattr(finetuning, "time", clock)
    return now


def test_a_job_is_created_from_examples_with_all_that_was_asked():
    service = scripted.Service()
    job = finetuning.fine_tune(
        EXAMPLES,
        EXAMPLES[:10],
        model="base",
        suffix="triage",
        n_epochs=2,
        batch_size=4,
        learning_rate_multiplier=0.5,
        seed=0,
        early_stopping_patience=1,
        client=service.client,
    )
    assert (job.id, job.status) == ("ftjob-1", "validating_files")
    numbers = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5, "early_stopping_patience": 1}
    assert service.sent("POST", "/fine_tuning/jobs") == [
        {
            "model": "base",
            "suffix": "triage",
            "seed": 0,
            "training_file": "file-0",
            "validation_file": "file-1",
            "method": {"type": "supervised", "supervised": {"hyperparameters": numbers}},
        }
    ]
    assert [json.loads(line) for line in service.files["file-0"].splitlines()] == EXAMPLES
    assert len(service.files["file-1"].splitlines()) == 10


def test_a_file_is_sent_as_it_is_and_the_rest_is_left_to_the_endpoint(tmp_path):
    path = tmp_path / "mine.jsonl"
    dataset.save(EXAMPLES, path)
    service = scripted.Service()
    finetuning.fine_tune(path, client=service.client)
    assert service.files == {"file-0": path.read_bytes()}
    (sent,) = service.sent("POST", "/fine_tuning/jobs")
    assert sent.keys() == {"model", "training_file", "method"}
    assert sent["model"] == backend.CHAT_MODEL
    assert set(sent["method"]["supervised"]["hyperparameters"].values()) == {"auto"}


@pytest.mark.parametrize("which", ["training", "validation"])
def test_nothing_is_sent_where_an_example_is_bad(which, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("nonsense\n")
    service = scripted.Service()
    for data in (bad, str(bad), [{"messages": []}]):
        sets = {"training": EXAMPLES, "validation": EXAMPLES} | {which: data}
        with pytest.raises(dataset.DatasetError, match="line 1: ") as caught:
            finetuning.fine_tune(**sets, client=service.client)
        assert len(caught.value.problems) == 1
    assert service.requests == []


def test_what_was_uploaded_is_removed_where_the_job_is_refused():
    service = scripted.Service(refuse="no such model")
    with pytest.raises(openai.BadRequestError, match="no such model"):
        finetuning.fine_tune(EXAMPLES, EXAMPLES, model="none", client=service.client)
    assert len(service.sent("POST", "/files")) == 2 and service.files == {}


def test_a_hosted_service_gets_nothing_that_only_the_local_endpoint_knows(monkeypatch):
    monkeypatch.setenv("COMPANION_BACKEND", "openai")
    monkeypatch.setenv("OPENAI_MODEL", "gpt-hosted")
    service = scripted.Service()
    with pytest.warns(UserWarning, match="early stopping"):
        finetuning.fine_tune(EXAMPLES, early_stopping_patience=2, client=service.client)
    (sent,) = service.sent("POST", "/fine_tuning/jobs")
    assert sent["model"] == "gpt-hosted" and "early_stopping_patience" not in json.dumps(sent)


def test_curves_read_all_pages_and_join_what_belongs_to_a_step():
    service = scripted.Service(events=EVENTS)
    frame = finetuning.curves("ftjob-1", client=service.client)
    assert list(frame) == [
        "step",
        "train_loss",
        "valid_loss",
        "train_mean_token_accuracy",
        "valid_mean_token_accuracy",
    ]
    assert list(frame["step"]) == [1, 2, 3, 4, 5, 6]
    assert list(frame["train_loss"]) == [3.0, 1.5, 1.0, 0.75, 0.6, 0.5]
    assert list(frame["valid_loss"].dropna()) == [0.9, 0.7]
    assert frame["train_mean_token_accuracy"][4] == 0.8 and math.isnan(frame["train_mean_token_accuracy"][0])
    assert len(service.sent("GET", "/fine_tuning/jobs/ftjob-1/events")) == 3


def test_curves_of_a_job_that_has_not_begun_are_an_empty_table():
    frame = finetuning.curves("ftjob-1", client=scripted.Service(events=EVENTS[:1]).client)
    assert len(frame) == 0 and frame["valid_loss"].dtype == float


def test_a_job_is_followed_from_the_queue_to_its_end(capsys):
    service = scripted.Service(
        {"status": "validating_files", "events": 1},
        {"status": "queued", "events": 1},
        {"status": "running", "events": 4},
        {"status": "paused", "events": 6},
        {"status": "running", "events": 7},
        DONE,
        events=EVENTS,
    )
    job = finetuning.follow("ftjob-1", client=service.client)
    assert (job.status, job.fine_tuned_model) == ("succeeded", "ft:scripted:1")
    shown = capsys.readouterr().err
    for state in ("checking its files", "waits for its turn", "is running", "is paused", "has succeeded"):
        assert state in shown
    assert "6/6" in shown and "training loss 0.500, validation loss 0.700" in shown


def test_only_new_events_are_asked_for():
    moments = [{"status": "running", "events": 8}] * 5
    service = scripted.Service(*moments, DONE, events=EVENTS)
    finetuning.follow("ftjob-1", client=service.client)
    assert len(service.sent("GET", "/fine_tuning/jobs/ftjob-1/events")) == 3 + 5


def test_a_job_that_has_ended_is_shown_at_once():
    service = scripted.Service(DONE, events=EVENTS)
    assert finetuning.follow(openai_job(), client=service.client).status == "succeeded"
    service = scripted.Service({"status": "cancelled"})
    assert finetuning.follow("ftjob-1", client=service.client).status == "cancelled"


def openai_job(**fields):
    from openai.types.fine_tuning import FineTuningJob

    return FineTuningJob.model_validate(scripted.job("queued", **fields))


def test_a_job_that_failed_raises_its_own_words():
    error = {"code": "invalid_training_file", "message": "line 3 is no JSON", "param": "training_file"}
    service = scripted.Service({"status": "failed", "error": error})
    with pytest.raises(finetuning.FineTuningError, match="ftjob-1 failed: line 3 is no JSON"):
        finetuning.follow("ftjob-1", client=service.client)


def test_an_endpoint_that_restarts_elsewhere_is_found_again(monkeypatch, no_waiting):
    before = scripted.Service({"status": "running", "events": 3}, AWAY, events=EVENTS)
    after = scripted.Service(AWAY, DONE, events=EVENTS)
    clients = iter([before.client, before.client, after.client, after.client])
    monkeypatch.setattr(backend, "client", lambda: next(clients))
    assert finetuning.follow("ftjob-1").fine_tuned_model == "ft:scripted:1"
    assert no_waiting[0] == 0.5 + 0.5 + 1


def test_an_endpoint_that_stays_away_is_given_up_after_five_minutes(no_waiting):
    with pytest.raises(openai.APIConnectionError):
        finetuning.follow("ftjob-1", client=scripted.Service(AWAY).client)
    assert 250 < no_waiting[0] <= finetuning.PATIENCE


def test_what_the_endpoint_refuses_is_not_asked_again(no_waiting):
    service = scripted.Service(DONE)
    with pytest.raises(openai.NotFoundError):
        finetuning.follow("ftjob-none", client=service.client)
    assert no_waiting[0] == 0


def test_ctrl_c_leaves_the_job_running_and_says_how_to_come_back(monkeypatch, capsys):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetuning.time, "sleep", interrupt)
    service = scripted.Service({"status": "running"}, events=EVENTS)
    assert finetuning.follow("ftjob-1", client=service.client).status == "running"
    assert "follow('ftjob-1')" in capsys.readouterr().err
    assert {method for method, _, _ in service.requests} == {"GET"}


@pytest.fixture
def jupyter(monkeypatch):
    """A notebook: what `display` puts into a cell's output, by its display id."""
    import IPython
    from IPython import display as module

    outputs, updates = {}, []

    class Handle:
        def update(self, page):
            outputs["one"] = page.data
            updates.append(page.data)

    def display(page, display_id):
        assert display_id is True and not outputs
        outputs["one"] = page.data
        return Handle()

    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setattr(module, "display", display)
    return SimpleNamespace(outputs=outputs, updates=updates)


def test_in_jupyter_one_display_is_updated_and_holds_bar_and_curves_at_the_end(jupyter, capsys):
    service = scripted.Service(
        {"status": "queued", "events": 1},
        {"status": "queued", "events": 1},
        {"status": "running", "events": 4, "estimated_finish": 1300},
        {"status": "paused", "events": 6},
        DONE,
        events=EVENTS,
    )
    finetuning.follow("ftjob-1", client=service.client)
    assert list(jupyter.outputs) == ["one"] and len(jupyter.updates) == 4
    assert "about 5 min left" in jupyter.updates[1] and 'max="6" value="3"' in jupyter.updates[1]
    assert "jobs.resume(&#x27;ftjob-1&#x27;)" in jupyter.updates[2]
    last = jupyter.outputs["one"]
    assert "ftjob-1 has succeeded: ft:scripted:1" in last and "step 6 of 6" in last
    alt = re.search(r'<img alt="([^"]*)"', last)[1]
    assert "training loss from 3.00 to 0.50" in alt and "validation loss from 0.90 to 0.70" in alt
    assert capsys.readouterr() == ("", "")
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_in_jupyter_the_curves_can_be_left_out_and_a_failure_is_escaped(jupyter):
    error = {"code": "x", "message": "<b>NaN</b>", "param": None}
    service = scripted.Service({"status": "failed", "error": error}, events=EVENTS)
    with pytest.raises(finetuning.FineTuningError):
        finetuning.follow("ftjob-1", client=service.client, plot=False)
    assert "<img" not in jupyter.outputs["one"] and "&lt;b&gt;NaN" in jupyter.outputs["one"]


def test_curves_are_not_drawn_at_every_step(jupyter, monkeypatch):
    drawn = []
    monkeypatch.setattr(finetuning, "_figure", lambda rows: drawn.append(len(rows)) or "")
    moments = [{"status": "running", "events": n} for n in (2, 3, 4, 5, 6, 7, 8)]
    finetuning.follow("ftjob-1", client=scripted.Service(*moments, DONE, events=EVENTS).client)
    assert len(drawn) == 2 and drawn[-1] == 6  # seven looks in 3.5 s, and the end
