"""The `companion` command, as its users call it: in a process of its own."""

import os
import subprocess
import sys
import time

import openai
import pytest

from companion import diagnosis


def run(*arguments, said="", **variables):
    command = [sys.executable, "-c", "from companion.cli import main; main()", *arguments]
    return subprocess.run(
        command, input=said, capture_output=True, text=True, timeout=120, env=os.environ | variables
    )


def test_help_names_every_command():
    shown = run("--help").stdout
    for command in ("book", "lab", "serve", "chat", "pull", "doctor", "release", "stop"):
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


def test_stop_ends_an_endpoint_and_says_so_when_none_runs(tmp_path, companion_home):
    (tmp_path / "models").symlink_to(companion_home / "models")
    home = {"COMPANION_HOME": str(tmp_path)}
    assert "no endpoint" in run("stop", **home).stdout
    assert run("chat", said="Hello\n", **home).returncode == 0
    assert "stopped" in run("stop", **home).stdout
    assert "no endpoint" in run("stop", **home).stdout


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
