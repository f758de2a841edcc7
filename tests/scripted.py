"""A scripted model at the boundary: a client that answers from a script, in the openai SDK's own types.

`Client("Hello", [("look_up", '{"id": "17"}')], RuntimeError("no"))` answers one chat request after the other:
a string is a reply, a list of (name, arguments) asks for tools, an exception is raised, and `Broken(text)` is
a reply whose stream ends in the middle. `requests` keeps every chat request as it was when it was sent.
"""

import copy
import json
import math
import re
import zlib
from dataclasses import dataclass
from types import SimpleNamespace

from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk

MODEL = "scripted"


@dataclass(frozen=True)
class Broken:
    """A reply whose stream ends before it is complete."""

    text: str


class Stream(list):
    """Chunks, as the SDK gives them: to be closed by a `with`."""

    closed = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True


class Client:
    """Stands in for `openai.OpenAI` for what the companion calls.

    A text's vector counts its words, so that texts with the same words are near.
    `next_tokens` are the probabilities after any prompt.
    """

    def __init__(self, *script, finish_reason="stop", next_tokens=None):
        self.script = list(script)
        self.finish_reason = finish_reason
        self.next_tokens = next_tokens or {}
        self.requests, self.streams, self.embedded = [], [], []
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self._chat))
        self.completions = SimpleNamespace(create=self._complete)
        self.embeddings = SimpleNamespace(create=self._embed)

    def _chat(self, *, model, messages, stream=False, stream_options=None, **options):
        self.requests.append({"model": model, "messages": copy.deepcopy(messages), **options})
        step = self.script.pop(0)
        if isinstance(step, Exception):
            raise step
        text, calls = (None, step) if isinstance(step, list) else (getattr(step, "text", step), [])
        calls = [
            {
                "index": i,
                "id": f"call_{i}",
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
            for i, (name, arguments) in enumerate(calls)
        ]
        usage = {
            "prompt_tokens": count(self.requests[-1]),
            "completion_tokens": len((text or "call").split()),
        }
        usage["total_tokens"] = sum(usage.values())
        finish_reason = "tool_calls" if calls else self.finish_reason
        common = {"id": "chatcmpl-1", "created": 0, "model": model}
        if not stream:
            message = {"role": "assistant", "content": text, "tool_calls": calls or None}
            choice = {"index": 0, "message": message, "finish_reason": finish_reason}
            return ChatCompletion.model_validate(
                {**common, "object": "chat.completion", "choices": [choice], "usage": usage}
            )
        deltas = [
            {"role": "assistant"},
            *({"content": piece} for piece in re.findall(r"\s*\S+\s*$|\s*\S+", text or "")),
        ]
        deltas += [{"tool_calls": [call]} for call in calls]
        choices = [[{"index": 0, "delta": delta, "finish_reason": None}] for delta in deltas]
        if not isinstance(step, Broken):
            choices.append([{"index": 0, "delta": {}, "finish_reason": finish_reason}])
        chunks = [{"choices": choice, "usage": None} for choice in choices]
        if stream_options == {"include_usage": True}:
            chunks.append({"choices": [], "usage": usage})
        common["object"] = "chat.completion.chunk"
        self.streams.append(Stream(ChatCompletionChunk.model_validate(common | chunk) for chunk in chunks))
        return self.streams[-1]

    def _complete(self, *, model, prompt, max_tokens, logprobs, echo=False):
        if echo:
            tokens = re.findall(r"\s?\w+|\s|[^\w\s]", prompt)
            found = {"tokens": tokens, "token_logprobs": [-1.0] * len(tokens)}
        else:
            likeliest = sorted(self.next_tokens.items(), key=lambda item: -item[1])[: logprobs + 1]
            found = {"tokens": [likeliest[0][0]], "top_logprobs": [{t: math.log(p) for t, p in likeliest}]}
        choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": found}
        return Completion.model_validate(
            {"id": "cmpl-1", "object": "text_completion", "created": 0, "model": model, "choices": [choice]}
        )

    def _embed(self, *, model, input):
        self.embedded.append(list(input))
        data = [
            {"object": "embedding", "index": i, "embedding": vector(text)} for i, text in enumerate(input)
        ]
        usage = {"prompt_tokens": 0, "total_tokens": 0}
        # Backwards, since the order of the answer is told by its indices.
        return CreateEmbeddingResponse.model_validate(
            {"object": "list", "model": model, "data": data[::-1], "usage": usage}
        )


def count(request):
    """A request's tokens: its words, those of calls and tools included, and four more a message."""
    texts = [str(message["content"]) for message in request["messages"]]
    texts += [json.dumps(message["tool_calls"]) for message in request["messages"] if "tool_calls" in message]
    texts.append(json.dumps(request.get("tools", "")))
    return 4 * len(request["messages"]) + sum(len(text.split()) for text in texts)


def vector(text, size=64):
    counts = [0.0] * size
    for word in re.findall(r"\w+", text.lower()):
        counts[zlib.crc32(word.encode()) % size] += 1
    return counts
