"""One endpoint for the whole test run, in a home of its own; the model files come from the user's cache.

What a test run does to its home (logs, locks, the endpoint's file) does not touch the user's.

With `-n 2 --dist loadfile` tests run in two processes, each with an endpoint of its own, and those of a
file in one of them. The notebooks come last: beside other work, the engine's threads would wait for each
other most of the time.
"""

import os

import pytest

from companion.local import process, weights


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # xdist would begin with the file that has the most tests


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.module.__name__ == "test_notebooks")


if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads that wait for each other in a loop would keep the other process's work from the processor.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session", autouse=True)
def companion_home(tmp_path_factory):
    """COMPANION_HOME for this run; models are linked in, so that nothing is fetched twice."""
    files = [weights.path(name) for name in weights.MODELS]
    fetched = weights.home() / "vendor"  # what the book's pages take from npm
    fetched.mkdir(parents=True, exist_ok=True)
    home = tmp_path_factory.mktemp("home")
    (home / "vendor").symlink_to(fetched)
    (home / "models").mkdir()
    for file in files:
        (home / "models" / file.name).symlink_to(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPANION_HOME", str(home))
        for name in ("COMPANION_BACKEND", "COMPANION_MODEL_PATH"):
            patch.delenv(name, raising=False)
        for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL", "OPENAI_EMBEDDING_MODEL"):
            patch.delenv(name, raising=False)
        yield home
        if endpoint := process.running():
            process.stop(endpoint)


@pytest.fixture(scope="session")
def client(companion_home):
    """The SDK's client on the real endpoint with the real models."""
    from companion.backend import client

    return client()
