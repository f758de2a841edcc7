"""The endpoint's process: one for all, found again, replaced when it dies, gone when nobody needs it."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from string import ascii_lowercase

import openai
import psutil
import pytest
from disks import fill, make_read_only, small_disk

from companion import backend
from companion.backend import CHAT_MODEL, EMBEDDING_MODEL
from companion.evaluation import Sample, evaluate
from companion.local import process
from companion.local.process import EndpointError

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def own_home(companion_home, monkeypatch, tmp_path):
    """A home without an endpoint; what is started in it is stopped."""
    (tmp_path / "models").symlink_to(companion_home / "models")
    monkeypatch.setenv("COMPANION_HOME", str(tmp_path))
    yield tmp_path
    if endpoint := process.running():
        process.stop(endpoint)


def comes_true(condition, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_a_new_endpoint_with_both_models_stays_below_600_mb(own_home):
    client = backend.client()
    client.embeddings.create(model=EMBEDDING_MODEL, input=["a tent"] * 32)
    with ThreadPoolExecutor(8) as pool:
        for reply in pool.map(
            lambda _: client.chat.completions.create(model=CHAT_MODEL, messages=HI, max_tokens=16), range(8)
        ):
            assert reply.usage.completion_tokens
    assert psutil.Process(process.running().pid).memory_info().rss < 600e6


@pytest.mark.slow
def test_ten_processes_share_one_endpoint(own_home):
    script = "from companion import backend, local; backend.client(); print(local.process.running().pid)"
    ten = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(10)
    ]
    assert len({one.communicate()[0] for one in ten}) == 1
    assert [one.returncode for one in ten] == [0] * 10


def test_a_killed_endpoint_is_an_sdk_error_and_is_replaced(own_home):
    client, before = backend.client(), process.running()
    stream = client.chat.completions.create(
        model=CHAT_MODEL, messages=HI, max_tokens=4000, stream=True, logit_bias={"2": -100}
    )
    next(stream)
    os.kill(before.pid, signal.SIGKILL)
    with pytest.raises(openai.APIError):
        list(stream)
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
    again, after = backend.client(), process.running()
    assert after.pid != before.pid
    assert (after.base_url, after.token) == (before.base_url, before.token)
    for one in (client, again):
        assert one.chat.completions.create(model=CHAT_MODEL, messages=HI, max_tokens=1).choices


def test_a_killed_endpoint_ends_a_whole_answer_with_an_sdk_error(own_home):
    client, endpoint = backend.client(), process.running()
    client.chat.completions.create(model=CHAT_MODEL, messages=HI, max_tokens=1)
    threading.Timer(1, os.kill, (endpoint.pid, signal.SIGKILL)).start()
    with pytest.raises(openai.APIConnectionError):
        client.chat.completions.create(model=CHAT_MODEL, messages=HI, max_tokens=8000, logit_bias={"2": -100})


def test_only_this_user_can_read_the_token(client, companion_home):
    assert stat.S_IMODE((companion_home / "endpoint.json").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "text",
    [
        "",
        "garbage",
        "[]",
        "{}",
        '{"base_url": 5, "token": "a", "pid": 1}',
        '{"base_url": "x", "token": "a", "pid": 1}',
        '{"base_url": "http://127.0.0.1:99999/v1", "token": "a", "pid": 1}',
        '{"base_url": "http://127.0.0.1:9/v1", "token": "a", "pid": -1}',
        "\0",
    ],
)
def test_an_endpoint_file_of_garbage_is_no_endpoint(own_home, text):
    (own_home / "endpoint.json").write_text(text)
    assert process.announced() is None
    assert process.running() is None


def test_an_old_endpoint_file_ends_no_process_of_others(own_home):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "companion"])
    try:
        old = {"base_url": "http://127.0.0.1:9/v1", "token": "a", "pid": other.pid}
        (own_home / "endpoint.json").write_text(json.dumps(old))
        assert process.running() is None
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.fixture
def hanging(own_home):
    """A process that the file names as the endpoint, and that never answers."""
    command = [sys.executable, "-c", "import time; time.sleep(600)", process.GATEWAY]
    with subprocess.Popen(command) as other:
        old = process.Endpoint("http://127.0.0.1:9/v1", "a", other.pid)
        process.announce(old)
        yield old
        other.kill()


def test_an_old_endpoint_file_that_names_another_users_process_is_no_endpoint(hanging, monkeypatch):
    """macOS and Windows do not show the command line of another user's process."""

    def refuse(*_):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil.Process, "cmdline", refuse)
    assert process.running() is None
    assert psutil.Process(hanging.pid).status() != psutil.STATUS_ZOMBIE


def test_another_users_endpoint_cannot_be_stopped_and_is_in_nobodys_way(hanging, monkeypatch):
    """Linux shows the command line of another user's process."""

    def refuse(*_):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil.Process, "terminate", refuse)
    assert process.running() is None


