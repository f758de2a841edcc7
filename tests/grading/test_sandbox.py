"""The wall holds: what a stranger's kernel may do, what it may not, and that nothing of it is left."""

import json
import os
import platform
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from companion.checks import MIME
from companion.grading import sandbox
from companion.grading.run import Kernel

pytestmark = pytest.mark.slow

TRIES = """
import ctypes, json, os, socket
from IPython.display import display
worked, libc = [], ctypes.CDLL(None, use_errno=True)

def attempt(what, action, *arguments):
    try:
        if action(*arguments) is not False:
            worked.append(what)
    except Exception:
        pass

def show(value):
    display({MIME: {"value": value}}, raw=True)
"""


@pytest.fixture(scope="session")
def walled(tmp_path_factory):
    """A kernelspec behind the wall. Without bubblewrap its tests are skipped or fail, as asked."""
    try:
        sandbox.self_test()
    except RuntimeError as error:
        (pytest.fail if os.environ.get("COMPANION_NEEDS_SANDBOX") else pytest.skip)(str(error))
    return sandbox.kernelspec(tmp_path_factory.mktemp("spec"), env={"COMPANION_GRADING_SEED": "7"})


@pytest.fixture
def kernel(walled, tmp_path):
    kernel = Kernel(walled, str(tmp_path))
    yield kernel
    kernel.stop()


def told(kernel, code):
    """What code shows in a kernel, after the definitions in TRIES."""
    outcome = kernel.execute(f"MIME = {MIME!r}\n{TRIES}\n{code}", 20)
    assert outcome.status == "ok", outcome
    return outcome.emitted["value"]


def descendants_of(pid):
    return psutil.Process(pid).children(recursive=True)


def test_the_self_test_finds_nothing(walled):
    assert sandbox.self_test() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only for root is a private folder closed behind the wall")
def test_an_environment_in_a_folder_that_only_root_may_enter_can_be_used(walled, tmp_path, monkeypatch):
    private = tmp_path / "environment"
    shutil.copytree(sys.prefix, private, symlinks=True, ignore=lambda folder, names: {"lib"} & set(names))
    (private / "lib").symlink_to(Path(sys.prefix, "lib"))
    private.chmod(0o700)
    monkeypatch.setattr(sandbox.sys, "prefix", str(private))
    monkeypatch.setattr(sandbox.sys, "executable", f"{private}/bin/python")
    assert sandbox.self_test() == []


def without(*words):
    whole = sandbox._wall

    def wall(*arguments):
        found = whole(*arguments)
        for word in words:
            found.remove(word)
        return found

    return wall


def test_the_self_test_notices_a_shared_network(walled, monkeypatch):
    monkeypatch.setattr(sandbox, "_wall", without("--unshare-net"))
    assert "connect to this machine" in sandbox.self_test()


def test_the_self_test_notices_a_missing_filter(walled, monkeypatch):
    allow = struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)
    monkeypatch.setattr(sandbox, "_filter", lambda: allow)
    assert "open a socket to the host" in sandbox.self_test()


def test_the_self_test_notices_a_place_that_can_be_written(walled, monkeypatch, tmp_path):
    place = tmp_path / "open"
    place.mkdir()
    tmp_path.chmod(0o755)
    place.chmod(0o777)
    whole = sandbox._wall

    def open_wall(*arguments):
        found = whole(*arguments)
        at = found.index("--clearenv")
        return [*found[:at], "--bind", str(place), "/etc", *found[at:]]

    monkeypatch.setattr(sandbox, "_wall", open_wall)
    assert sandbox.self_test() == ["write into /etc"]


def test_a_kernel_computes_writes_its_own_files_and_uses_processes_and_threads(kernel):
    code = """
import multiprocessing, numpy, pathlib, subprocess, tempfile, threading
pathlib.Path("own.txt").write_text("mine")
tempfile.TemporaryFile().write(b"x")
thread = threading.Thread(target=worked.append, args=("thread",)); thread.start(); thread.join()
with multiprocessing.get_context("fork").Pool(2) as pool:
    worked.append(sum(pool.map(abs, [-1, -2])))
worked.append(subprocess.run(["echo", "hello"], capture_output=True, text=True).stdout)
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname()).close()
show([*worked, pathlib.Path("own.txt").read_text(), int(numpy.arange(3).sum())])
"""
    assert told(kernel, code) == ["thread", 3, "hello\n", "mine", 3]


