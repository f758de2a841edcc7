"""Files and fine-tuning jobs as the openai SDK sees them, on real endpoints, with a trainer that pretends.

What is answered is read by the SDK's own types, strictly.
"""

import contextlib
import io
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import gguf
import httpx
import numpy as np
import openai
import pandas as pd
import psutil
import pytest
from disks import fill, small_disk
from openai.types import FileDeleted, FileObject, Model, ModelDeleted
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

from companion import finetuning
from companion.backend import CHAT_MODEL, EMBEDDING_MODEL
from companion.local import jobs, supervisor
from companion.local.store import Store
from companion.local.wire import ApiError

LAUNCH = """
import sys
from companion.local import files, gateway, supervisor
supervisor.TRAINER = [sys.executable, sys.argv[1]]
supervisor.PATIENCE = 3.0
files.LARGEST_FILE = 48 << 20
gateway._warm = lambda state: None
gateway.serve(token="local-test", shared=False, idle=float(sys.argv[2]))
"""
FINISHED = ("succeeded", "failed", "cancelled")


class Endpoint:
    """An endpoint in a home of its own, that can be killed and started again."""

    def __init__(self, home: Path, models: Path) -> None:
        self.home = home
        if not (home / "models").exists():
            (home / "models").symlink_to(models)
        self.play()

    def play(self, **how) -> None:
        """What the trainer does from now on."""
        (self.home / "play.json").write_text(json.dumps(how))

    def start(self, idle: float = 0) -> openai.OpenAI:
        command = [sys.executable, "-c", LAUNCH, str(Path(__file__).with_name("trainer.py")), str(idle)]
        environment = os.environ | {"COMPANION_HOME": str(self.home)}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
        address = self.process.stdout.readline().strip().partition("=")[2]
        assert address, "the endpoint did not start"
        self.client = openai.OpenAI(base_url=address, api_key="local-test", max_retries=0, timeout=60)
        return self.client

    def end(self, kill: bool = False) -> None:
        self.process.kill() if kill else self.process.terminate()
        self.process.wait(20)
        self.process.stdout.close()

    def trainers(self) -> list[int]:
        """The ids of the trainers that were started in this home."""
        with contextlib.suppress(FileNotFoundError):
            return [int(line) for line in (self.home / "starts").read_text().split()]
        return []


@pytest.fixture
def make_endpoint(companion_home, tmp_path):
    """Makes endpoints; what they leave running is ended."""
    made = []

    def make(name: str = "home", home: Path | None = None) -> Endpoint:
        if home is None:
            home = tmp_path / name
            home.mkdir(exist_ok=True)
        made.append(Endpoint(home, companion_home / "models"))
        return made[-1]

    yield make
    for one in made:
        if one.process.poll() is None:
            one.end()


@pytest.fixture(scope="module")
def endpoint(companion_home, tmp_path_factory):
    """One endpoint for the tests that leave it as it is."""
    found = Endpoint(tmp_path_factory.mktemp("jobs"), companion_home / "models")
    found.start()
    yield found
    found.end()
    assert not (found.home / "clash").exists(), "two trainers worked in one folder"


@pytest.fixture
def client(endpoint):
    endpoint.play()
    return endpoint.client


def example(number: int = 0, **more) -> dict:
    said = [("user", f"Where is parcel {number}?"), ("assistant", "On its way.")]
    return {"messages": [{"role": role, "content": text} for role, text in said]} | more


def written(examples: list) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in examples)


LACKING = '--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n{}\r\n--x--\r\n'
TWELVE = written([example(number) for number in range(12)])


def upload(client, data: bytes = TWELVE, name: str = "train.jsonl") -> str:
    return client.files.create(file=(name, data), purpose="fine-tune").id


def submit(client, data: bytes = TWELVE, **options) -> str:
    options.setdefault("training_file", None)
    options["training_file"] = options["training_file"] or upload(client, data)
    raw = client.fine_tuning.jobs.with_raw_response.create(**({"model": CHAT_MODEL} | options))
    return FineTuningJob.model_validate(json.loads(raw.text), strict=True).id


def retrieve(client, job_id: str) -> FineTuningJob:
    return client.fine_tuning.jobs.retrieve(job_id)


def reach(client, job_id: str, *statuses: str, seconds: float = 30) -> FineTuningJob:
    """The job, once it has one of these statuses."""
    deadline = time.monotonic() + seconds
    while (job := retrieve(client, job_id)).status not in statuses:
        assert time.monotonic() < deadline, f"still {job.status} after {seconds} s"
        assert job.status not in FINISHED, f"{job.status}: {job.error}"
        time.sleep(0.02)
    return job