def test_an_endpoint_whose_starter_does_not_notice_its_end_is_stopped_at_once(hanging):
    stop = f"from companion.local import process; process.stop(process.Endpoint('', '', {hanging.pid}))"
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", stop], check=True)
    assert time.monotonic() - began < 8
    assert psutil.Process(hanging.pid).status() == psutil.STATUS_ZOMBIE


def test_an_endpoint_starts_in_a_home_that_is_named_from_here(own_home, monkeypatch):
    monkeypatch.chdir(own_home.parent)
    monkeypatch.setenv("COMPANION_HOME", own_home.name)
    monkeypatch.setenv("COMPANION_MODEL_PATH", f"{own_home.name}/models")
    answer = backend.client().chat.completions.create(model=CHAT_MODEL, messages=HI, max_tokens=1)
    assert answer.choices


def test_the_mark_of_a_dead_process_is_no_lease(own_home):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    (own_home / "clients").mkdir()
    for name in (str(done.pid), "garbage", str(os.getpid())):
        (own_home / "clients" / name).touch()
    assert process.leases() == [os.getpid()]
    assert [mark.name for mark in (own_home / "clients").iterdir()] == [str(os.getpid())]


def endpoint_in(home) -> subprocess.Popen:
    command = [sys.executable, "-m", process.GATEWAY, "--idle", "1"]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert comes_true(lambda: process.running() is not None)
    return started


def test_an_idle_endpoint_leaves_when_no_client_lives(own_home):
    started = endpoint_in(own_home)
    assert started.wait(60) == 0


def test_an_idle_endpoint_unloads_its_models_but_stays_for_a_client(own_home):
    process._lease()
    started = endpoint_in(own_home)

    def ports():
        listening = psutil.Process(started.pid).net_connections()
        return len([found for found in listening if found.status == psutil.CONN_LISTEN])

    assert comes_true(lambda: ports() == 1)
    assert started.poll() is None
    answer = backend.client().chat.completions.create(model=CHAT_MODEL, messages=HI, max_tokens=1)
    assert answer.choices


@pytest.mark.parametrize("number", [28, 30])
def test_a_disk_that_refuses_is_one_line(own_home, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(process, "_lease", refuse)
    with pytest.raises(EndpointError, match=os.strerror(number)) as refused:
        process.ensure()
    assert "COMPANION_HOME" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("refuse", [lambda disk: fill(disk, 0), make_read_only], ids=["full", "read-only"])
def test_a_home_on_a_disk_that_is_full_or_read_only_is_one_line(
    companion_home, monkeypatch, tmp_path, refuse
):
    with small_disk(tmp_path / "disk") as disk:
        (disk / "models").symlink_to(companion_home / "models")
        monkeypatch.setenv("COMPANION_HOME", str(disk))
        refuse(disk)
        with pytest.raises(EndpointError) as refused:
            backend.client()
        assert str(disk) in str(refused.value)
        assert "\n" not in str(refused.value)
        assert process.running() is None


@pytest.mark.slow
def test_an_evaluation_goes_on_with_the_next_endpoint_when_its_own_is_killed(own_home):
    samples = [Sample(f"Name a town that begins with {letter}.", id=letter) for letter in ascii_lowercase]
    first, log = process.ensure(), own_home / "log.jsonl"

    def kill() -> None:
        assert comes_true(lambda: log.exists() and log.read_bytes().count(b"\n") > 4)
        os.kill(first.pid, signal.SIGKILL)

    def run():
        def said(answer, sample):
            return bool(answer.text)

        return evaluate(CHAT_MODEL, samples, said, log=log, progress=False, concurrency=4, max_tokens=8)

    killing = threading.Thread(target=kill)
    killing.start()
    found = run()
    killing.join()
    assert process.running().pid != first.pid
    assert len(found) == len(samples)
    assert len(found.failures) <= 4  # those that were with it
    again = run()
    assert again.failures.empty
    kept = {record.sample.id: record.answer for record in found if not record.answer.error}
    assert all(record.answer == kept.get(record.sample.id, record.answer) for record in again)


def test_an_endpoint_that_cannot_start_says_why(own_home, monkeypatch):
    monkeypatch.setattr(process, "GATEWAY", "companion.local.nothing")
    with pytest.raises(EndpointError, match=r"did not start.*nothing") as refused:
        process.ensure()
    assert "\n" not in str(refused.value)


def test_a_process_that_leaves_while_it_is_looked_at_is_gone(monkeypatch):
    """psutil then says FileNotFoundError where its folder in /proc still stands."""

    def leave(*_):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(psutil.Process, "status", leave)
    monkeypatch.setattr(psutil.Process, "terminate", leave)
    assert not process._alive(os.getpid(), endpoint=True)
    process.stop(process.Endpoint("http://127.0.0.1:1/v1", "token", os.getpid()))