def test_nothing_of_this_machine_can_be_read_written_or_reached(kernel, tmp_path, monkeypatch):
    secret = f"secret-{os.urandom(6).hex()}"
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    (tmp_path / "key.ipynb").write_text(secret)
    solutions = Path(__file__).parents[2] / "exercises" / "solutions"
    with (
        socket.create_server(("127.0.0.1", 0)) as port,
        socket.socket(socket.AF_UNIX) as file,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        file.bind(f"{tmp_path}/s")
        abstract.bind(f"\0{secret}")
        for one in (file, abstract):
            one.listen()
        code = f"""
for path in {[str(tmp_path), str(solutions), "/etc/shadow", "/var", "/sys", str(Path.home() / ".ssh")]!r}:
    attempt("read " + path, lambda: open(path) if os.path.isfile(path) else os.listdir(path))
for path in ["/", "/usr", "/etc", "/dev", "/run", {sys.prefix!r}, {str(Path(sandbox.__file__).parent)!r}]:
    attempt("write " + path, open, os.path.join(path, "new"), "w")
attempt("tcp", socket.create_connection, ("127.0.0.1", {port.getsockname()[1]}), 1)
attempt("out", socket.create_connection, ("1.1.1.1", 53), 1)
attempt("unix", socket.socket(socket.AF_UNIX).connect, "{tmp_path}/s")
attempt("abstract", socket.socket(socket.AF_UNIX).connect, "\\0{secret}")
for family in (socket.AF_VSOCK, socket.AF_ALG, socket.AF_PACKET):
    attempt(str(family), socket.socket, family, socket.SOCK_RAW)
for one in filter(str.isdigit, os.listdir("/proc")):
    attempt("environment", lambda: {secret!r} in open(f"/proc/{{one}}/environ").read())
attempt("signal", os.kill, {os.getpid()}, 0)
attempt("parent", os.kill, os.getppid(), 9)
attempt("many processes seen", lambda: len(list(filter(str.isdigit, os.listdir("/proc")))) > 4)
show([worked, [name for name in os.environ if "KEY" in name and os.environ[name] != "none" or "JPY" in name]])
"""
        worked, names = told(kernel, code)
    # The parent is the sandbox's own first process: a signal to it may be sent and does nothing.
    assert [what for what in worked if what != "parent"] == []
    assert names == []
    assert kernel.alive()


def test_there_is_no_way_to_be_root_or_to_open_a_namespace(kernel):
    code = """
for what, call, *arguments in [
    ("unshare", libc.unshare, 0x10000000),
    ("mounts", libc.unshare, 0x20000),
    ("setns", libc.setns, os.open("/proc/self/ns/net", os.O_RDONLY), 0),
    ("mount", libc.mount, b"none", b"/tmp", b"tmpfs", 0, None),
    ("remount", libc.mount, b"none", b"/usr", None, 32 | 4096, None),
    ("umount", libc.umount2, b"/usr", 2),
    ("chroot", libc.chroot, b"/tmp"),
    ("trace", libc.ptrace, 16, os.getppid(), 0, 0),
    ("memfd", libc.memfd_create, b"x", 0),
    ("shared memory", libc.shmget, 0, 4096, 0o1600),
    ("processors", libc.sched_setaffinity, 0, 8, ctypes.byref(ctypes.c_uint64(255))),
    ("io_uring", libc.syscall, 425, 1, None),
]:
    attempt(what, lambda: call(*arguments) >= 0)
attempt("setuid", os.setuid, 0)
attempt("is root", lambda: os.getuid() == 0 or os.geteuid() == 0)
attempt("device", os.mknod, "/tmp/disk", 0o600 | 0o60000, os.makedev(8, 0))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
show([worked, int(status["CapEff"], 16), int(status["NoNewPrivs"])])
"""
    worked, effective, no_new = told(kernel, code)
    assert worked == []
    assert effective == 0 and no_new == 1


def test_memory_and_disk_have_bounds_and_the_kernel_survives_them(kernel):
    code = """
attempt("memory", bytearray, 8 << 30)
def fill(folder):
    for number in range(20):
        with open(f"{folder}/fill-{number}", "wb") as file:
            file.write(bytes(32 << 20))
for folder in ("/tmp", "/dev/shm", "/run/kernel", "."):
    attempt(folder, fill, folder)
    for name in os.listdir(folder):
        if name.startswith("fill"):
            os.unlink(os.path.join(folder, name))
show(worked)
"""
    assert told(kernel, code) == []
    assert told(kernel, "show('alive')") == "alive"


def test_a_kernel_stays_on_the_processor_that_it_was_given(walled, tmp_path):
    cpu = max(os.sched_getaffinity(0))
    kernel = Kernel(walled, str(tmp_path), cpu)
    try:
        assert told(kernel, "show(sorted(os.sched_getaffinity(0)))") == [cpu]
    finally:
        kernel.stop()


LEAVE = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
if os.fork() == 0:
    os.setsid()
    import time
    time.sleep(600)
show("left")
"""


def test_when_a_kernel_is_stopped_nothing_that_it_started_is_left(kernel, tmp_path):
    assert told(kernel, LEAVE) == "left"
    family = descendants_of(kernel.manager.provisioner.pid)
    assert len(family) >= 4
    kernel.stop()
    assert not any(process.is_running() for process in family)
    assert list(tmp_path.iterdir()) == []


def test_when_the_grader_is_killed_its_kernels_end(walled, tmp_path):
    code = f"""
import time
from jupyter_client.kernelspec import KernelSpecManager
from companion.grading.run import Kernel

kernel = Kernel(KernelSpecManager(kernel_dirs={walled.kernel_dirs!r}), {str(tmp_path)!r})
kernel.execute({LEAVE.replace("show", "print")!r}, 10)
print("ready", flush=True)
time.sleep(600)
"""
    grader = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert grader.stdout.readline() == "ready\n"
    family = descendants_of(grader.pid)
    assert len(family) >= 3
    grader.send_signal(signal.SIGKILL)
    grader.wait()
    grader.stdout.close()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []


def _has_children(process):
    try:
        return bool(process.children())
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("milliseconds", range(6))
def test_when_the_grader_is_killed_while_a_kernel_starts_it_never_begins(walled, tmp_path, milliseconds):
    code = f"""
from pathlib import Path
from jupyter_client.manager import KernelManager
from companion.grading.sandbox import NAME, kernelspec

folder = {str(tmp_path)!r}
specs = kernelspec(Path(folder), env={{"MARK": folder}})
KernelManager(kernel_name=NAME, kernel_spec_manager=specs).start_kernel(cwd=folder)
"""
    grader = subprocess.Popen([sys.executable, "-c", code])
    while not descendants_of(grader.pid):
        assert grader.poll() is None
    time.sleep(milliseconds / 1000)
    grader.kill()
    grader.wait()

    def started():  # bubblewrap is told the environment in words
        ours = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in (p.info["cmdline"] or [])]
        return [p for p in ours if _has_children(p)]

    time.sleep(0.2)
    deadline = time.monotonic() + 10
    while started():
        assert time.monotonic() < deadline, started()
        time.sleep(0.05)


def test_a_file_or_folder_is_readable_where_that_is_asked_for(walled, tmp_path):
    shown = tmp_path / "shown"
    shown.mkdir()
    (shown / "data.csv").write_text("1,2")
    for path in (shown, *shown.parents[:3]):
        if path.is_relative_to(tmp_path):
            path.chmod(0o755)
    specs = sandbox.kernelspec(tmp_path / "spec", readable=[shown], weights=shown)
    kernel = Kernel(specs, str(tmp_path))
    try:
        code = f"""
attempt("write", open, {str(shown)!r} + "/new", "w")
show([worked, open({str(shown)!r} + "/data.csv").read(), os.environ["COMPANION_MODEL_PATH"]])
"""
        assert told(kernel, code) == [[], "1,2", str(shown)]
    finally:
        kernel.stop()


# Where there is no wall


def test_without_bubblewrap_it_is_refused_in_one_line_that_says_what_to_do(monkeypatch, tmp_path):
    which = sandbox.shutil.which
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None if name == "bwrap" else which(name))
    with pytest.raises(RuntimeError, match=r"bwrap not found.*--no-sandbox"):
        sandbox.kernelspec(tmp_path)
    sandbox.kernelspec(tmp_path, sandbox=False)


def test_on_other_systems_it_is_refused_too(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(RuntimeError, match=r"there is no sandbox.*--no-sandbox"):
        sandbox.kernelspec(tmp_path)


def test_a_wall_that_cannot_be_built_is_said_with_a_way_out(monkeypatch):
    if sys.platform != "linux":
        pytest.skip("Linux only")
    monkeypatch.setattr(sandbox, "require", lambda: None)
    monkeypatch.setattr(sandbox, "_wall", lambda *_: ["sh", "-c", "echo no rights >&2; exit 1"])
    with pytest.raises(RuntimeError, match="does not start: no rights"):
        sandbox.self_test()


# What is read off without a wall


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_every_jump_of_the_filter_ends_inside_it_and_each_call_is_decided(machine, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    program = list(struct.iter_unpack("=HBBI", sandbox._filter()))
    column, architecture = sandbox._ARCHITECTURES[machine]

    def decide(call, *arguments):
        memory = {0: call, 4: architecture} | {16 + 8 * n: value for n, value in enumerate(arguments)}
        at, loaded = 0, 0
        while True:
            code, then, otherwise, value = program[at]
            at += 1
            if code == 0x06:
                return value
            if code == 0x20:
                loaded = memory.get(value, 0)
            else:
                true = {0x15: loaded == value, 0x35: loaded >= value, 0x45: bool(loaded & value)}[code]
                at += then if true else otherwise

    allowed = 0x7FFF0000
    clone, sockets, *denied = [numbers[column] for numbers in sandbox._SYSTEM_CALLS.values()]
    assert all(decide(call) != allowed for call in [*denied, *sandbox._ABSENT, 0x40000000])
    assert decide(clone, 0x11) == allowed and decide(clone, 0x10000011) != allowed
    families = [socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK]
    assert all(decide(sockets, int(family), 1, 0) == allowed for family in families)
    assert all(decide(sockets, family, 1, 0) != allowed for family in (17, 38, 40))
    assert decide(sockets, int(socket.AF_NETLINK), 3, 16) != allowed
    assert decide({"x86_64": 0, "aarch64": 63}[machine]) == allowed  # read


def test_too_many_processes_and_too_much_memory_are_seen_from_outside(monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert sandbox.over_limit(child.pid) == ""
        monkeypatch.setattr(sandbox, "PROCESSES", 0)
        assert "processes" in sandbox.over_limit(child.pid)
        monkeypatch.undo()
        deadline = time.monotonic() + 10
        monkeypatch.setattr(sandbox, "MEMORY", 1 << 16)
        while not (said := sandbox.over_limit(child.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "memory" in said
    finally:
        child.kill()
        child.wait()
    assert sandbox.over_limit(child.pid) == ""


def test_the_kernelspec_names_the_provisioner_and_no_connection_to_the_graders_environment(walled):
    spec = walled.get_kernel_spec(sandbox.NAME)
    assert spec.metadata["kernel_provisioner"]["provisioner_name"] == "companion-sandbox"
    assert json.loads(json.dumps(spec.env))["COMPANION_GRADING_SEED"] == "7"
    known = {*sandbox.ENVIRONMENT, *sandbox.STEADY, *sandbox.NO_MODEL, "COMPANION_GRADING_SEED"}
    assert set(spec.env) <= known