def events(client, job_id: str, limit: int = 1000) -> list[FineTuningJobEvent]:
    """All events of a job, the oldest first."""
    return list(client.fine_tuning.jobs.list_events(job_id, limit=limit))[::-1]


def steps_done(client, job_id: str) -> list[int]:
    """The steps that the events report, evaluations left out."""
    found = [one.data for one in events(client, job_id) if one.type == "metrics"]
    return [data["step"] for data in found if "full_valid_loss" not in data]


def comes_true(condition, seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# --- files --------------------------------------------------------------------------------------------------


def test_a_file_is_uploaded_retrieved_read_and_deleted(client):
    raw = client.files.with_raw_response.create(file=("träin.jsonl", TWELVE), purpose="fine-tune")
    file = FileObject.model_validate(json.loads(raw.text), strict=True)
    assert (file.bytes, file.filename, file.purpose) == (len(TWELVE), "träin.jsonl", "fine-tune")
    assert client.files.wait_for_processing(file.id).status == "processed"
    assert client.files.content(file.id).read() == TWELVE
    assert file.id in [one.id for one in client.files.list()]
    raw = client.files.with_raw_response.delete(file.id)
    assert FileDeleted.model_validate(json.loads(raw.text), strict=True).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match=file.id):
            call(file.id)
    assert file.id not in [one.id for one in client.files.list()]


def test_files_are_listed_in_pages_by_purpose_and_in_both_orders(client):
    made = [upload(client, b"{}\n", f"{number}.jsonl") for number in range(5)]
    newest = client.files.list(limit=2)
    assert [one.id for one in newest.data] == [made[4], made[3]]
    assert newest.has_more
    assert [one.id for one in client.files.list(limit=2, order="desc")][:5] == made[::-1]
    ascending = [one.id for one in client.files.list(limit=2, order="asc", purpose="fine-tune")]
    assert ascending[-5:] == made
    assert made[0] not in [one.id for one in client.files.list(purpose="fine-tune-results")]
    behind = client.files.list(after=made[2], limit=10, order="asc")
    assert [one.id for one in behind.data] == made[3:]
    with pytest.raises(openai.NotFoundError):
        client.files.list(after="file-none")
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.list(limit=0)
    assert refused.value.param == "limit"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"purpose": "user_data"}, "purpose"),
        ({"purpose": "fine-tune-results"}, "purpose"),
        ({"expires_after": {"anchor": "created_at", "seconds": 3600}}, "expires_after"),
    ],
)
def test_what_files_are_not_taken_for_is_refused_and_leaves_nothing(client, endpoint, options, param):
    before = sorted((endpoint.home / "files").iterdir())
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(**({"file": ("a.jsonl", TWELVE), "purpose": "fine-tune"} | options))
    assert refused.value.param == param
    assert sorted((endpoint.home / "files").iterdir()) == before


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "multipart/form-data", "text/plain"])
@pytest.mark.parametrize(
    "body", ["", "nonsense", "--x\r\n", "--x--", LACKING.replace("file", "fail"), LACKING[:-9]]
)
def test_a_body_that_is_no_whole_upload_is_refused(client, endpoint, body, kind):
    before = sorted((endpoint.home / "files").iterdir())
    headers = {"authorization": f"Bearer {client.api_key}", "content-type": kind}
    answer = httpx.post(f"{client.base_url}files", content=body, headers=headers, trust_env=False)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert sorted((endpoint.home / "files").iterdir()) == before


def test_a_large_file_goes_to_disk_and_one_that_is_too_large_is_refused(client, endpoint):
    process = psutil.Process(endpoint.process.pid)
    before, data = process.memory_info().rss, bytes(40 << 20)
    file_id = upload(client, data)
    assert process.memory_info().rss - before < 20 << 20
    assert client.files.retrieve(file_id).bytes == len(data)
    client.files.delete(file_id)
    names = sorted((endpoint.home / "files").iterdir())
    with pytest.raises(openai.APIStatusError, match="48 MB") as refused:
        upload(client, bytes(49 << 20))
    assert refused.value.status_code == 413
    assert sorted((endpoint.home / "files").iterdir()) == names


# --- a job from its file to its model -----------------------------------------------------------------------


