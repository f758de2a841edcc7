"""One endpoint for the whole test run, in a home of its own; the model files come from the user's cache.

What a test run does to its home (logs, locks, the endpoint's file) does not touch the user's.
"""

import pytest

from companion.local import process, weights


@pytest.fixture(scope="session", autouse=True)
def companion_home(tmp_path_factory):
    """COMPANION_HOME for this run; models are linked in, so that nothing is fetched twice."""
    files = [weights.path(name) for name in weights.MODELS]
    home = tmp_path_factory.mktemp("home")
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
