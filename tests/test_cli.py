"""The `companion` command, as its users call it: in a process of its own."""

import importlib.util
import os
import socket
import subprocess
import sys
import time

import openai
import pytest
import scripted
import test_export

from companion import backend, cli, dataset, diagnosis, evaluation, finetuning
from companion.local import process as endpoints
from companion.local.store import Store


def run(*arguments, said="", **variables):
    command = [sys.executable, "-c", "from companion.cli import main; main()", *arguments]
    return subprocess.run(
        command, input=said, capture_output=True, text=True, timeout=120, env=os.environ | variables
    )


def test_help_names_every_command():
    shown = run("--help").stdout
    for command in (
        "book",
        "lab",
        "serve",
        "chat",
        "pull",
        "doctor",
        "release",
        "stop",
        "finetune",
        "export",
        "compare",
    ):
        assert command in shown


def test_chat_answers_and_leaves_at_the_end_of_input(client):
    done = run("chat", said="Say hello.\n")
    assert done.returncode == 0
    assert len(done.stdout.replace("you>", "").strip()) > 3


@pytest.mark.parametrize(
    ("arguments", "variables", "says"),
    [
        (["chat"], {"COMPANION_BACKEND": "cloud"}, "COMPANION_BACKEND=cloud"),
        (["pull"], {"COMPANION_MODEL_PATH": "/no/such/folder"}, "/no/such/folder"),
        (["serve", "--port", "70000"], {}, "70000"),
        (["release", "/no/such/folder"], {}, "/no/such/folder"),
        (["finetune", "/no/such/file"], {}, "/no/such/file"),
        (["export", "ft:none", "out"], {}, "'ft:none'"),
        (["export", "ft:none", "out", "--merged", "--trl"], {}, "give one"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, variables, says):
    done = run(*arguments, said="hello\n", **variables)
    assert done.returncode not in (0, None)
    lines = done.stderr.strip().splitlines()
    assert "Traceback" not in done.stderr
    assert says in lines[-1] and lines[-1].startswith("companion: ")


def test_an_option_that_does_not_exist_is_refused_without_a_traceback():
    done = run("book", "--colour")
    assert done.returncode == 2
    assert "--colour" in done.stderr and "Traceback" not in done.stderr


def test_pull_says_where_the_models_are(companion_home):
    done = run("pull")
    assert done.returncode == 0
    assert str(companion_home / "models") in done.stdout


def test_serve_is_an_endpoint_for_any_openai_client(companion_home):
    command = [
        sys.executable,
        "-c",
        "from companion.cli import main; main()",
        "serve",
        "--port",
        "0",
        "--token",
        "secret",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = dict(process.stdout.readline().strip().split("=", 1) for _ in range(2))
            other = openai.OpenAI(base_url=said["OPENAI_BASE_URL"], api_key=said["OPENAI_API_KEY"])
            models = [model.id for model in other.models.list()]
            reply = other.chat.completions.create(
                model=models[0], messages=[{"role": "user", "content": "Hello"}], max_tokens=5
            )
            assert reply.usage.completion_tokens <= 5
            hosted = {"COMPANION_BACKEND": "openai", **said}
            assert run("chat", said="Say hello.\n", **hosted).returncode == 0
        finally:
            process.terminate()
            deadline = time.monotonic() + 20
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
    assert process.returncode is not None


@pytest.mark.slow
def test_stop_ends_an_endpoint_and_says_so_when_none_runs(tmp_path, companion_home):
    (tmp_path / "models").symlink_to(companion_home / "models")
    home = {"COMPANION_HOME": str(tmp_path)}
    assert "no endpoint" in run("stop", **home).stdout
    assert run("chat", said="Hello\n", **home).returncode == 0
    assert "stopped" in run("stop", **home).stdout
    assert "no endpoint" in run("stop", **home).stdout


def test_stop_says_that_it_ended_an_endpoint_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_HOME", str(tmp_path))
    command = [sys.executable, "-c", "import time; time.sleep(600)", endpoints.GATEWAY]
    with subprocess.Popen(command) as hanging:
        try:
            endpoints.announce(endpoints.Endpoint("http://127.0.0.1:9/v1", "a", hanging.pid))
            assert run("stop").stdout == "stopped the endpoint at http://127.0.0.1:9/v1\n"
            assert hanging.wait(1)
        finally:
            hanging.kill()


def test_serve_names_a_port_that_is_taken_and_the_remedy(companion_home):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", "--port", str(port))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"companion: the endpoint cannot listen on port {port} of 127.0.0.1 (")
    assert line.endswith("give another --port, or --port 0 for a free one")


def test_doctor_finds_nothing_missing_here(client):
    done = run("doctor")
    assert done.returncode == 0, done.stdout
    assert "missing" not in done.stdout


def test_doctor_names_what_is_missing_and_the_mend(tmp_path):
    done = run("doctor", COMPANION_MODEL_PATH=str(tmp_path))
    assert done.returncode == 1
    missing = [line for line in done.stdout.splitlines() if line.startswith("missing")]
    assert len(missing) == 2 and all(str(tmp_path) in line and "copy" in line for line in missing)


def test_doctor_sees_a_wrong_version(monkeypatch):
    real = diagnosis.metadata.version
    monkeypatch.setattr(diagnosis.metadata, "version", lambda name: "1.0" if name == "openai" else real(name))
    findings = [str(finding) for finding in diagnosis.examine() if not finding.good]
    assert any("openai is 1.0, not ==3.54.0" in finding and "pip install" in finding for finding in findings)


@pytest.fixture
def finetune(monkeypatch, tmp_path):
    """`companion finetune` on twelve examples, against a scripted service."""
    dataset.save(test_export.TWELVE, tmp_path / "train.jsonl")
    monkeypatch.setattr(finetuning.time, "sleep", lambda seconds: None)

    def call(service, *arguments, file="train.jsonl"):
        monkeypatch.setattr(backend, "client", lambda: service.client)
        path = str(tmp_path / file)
        monkeypatch.setattr(sys, "argv", ["companion", "finetune", path, *arguments])
        cli.main()

    return call


def test_finetune_follows_the_job_and_prints_the_models_name(finetune, capsys):
    steps = [scripted.event(i, {"step": i, "total_steps": 3, "train_loss": 1 / i}) for i in (1, 2, 3)]
    done = {"status": "succeeded", "fine_tuned_model": "ft:mine"}
    service = scripted.Service({"status": "queued", "events": 0}, done, events=steps)
    options = "--suffix mine --epochs 2 --batch-size 4 --learning-rate-multiplier 0.5 --seed 3"
    with pytest.raises(SystemExit) as left:
        finetune(service, *options.split())
    assert not left.value.code
    shown = capsys.readouterr()
    assert shown.out == "ft:mine\n"
    assert "waits for its turn" in shown.err and "3/3" in shown.err
    (sent,) = service.sent("POST", "/fine_tuning/jobs")
    assert (sent["suffix"], sent["seed"], sent["model"]) == ("mine", 3, backend.CHAT_MODEL)
    assert sent["method"]["supervised"]["hyperparameters"] == {
        "n_epochs": 2,
        "batch_size": 4,
        "learning_rate_multiplier": 0.5,
    }


def test_finetune_takes_a_csv_file_by_the_names_of_its_columns(finetune, capsys, tmp_path):
    rows = "".join(f"What about {number}?,{number % 3}\n" for number in range(12))
    (tmp_path / "train.csv").write_text("message,intent\n" + rows)
    service = scripted.Service({"status": "succeeded", "fine_tuned_model": "ft:mine"})
    with pytest.raises(SystemExit) as left:
        finetune(service, "--text", "message", "--label", "intent", file="train.csv")
    assert not left.value.code and capsys.readouterr().out == "ft:mine\n"
    with pytest.raises(SystemExit) as left:
        finetune(service, file="train.csv")
    assert "no column 'text': the table has message, intent" in left.value.code


def test_finetune_can_leave_the_job_to_itself(finetune, capsys):
    service = scripted.Service()
    with pytest.raises(SystemExit) as left:
        finetune(service, "--detach")
    assert not left.value.code
    assert capsys.readouterr().out == "ftjob-1\n"
    assert service.sent("GET", "/fine_tuning/jobs/ftjob-1") == []


@pytest.mark.parametrize(
    ("moment", "says"),
    [
        (
            {"status": "failed", "error": {"code": "x", "message": "no space", "param": None}},
            "failed: no space",
        ),
        ({"status": "cancelled"}, 1),
    ],
)
def test_finetune_ends_with_an_error_where_there_is_no_model(moment, says, finetune, capsys):
    with pytest.raises(SystemExit) as left:
        finetune(scripted.Service(moment))
    assert left.value.code == says or says in left.value.code
    assert capsys.readouterr().out == ""


def test_finetune_names_the_bad_lines_of_a_file_one_a_line(tmp_path):
    (tmp_path / "bad.jsonl").write_text('nonsense\n{"messages": []}\n{"messages": 5}\n')
    done = run("finetune", str(tmp_path / "bad.jsonl"))
    assert done.returncode == 1 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["line 1", "line 2", "line 3"]
    assert all(line.startswith(str(tmp_path / "bad.jsonl")) for line in lines)


def test_export_writes_an_adapter_or_an_order_for_trl(tmp_path):
    store = Store(tmp_path / "home")
    test_export.make_job(store)
    store.close()
    home = {"COMPANION_HOME": str(tmp_path / "home")}
    assert run("export", "ft:one", str(tmp_path / "adapter"), **home).returncode == 0
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    done = run("export", "ftjob-1", str(tmp_path / "trl"), "--trl", **home)
    assert (tmp_path / "trl" / "sft.yaml").exists()
    assert f"cd {tmp_path / 'trl'} && accelerate launch" in done.stdout


def test_grade_asks_for_the_plugin_that_spreads_notebooks_over_cores(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "xdist" else real(name))
    monkeypatch.setattr(sys, "argv", ["companion", "grade", "submissions", "--out", "grades"])
    with pytest.raises(SystemExit, match="xdist is not installed: run `pip install"):
        cli.main()


def right(answer, sample):
    return answer.text == sample.target


def polite(answer, sample):
    return "please" in answer.text


@pytest.fixture
def logs(tmp_path):
    """Two runs of 100 samples: `good.jsonl` is right on 90 and `bad.jsonl` on 50; one has two scorers."""
    samples = [evaluation.Sample(str(i), str(i)) for i in range(100)]

    def log(name, share, scorers):
        path = tmp_path / f"{name}.jsonl"
        solver = {str(i): str(i) if i < share else "?" for i in range(100)}.get
        evaluation.evaluate(solver, samples, scorers, log=path, progress=False)
        return str(path)

    return {
        "good": log("good", 90, right),
        "bad": log("bad", 50, right),
        "both": log("both", 88, [right, polite]),
        "none": str(tmp_path / "none.jsonl"),
    }


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ("good bad", 1, "right: worse"),
        ("bad good", 0, "right: better"),
        ("good both", 0, "right: cannot tell"),
        ("both both --scorer polite", 0, "polite: cannot tell"),
        ("good bad --margin 0.6", 0, "right: cannot tell"),
    ],
)
def test_compare_is_a_gate_by_its_exit_status(arguments, status, says, logs, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["companion", "compare", *(logs.get(a, a) for a in arguments.split())])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert (left.value.code or 0) == status
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{says}\n") and "n = 100" in shown.out and not shown.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("good none", "none.jsonl"),
        ("good wrong", "is no log of companion.evaluate"),
        ("both both", "choose one of right, polite"),
        ("good bad --scorer polite", "'polite'"),
        ("good bad --margin -1", "margin"),
    ],
)
def test_compare_tells_bad_input_from_a_worse_run(arguments, says, logs, tmp_path):
    (tmp_path / "wrong.jsonl").write_text("{}\n")
    logs["wrong"] = str(tmp_path / "wrong.jsonl")
    done = run("compare", *(logs.get(a, a) for a in arguments.split()))
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("companion: ") and says in line
