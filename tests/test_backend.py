"""Which side of the wall `client()` is bound to."""

import openai
import pytest

from companion import backend
from companion.local import process


def test_a_key_in_the_environment_alone_sends_nothing_to_a_hosted_service(client, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-real-key")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://hosted.example/v1")
    assert backend.is_local()
    assert str(backend.client().base_url).startswith("http://127.0.0.1:")
    assert backend.client().api_key != "a-real-key"


def test_the_client_is_made_once_for_one_endpoint(client):
    assert backend.client() is backend.client()


def test_a_hosted_backend_takes_the_sdks_own_variables(monkeypatch):
    monkeypatch.setenv("COMPANION_BACKEND", "openai")
    monkeypatch.setenv("OPENAI_API_KEY", "a-real-key")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://hosted.example/v1")
    hosted = backend.client()
    assert (str(hosted.base_url), hosted.api_key) == ("https://hosted.example/v1/", "a-real-key")


def test_the_hosted_client_is_made_once_for_one_account(monkeypatch):
    monkeypatch.setenv("COMPANION_BACKEND", "openai")
    monkeypatch.setenv("OPENAI_API_KEY", "a-real-key")
    first = backend.client()
    assert backend.client() is first
    monkeypatch.setenv("OPENAI_API_KEY", "another-key")
    assert backend.client().api_key == "another-key"


def test_a_hosted_backend_without_a_key_says_which_variable_is_missing(monkeypatch):
    monkeypatch.setenv("COMPANION_BACKEND", "openai")
    with pytest.raises(openai.OpenAIError, match="OPENAI_API_KEY"):
        backend.client()


def test_an_unknown_backend_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("COMPANION_BACKEND", "azure")
    for ask in (backend.client, backend.chat_model, backend.embedding_model):
        with pytest.raises(ValueError, match="COMPANION_BACKEND=azure is unknown"):
            ask()


def test_a_hosted_model_is_the_one_that_was_named(monkeypatch):
    monkeypatch.setenv("COMPANION_BACKEND", "openai")
    monkeypatch.setenv("OPENAI_MODEL", "gpt-6-luna")
    monkeypatch.setenv("OPENAI_EMBEDDING_MODEL", "text-embedding-3-small")
    assert backend.chat_model() == "gpt-6-luna"
    assert backend.embedding_model() == "text-embedding-3-small"


def test_a_hosted_server_of_the_courses_models_needs_no_names(client, monkeypatch):
    endpoint = process.running()
    monkeypatch.setenv("COMPANION_BACKEND", "openai")
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint.base_url)
    monkeypatch.setenv("OPENAI_API_KEY", endpoint.token)
    assert backend.chat_model() == backend.CHAT_MODEL
    assert backend.embedding_model() == backend.EMBEDDING_MODEL


def test_a_hosted_server_without_them_is_not_guessed_at(monkeypatch):
    class Served:
        base_url = "https://hosted.example/v1/"

        class models:
            @staticmethod
            def list():
                return []

    monkeypatch.setenv("COMPANION_BACKEND", "openai")
    monkeypatch.setattr(backend, "client", Served)
    with pytest.raises(ValueError, match="set OPENAI_MODEL to the model you want to use and pay for"):
        backend.chat_model()
