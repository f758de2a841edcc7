"""The course's package, and the names that its chapters use.

    client()         an `openai.OpenAI`: the local endpoint, or a hosted service      companion.backend
    chat_model()     the name of the model to ask, embedding_model() of the other      companion.backend
    Chat             a conversation that remembers, streams and calls tools            companion.chat
    Index            search a company's own documents                                  companion.retrieval
    fine_tune()      from examples to a fine-tuning job, follow() to its model         companion.finetuning
    Sample, Score    a question with its answer, and how good a model's answer is      companion.evaluation
    evaluate()       samples put to a model and scored, compare() two such runs        companion.evaluation
    companion.assistant  a conversation with a customer, whose course is held by code
    companion.simulation simulated customers, judged by the database
    companion.shop   Fernway, the company of the course: its data, and in .systems its order systems
    companion.widgets  what is shown in Jupyter: the chat box, the token views
    companion.local  behind the wall: the OpenAI API on this machine

Importing this package is light: a name is loaded when it is first used.
"""

from importlib import import_module

_HOMES = {
    "client": "backend",
    "chat_model": "backend",
    "embedding_model": "backend",
    "Chat": "chat",
    "Index": "retrieval",
    "fine_tune": "finetuning",
    "follow": "finetuning",
    "Sample": "evaluation",
    "Score": "evaluation",
    "evaluate": "evaluation",
    "compare": "evaluation",
}
__all__ = [
    "Chat",
    "Index",
    "Sample",
    "Score",
    "chat_model",
    "client",
    "compare",
    "embedding_model",
    "evaluate",
    "fine_tune",
    "follow",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'companion' has no attribute {name!r}")
    value = getattr(import_module(f"companion.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