def test_a_job_goes_from_its_files_to_a_model_and_says_so(client, endpoint):
    endpoint.play(pace=0.1)
    validation = upload(client, written([example(0)]))
    job_id = submit(client, validation_file=validation, suffix="My-shop_1", seed=7, metadata={"a": "b"})
    running = reach(client, job_id, "running")
    assert comes_true(lambda: retrieve(client, job_id).estimated_finish is not None)
    assert running.finished_at is running.fine_tuned_model is running.trained_tokens is None
    reach(client, job_id, "succeeded")
    raw = client.fine_tuning.jobs.with_raw_response.retrieve(job_id)
    job = FineTuningJob.model_validate(json.loads(raw.text), strict=True)
    assert job.fine_tuned_model == f"ft:{CHAT_MODEL}:personal:My-shop_1:{job_id[6:14]}"
    assert (job.seed, job.metadata, job.trained_tokens) == (7, {"a": "b"}, 80)
    assert job.created_at <= job.finished_at
    assert job.estimated_finish is job.error is None
    assert job.hyperparameters.model_dump() == {
        "n_epochs": 9,
        "batch_size": 1,
        "learning_rate_multiplier": 1.0,
    }
    assert job.method.supervised.hyperparameters.n_epochs == 9

    raw = client.fine_tuning.jobs.with_raw_response.list_events(job_id, limit=100)
    found = [FineTuningJobEvent.model_validate(one, strict=True) for one in json.loads(raw.text)["data"]][
        ::-1
    ]
    said = [one.message for one in found if one.type == "message" and not one.message.startswith("{")]
    assert said == [
        f"Created fine-tuning job: {job_id}",
        f"Validating training file: {job.training_file}",
        f"Validating validation file: {validation}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "Checkpoint created at step 4",
        "Checkpoint created at step 8",
        "New fine-tuned model created",
        "The job has successfully completed",
    ]
    metrics = [one for one in found if one.type == "metrics"]
    assert metrics[1].message == "Step 2/8: training loss=0.50"
    assert metrics[1].data == {
        "step": 2,
        "total_steps": 8,
        "train_loss": 0.5,
        "train_mean_token_accuracy": 0.5,
    }
    assert metrics[4].message == "Step 4/8: training loss=0.25, validation loss=0.50"
    assert metrics[4].data["full_valid_loss"] == metrics[4].data["valid_loss"] == 0.5
    assert metrics[4].data["train_loss"] == 0.25

    table = pd.read_csv(io.BytesIO(client.files.content(job.result_files[0]).read()))
    assert list(table) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert list(table.step) == list(range(1, 9))
    assert table.train_loss[1] == table.train_accuracy[1] == 0.5
    assert list(table.valid_loss.dropna()) == [0.5, 0.25]
    assert client.files.retrieve(job.result_files[0]).purpose == "fine-tune-results"

    raw = client.fine_tuning.jobs.checkpoints.with_raw_response.list(job_id)
    checkpoints = [
        FineTuningJobCheckpoint.model_validate(one, strict=True) for one in json.loads(raw.text)["data"]
    ]
    assert [one.step_number for one in checkpoints] == [8, 4]
    assert checkpoints[1].metrics.full_valid_loss == 0.5
    assert checkpoints[1].fine_tuned_model_checkpoint == f"{job.fine_tuned_model}:ckpt-step-4"
    names = {one.id for one in client.models.list()}
    assert {job.fine_tuned_model, *(one.fine_tuned_model_checkpoint for one in checkpoints)} < names
    raw = client.models.with_raw_response.retrieve(job.fine_tuned_model)
    assert Model.model_validate(json.loads(raw.text), strict=True).owned_by == "personal"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter that makes the model say something else."""
    file = tmp_path_factory.mktemp("adapter") / "adapter.gguf"
    out, random = gguf.GGUFWriter(file, "llama"), np.random.default_rng(1)
    out.add_type("adapter")
    out.add_string("adapter.type", "lora")
    out.add_float32("adapter.lora.alpha", 4.0)
    for side, shape in (("lora_a", (4, 576)), ("lora_b", (576, 4))):
        out.add_tensor(f"blk.0.attn_output.weight.{side}", random.normal(size=shape).astype(np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return str(file)


def test_a_tuned_model_answers_at_once_until_it_is_deleted(client, endpoint, adapter):
    endpoint.play(adapter=adapter)
    job = reach(client, submit(client), "succeeded")
    checkpoint = client.fine_tuning.jobs.checkpoints.list(job.id).data[0].fine_tuned_model_checkpoint

    def said(model: str) -> str:
        asked = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8, "temperature": 0}
        answer = client.chat.completions.create(model=model, **asked)
        chunks = client.chat.completions.create(model=model, stream=True, **asked)
        assert answer.model == model
        text = answer.choices[0].message.content
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
        return text

    text = said(job.fine_tuned_model)
    assert text != said(CHAT_MODEL)
    answer = client.responses.create(
        model=job.fine_tuned_model, input="Say hello.", max_output_tokens=16, temperature=0
    )
    assert answer.output_text.startswith(text)
    with pytest.raises(openai.BadRequestError, match="no embedding model"):
        client.embeddings.create(model=job.fine_tuned_model, input="a")
    raw = client.models.with_raw_response.delete(job.fine_tuned_model)
    assert ModelDeleted.model_validate(json.loads(raw.text), strict=True).deleted
    assert not list((endpoint.home / "jobs" / job.id).glob("model*"))
    for call in (said, client.models.retrieve, client.models.delete):
        with pytest.raises(openai.NotFoundError):
            call(job.fine_tuned_model)
    assert retrieve(client, job.id).fine_tuned_model == job.fine_tuned_model
    assert said(checkpoint) == text
    client.models.delete(checkpoint)
    assert len(client.fine_tuning.jobs.checkpoints.list(job.id).data) == 1


def test_a_checkpoint_that_the_trainer_dropped_is_no_longer_listed(client, endpoint):
    endpoint.play(steps=20)
    job = reach(client, submit(client), "succeeded")
    listed = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=2))
    assert [one.step_number for one in listed] == [20, 16, 12]
    names = [one.id for one in client.models.list()]
    assert f"{job.fine_tuned_model}:ckpt-step-12" in names
    assert f"{job.fine_tuned_model}:ckpt-step-4" not in names


def test_the_trainer_is_told_what_was_asked_for(client):
    def order(**options) -> dict:
        job = reach(client, submit(client, **options), "succeeded")
        return next(json.loads(one.message) for one in events(client, job.id) if one.message[0] == "{")

    numbers = {"n_epochs": 2, "batch_size": 3, "learning_rate_multiplier": 0.5}
    told = order(method={"type": "supervised", "supervised": {"hyperparameters": numbers}}, seed=5)
    assert {name: told[name] for name in numbers} == numbers
    assert (told["seed"], told["validation"], told["early_stopping_patience"]) == (5, None, None)
    assert told["model"] == CHAT_MODEL
    told = order(hyperparameters={"n_epochs": 2, "batch_size": "auto"})
    assert (told["n_epochs"], told["batch_size"]) == (2, 1)
    patient = {"type": "supervised", "supervised": {"hyperparameters": {"early_stopping_patience": 2}}}
    told = order(method=patient, validation_file=upload(client))
    assert told["early_stopping_patience"] == 2
    assert told["validation"]


def test_a_seed_is_drawn_where_none_is_given(client):
    assert len({retrieve(client, submit(client)).seed for _ in range(3)}) == 3


@pytest.mark.parametrize(
    ("examples", "wanted", "numbers"),
    [
        (10, {}, (10, 1)),
        (60, {}, (3, 1)),
        (100, {}, (3, 2)),
        (20_000, {}, (3, 8)),
        (400, {"batch_size": 100}, (10, 100)),
        (10, {"n_epochs": 1}, (1, 1)),
    ],
)
def test_auto_becomes_about_a_hundred_steps_in_three_to_ten_epochs(examples, wanted, numbers):
    auto = dict.fromkeys(("n_epochs", "batch_size", "learning_rate_multiplier"), "auto")
    found = supervisor.resolve(auto | wanted, examples)
    assert (found["n_epochs"], found["batch_size"]) == numbers
    assert found["learning_rate_multiplier"] == 1.0


# --- lists --------------------------------------------------------------------------------------------------


def test_jobs_events_and_checkpoints_come_in_pages(client):
    made = [reach(client, submit(client, metadata={"of": "pages"}), "succeeded").id for _ in range(3)]
    first = client.fine_tuning.jobs.list(limit=2)
    assert [one.id for one in first.data] == made[:0:-1]
    assert first.has_more
    assert [one.id for one in client.fine_tuning.jobs.list(limit=1, metadata={"of": "pages"})] == made[::-1]
    whole = events(client, made[0])
    assert [one.id for one in events(client, made[0], limit=3)] == [one.id for one in whole]
    last = client.fine_tuning.jobs.list_events(made[0], limit=1).data[0]
    assert last.message == "The job has successfully completed"
    assert not client.fine_tuning.jobs.list_events(made[0], after=whole[0].id).data
    steps = [one.step_number for one in client.fine_tuning.jobs.checkpoints.list(made[0], limit=1)]
    assert steps == [8, 4]
    for limit in (0, 1001):
        with pytest.raises(openai.BadRequestError) as refused:
            client.fine_tuning.jobs.list_events(made[0], limit=limit)
        assert refused.value.param == "limit"
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.list(after="ftjob-none")
    assert refused.value.param == "after"


def test_jobs_are_found_by_their_metadata(client):
    training_file = upload(client)
    tags = ({"team": "sales", "a'b": ""}, {"team": "sales"}, None)
    one, two, bare = (submit(client, training_file=training_file, metadata=tag) for tag in tags)

    def found(**how) -> set[str]:
        return {job.id for job in client.fine_tuning.jobs.list(**how)} & {one, two, bare}

    assert found(metadata={"team": "sales"}) == {one, two}
    assert found(metadata={"team": "sales", "a'b": ""}) == {one}
    assert found(metadata={"team": "support"}) == set()
    assert found(metadata={}) == {one, two, bare}
    assert found(extra_query={"metadata": "null"}) == {bare}


def test_a_job_that_does_not_exist_is_not_found(client):
    calls = client.fine_tuning.jobs
    for call in (
        calls.retrieve,
        calls.cancel,
        calls.pause,
        calls.resume,
        calls.list_events,
        calls.checkpoints.list,
    ):
        with pytest.raises(openai.NotFoundError, match="ftjob-none") as missing:
            call("ftjob-none")
        assert missing.value.code == "fine_tune_not_found"


# --- what is refused, and what fails ------------------------------------------------------------------------


def numbers(**given) -> dict:
    return {"method": {"type": "supervised", "supervised": {"hyperparameters": given}}}


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"model": "gpt-9"}, "model"),
        ({"model": EMBEDDING_MODEL}, "model"),
        ({"training_file": "file-none"}, "training_file"),
        ({"validation_file": "file-none"}, "validation_file"),
        ({"method": {"type": "dpo"}}, "method.type"),
        ({"method": {"type": "reinforcement", "reinforcement": {}}}, "method.type"),
        ({"method": {"type": "magic"}}, "method.type"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations"),
        ({"suffix": "a b"}, "suffix"),
        ({"suffix": "a" * 65}, "suffix"),
        ({"suffix": "../../a"}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"metadata": {"a" * 65: ""}}, "metadata"),
        ({"metadata": {"a": "b" * 513}}, "metadata"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        (numbers(n_epochs=51), "method.supervised.hyperparameters.n_epochs"),
        (numbers(n_epochs=True), "method.supervised.hyperparameters.n_epochs"),
        (numbers(batch_size="many"), "method.supervised.hyperparameters.batch_size"),
        (numbers(batch_size=257), "method.supervised.hyperparameters.batch_size"),
        (
            numbers(learning_rate_multiplier=0),
            "method.supervised.hyperparameters.learning_rate_multiplier",
        ),
        (numbers(rank=4), "method.supervised.hyperparameters.rank"),
        (numbers(early_stopping_patience=1), "method.supervised.hyperparameters.early_stopping_patience"),
    ],
    ids=str,
)
def test_a_job_that_is_not_offered_is_refused_and_nothing_is_made(client, endpoint, options, param):
    training_file = upload(client)
    before = [one.id for one in client.fine_tuning.jobs.list(limit=1)][:1], os.listdir(endpoint.home / "jobs")
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(**({"model": CHAT_MODEL, "training_file": training_file} | options))
    assert refused.value.param == param
    after = [one.id for one in client.fine_tuning.jobs.list(limit=1)][:1], os.listdir(endpoint.home / "jobs")
    assert after == before


def test_a_tuned_model_and_a_result_file_are_nothing_to_train_on(client):
    job = reach(client, submit(client), "succeeded")
    for options, param in (
        ({"model": job.fine_tuned_model}, "model"),
        ({"training_file": job.result_files[0]}, "training_file"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            submit(client, **options)
        assert refused.value.param == param


def test_without_what_training_needs_a_job_is_refused_with_the_command_that_installs_it(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(jobs, "NEEDED", ("json", "no_such_module"))
    asked = jobs.JobRequest(model=CHAT_MODEL, training_file="file-none")
    with pytest.raises(ApiError, match=r"no_such_module.*pip install 'companion\[train\]'"):
        jobs.create_job(Store(tmp_path), asked)


ONE_BAD = [example(number) for number in range(10_000)]
ONE_BAD[7321]["messages"][0]["role"] = "robot"
MUTE = [{"messages": [{"role": "user", "content": "Hello?"}]}] * 12


@pytest.mark.parametrize(
    ("data", "code", "said"),
    [
        (b"order;intent\n1;refund\n" * 6, "invalid_training_file", "line 1"),
        (TWELVE.replace(b"way", b"w\xe4y"), "invalid_training_file", "line 1"),
        (b"", "invalid_training_file", "1 problem"),
        (b"\xef\xbb\xbf" + TWELVE, "invalid_training_file", "line 1"),
        (written(ONE_BAD), "invalid_training_file", "1 problem(s). line 7322"),
        (written(MUTE), "invalid_training_file", "line 5"),
        (written([example()] * 9), "invalid_n_examples", "9 example(s), but must have at least 10"),
    ],
    ids=["not JSONL", "not UTF-8", "empty", "BOM", "one bad line", "no assistant", "too few"],
)
def test_a_bad_file_fails_the_job_and_every_problem_has_its_line(client, data, code, said):
    job = reach(client, submit(client, data), "failed")
    assert (job.error.code, job.error.param) == (code, "training_file")
    assert said in job.error.message
    assert job.finished_at and job.fine_tuned_model is None
    last = events(client, job.id)[-1]
    assert (last.level, last.message) == ("error", job.error.message)


def test_of_many_problems_the_first_are_named_and_all_are_counted(client):
    job = reach(client, submit(client, written(MUTE)), "failed")
    assert "12 problem(s)" in job.error.message
    assert "line 5" in job.error.message and "line 6" not in job.error.message
    assert "and 7 more" in job.error.message


def test_a_bad_validation_file_fails_the_job(client):
    job = reach(client, submit(client, validation_file=upload(client, b"?\n")), "failed")
    assert (job.error.code, job.error.param) == ("invalid_validation_file", "validation_file")


def test_what_the_trainer_gives_up_on_is_the_jobs_error(client, endpoint):
    error = {"code": "loss_is_nan", "message": "The loss is not a number: lower the rate.", "param": None}
    endpoint.play(error=error)
    job = reach(client, submit(client), "failed")
    assert job.error.model_dump() == error
    assert job.result_files == []


def test_a_trainer_that_always_dies_at_one_step_fails_the_job_with_its_last_words(client, endpoint):
    endpoint.play(dies_at=3)
    before = len(endpoint.trainers())
    job = reach(client, submit(client), "failed")
    assert job.error.code == "trainer_crashed"
    assert "out of luck" in job.error.message
    assert len(endpoint.trainers()) - before == 4
    assert steps_done(client, job.id) == [1, 2]


# --- queue, cancel, pause, resume ---------------------------------------------------------------------------


def test_one_job_runs_and_the_next_waits_for_its_turn(client, endpoint):
    endpoint.play(pace=0.05)
    first, second, third = (submit(client) for _ in range(3))
    reach(client, first, "running")
    reach(client, third, "queued")
    seen = [[]]
    while set(seen[-1]) != {"succeeded"}:
        seen.append([job.status for job in client.fine_tuning.jobs.list(limit=3).data])
        time.sleep(0.01)
    assert all(statuses.count("running") <= 1 for statuses in seen)
    assert ["queued", "running", "succeeded"] in seen
    ends = [retrieve(client, one).finished_at for one in (first, second, third)]
    assert ends == sorted(ends)


@pytest.mark.parametrize("deaf", [False, True])
def test_a_running_job_is_cancelled_within_five_seconds(client, endpoint, deaf):
    endpoint.play(steps=10_000, pace=0.01, deaf=deaf)
    job_id = submit(client)
    reach(client, job_id, "running")
    assert comes_true(lambda: steps_done(client, job_id))
    trainer, began = endpoint.trainers()[-1], time.monotonic()
    if os.name == "posix":
        assert os.getpgid(trainer) == trainer
        assert psutil.Process(trainer).nice() >= 5
    assert client.fine_tuning.jobs.cancel(job_id).status == "cancelled"
    assert comes_true(lambda: not psutil.pid_exists(trainer), seconds=5)
    assert time.monotonic() - began < 5
    job = retrieve(client, job_id)
    assert job.status == "cancelled" and job.finished_at and job.error is None
    assert events(client, job_id)[-1].message == "Fine-tuning job cancelled"
    for call in (
        client.fine_tuning.jobs.cancel,
        client.fine_tuning.jobs.pause,
        client.fine_tuning.jobs.resume,
    ):
        with pytest.raises(openai.BadRequestError, match="is cancelled"):
            call(job_id)


def test_waiting_jobs_are_cancelled_paused_and_resumed(client, endpoint):
    endpoint.play(steps=10_000, pace=0.01)
    first = submit(client)
    reach(client, first, "running")
    cancelled, paused = submit(client), submit(client)
    for one in (cancelled, paused):
        reach(client, one, "queued")
        with pytest.raises(openai.BadRequestError, match="only one that is paused can be resumed"):
            client.fine_tuning.jobs.resume(one)
    assert client.fine_tuning.jobs.cancel(cancelled).status == "cancelled"
    assert client.fine_tuning.jobs.pause(paused).status == "paused"
    client.fine_tuning.jobs.cancel(first)
    time.sleep(0.5)
    endpoint.play()
    assert retrieve(client, paused).status == "paused"
    assert client.fine_tuning.jobs.resume(paused).status == "queued"
    reach(client, paused, "succeeded")
    assert steps_done(client, cancelled) == []


@pytest.mark.parametrize("deaf", [False, True])
def test_a_paused_job_goes_on_from_where_it_was(client, endpoint, deaf):
    endpoint.play(steps=60, pace=0.02, deaf=deaf)
    job_id = submit(client)
    reach(client, job_id, "running")
    assert comes_true(lambda: len(steps_done(client, job_id)) > 9)
    assert client.fine_tuning.jobs.pause(job_id).status == "paused"
    if not deaf:  # one that does not listen is killed, if it has not come to its end by then
        trainer = endpoint.trainers()[-1]
        assert comes_true(lambda: not psutil.pid_exists(trainer), seconds=5)
        done = len(steps_done(client, job_id))
        time.sleep(0.3)
        assert len(steps_done(client, job_id)) == done < 60
        job = retrieve(client, job_id)
        assert job.status == "paused" and job.estimated_finish is None
    with contextlib.suppress(openai.BadRequestError):
        client.fine_tuning.jobs.resume(job_id)
    reach(client, job_id, "succeeded")
    assert steps_done(client, job_id) == list(range(1, 61))
    said = [one.message for one in events(client, job_id)]
    assert said.count("Fine-tuning job started") == said.count("Fine-tuning job paused") == 1


def test_deleting_its_file_does_not_disturb_a_job(client, endpoint):
    endpoint.play(pace=0.05)
    job_id = submit(client)
    client.files.delete(retrieve(client, job_id).training_file)
    reach(client, job_id, "succeeded")
    folder = endpoint.home / "jobs" / job_id
    assert comes_true(lambda: not list(folder.glob("*_file.jsonl"))), "the job's own copy is not kept"


def test_a_checkpoint_of_an_unfinished_job_cannot_be_deleted(client, endpoint):
    endpoint.play(steps=10_000, pace=0.01)
    job_id = submit(client)
    assert comes_true(lambda: client.fine_tuning.jobs.checkpoints.list(job_id).data)
    client.fine_tuning.jobs.pause(job_id)
    trainer = endpoint.trainers()[-1]
    assert comes_true(lambda: not psutil.pid_exists(trainer))  # or newer checkpoints take this one's place
    name = client.fine_tuning.jobs.checkpoints.list(job_id).data[0].fine_tuned_model_checkpoint
    with pytest.raises(openai.BadRequestError, match="cancel it first"):
        client.models.delete(name)
    client.fine_tuning.jobs.cancel(job_id)
    assert client.models.delete(name).deleted


# --- what it must withstand ---------------------------------------------------------------------------------


def check_nothing_is_lost_or_doubled(client, job_id: str, steps: int) -> None:
    assert steps_done(client, job_id) == list(range(1, steps + 1))
    found = events(client, job_id)
    assert len({one.id for one in found}) == len(found)
    said = [one.message for one in found]
    assert len(set(said)) == len(said)
    assert [one for one in said if "Checkpoint" in one] == [
        f"Checkpoint created at step {step}" for step in range(4, steps + 1, 4)
    ]
    job = retrieve(client, job_id)
    table = pd.read_csv(io.BytesIO(client.files.content(job.result_files[0]).read()))
    assert list(table.step) == list(range(1, steps + 1))


def test_a_trainer_that_is_killed_ten_times_loses_and_doubles_no_event(client, endpoint):
    endpoint.play(steps=120, pace=0.01)
    job_id, chance, killed = submit(client), random.Random(1), set()
    reach(client, job_id, "running")
    while len(killed) < 10:
        done = len(steps_done(client, job_id))
        assert comes_true(lambda done=done: len(steps_done(client, job_id)) > done)
        time.sleep(chance.random() / 20)
        with contextlib.suppress(ProcessLookupError):
            os.kill(trainer := endpoint.trainers()[-1], 9)
            killed.add(trainer)
    reach(client, job_id, "succeeded")
    check_nothing_is_lost_or_doubled(client, job_id, 120)


@pytest.mark.slow
def test_an_endpoint_that_is_killed_ten_times_loses_and_doubles_no_event(make_endpoint):
    endpoint, chance = make_endpoint(), random.Random(2)
    client = endpoint.start()
    endpoint.play(steps=160, pace=0.02)
    jobs_made = [submit(client) for _ in range(2)]
    for _ in range(10):
        time.sleep(chance.random() / 2)
        endpoint.end(kill=True)
        client = endpoint.start()
    assert retrieve(client, jobs_made[1]).status != "succeeded", "all kills came before the end"
    for job_id in jobs_made:
        reach(client, job_id, "succeeded")
        check_nothing_is_lost_or_doubled(client, job_id, 160)
    assert not (endpoint.home / "clash").exists(), "two trainers worked in one folder"


def test_a_job_goes_on_when_its_endpoint_was_stopped_and_is_started_again(make_endpoint):
    endpoint = make_endpoint()
    client = endpoint.start()
    endpoint.play(steps=100, pace=0.02)
    job_id = submit(client)
    reach(client, job_id, "running")
    assert comes_true(lambda: steps_done(client, job_id))
    endpoint.end()
    assert not psutil.pid_exists(endpoint.trainers()[-1])
    client = endpoint.start()
    reach(client, job_id, "succeeded")
    check_nothing_is_lost_or_doubled(client, job_id, 100)


def test_an_endpoint_does_not_leave_while_a_job_runs(make_endpoint):
    endpoint = make_endpoint()
    client = endpoint.start(idle=0.5)
    endpoint.play(steps=40, pace=0.1)
    job_id = submit(client)
    time.sleep(2)
    assert endpoint.process.poll() is None
    client.fine_tuning.jobs.cancel(job_id)
    endpoint.process.wait(10)


def test_of_two_endpoints_in_one_home_one_trains_and_the_other_takes_over(make_endpoint):
    one, other = make_endpoint(), make_endpoint()
    first, second = one.start(), other.start()
    one.play(steps=100, pace=0.02)
    job_id = submit(second)
    reach(first, job_id, "running")
    one.end(kill=True)
    reach(second, job_id, "succeeded")
    check_nothing_is_lost_or_doubled(second, job_id, 100)
    assert not (one.home / "clash").exists()


def test_a_full_disk_refuses_an_upload_and_leaves_nothing(make_endpoint, tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        endpoint = make_endpoint(home=disk)
        client = endpoint.start()
        with pytest.raises(openai.InternalServerError, match="free some space") as refused:
            upload(client, bytes(2 << 20))
        assert (refused.value.status_code, refused.value.code) == (507, "insufficient_storage")
        assert client.files.list().data == []
        assert list((disk / "files").iterdir()) == []
        file_id = upload(client)
        filler = fill(disk, 4096)
        with pytest.raises(openai.InternalServerError, match="free some space"):
            submit(client, training_file=file_id)
        assert client.fine_tuning.jobs.list().data == []
        filler.unlink()
        reach(client, submit(client, training_file=file_id), "succeeded")
        endpoint.end()


def test_a_disk_that_fills_up_in_training_fails_the_job(make_endpoint, tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        endpoint = make_endpoint(home=disk)
        client = endpoint.start()
        endpoint.play(steps=100, fill=50_000, pace=0.02)
        job_id = submit(client)
        job = reach(client, job_id, "failed")
        assert job.error.code == "insufficient_storage"
        assert "free some space" in job.error.message
        assert not psutil.pid_exists(endpoint.trainers()[-1])
        for junk in disk.glob("jobs/*/junk-*"):
            junk.unlink()
        endpoint.play()
        reach(client, submit(client), "succeeded")
        endpoint.end()


def test_a_job_that_succeeded_is_taken_again_only_where_all_is_the_same(client):
    examples = [example(number) for number in range(12)]
    asked = {"suffix": "again", "n_epochs": 2, "seed": 3, "client": client, "reuse": True}
    first = finetuning.follow(finetuning.fine_tune(examples, examples, **asked), client=client, plot=False)
    files = len(list(client.files.list()))
    again = finetuning.fine_tune(examples, examples, **asked)
    assert (again.id, again.status) == (first.id, "succeeded")
    assert len(list(client.files.list())) == files, "it uploaded what it did not need"

    others = [
        finetuning.fine_tune(examples[:11], examples, **asked),
        finetuning.fine_tune(examples, examples[:11], **asked),
        finetuning.fine_tune(examples, **asked),
        *(
            finetuning.fine_tune(examples, examples, **asked | change)
            for change in (
                {"suffix": "other"},
                {"suffix": None},
                {"seed": 4},
                {"n_epochs": 1},
                {"reuse": False},
            )
        ),
    ]
    assert first.id not in {job.id for job in others}
    for job in others:
        finetuning.follow(job, client=client, plot=False)
    unnamed = finetuning.fine_tune(examples, examples, **asked | {"suffix": None})
    assert unnamed.id == others[4].id
    client.models.delete(first.fine_tuned_model)
    newest = finetuning.fine_tune(examples, examples, **asked)
    assert newest.id == others[-1].id, "the other job that is the same still has its model"
    client.models.delete(newest.fine_tuned_model)
    assert finetuning.fine_tune(examples, examples, **asked).id not in {newest.id, first.id}
