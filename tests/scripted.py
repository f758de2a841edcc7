"""A scripted model at the boundary: a client that answers from a script, in the openai SDK's own types.

`Client("Hello", [("look_up", '{"id": "17"}')], RuntimeError("no"))` answers one chat request after the other:
a string is a reply, a list of (name, arguments) asks for tools, an exception is raised, and `Broken(text)` is
a reply whose stream ends in the middle. `requests` keeps every chat request as it was when it was sent.

`Service(moment, moment, ...)` is the fine-tuning side of the API, behind a real `openai.OpenAI`.
"""

import copy
import json
import math
import re
import zlib
from dataclasses import dataclass
from types import SimpleNamespace

import httpx2
import openai
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


class Service:
    """Files, fine-tuning jobs and token counts, over HTTP as the SDK speaks it.

    Each look at the job shows the next of `moments`, the last one for ever: a dict of the job's fields, with
    "events" for how many of `events` there are by then (all, if not said), or an exception, raised instead.
    `jobs` are those that a list shows. `requests` keeps (method, path, body), `files` what was uploaded.
    """

    def __init__(self, *moments, events=(), jobs=(), page=3, refuse=None):
        self.moments, self.events, self.jobs, self.page = list(moments), list(events), list(jobs), page
        self.refuse = refuse  # the message of a 400 for a job that is to be created
        self.requests, self.files, self.known = [], {}, len(self.events)
        http = httpx2.Client(transport=httpx2.MockTransport(self._answer))
        self.client = openai.OpenAI(
            base_url="http://scripted/v1", api_key="none", max_retries=0, http_client=http
        )

    def sent(self, method, path):
        """The bodies of the requests to a route."""
        return [body for *asked, body in self.requests if asked == [method, path]]

    def _answer(self, request):
        path = request.url.path.removeprefix("/v1")
        is_json = request.headers.get("content-type") == "application/json"
        body = json.loads(request.content) if is_json and request.content else None
        self.requests.append((request.method, path, body))
        if path == "/files":
            name = re.search(rb'filename="([^"]*)"', request.content)[1].decode()
            content = request.content.split(b"\r\n\r\n")[-1].rpartition(b"\r\n--")[0]
            id = f"file-{len(self.files)}"
            self.files[id] = content
            found = {"id": id, "bytes": len(content), "created_at": 0, "filename": name, "object": "file"}
            return httpx2.Response(200, json={**found, "purpose": "fine-tune", "status": "processed"})
        if request.method == "DELETE":
            del self.files[path.split("/")[-1]]
            return httpx2.Response(200, json={"id": path.split("/")[-1], "object": "file", "deleted": True})
        if path == "/responses/input_tokens":
            texts = json.dumps([body["input"], body.get("tools")]).split()
            return httpx2.Response(200, json={"object": "response.input_tokens", "input_tokens": len(texts)})
        if path == "/fine_tuning/jobs" and request.method == "POST":
            if self.refuse:
                return httpx2.Response(400, json={"error": {"message": self.refuse}})
            return httpx2.Response(200, json=job(**{"status": "validating_files", "model": body["model"]}))
        if path == "/fine_tuning/jobs":
            return self._page(self.jobs, request)
        if path.endswith("/events"):
            return self._page(self.events[: self.known][::-1], request)
        if path == "/fine_tuning/jobs/ftjob-1":
            moment = self.moments.pop(0) if len(self.moments) > 1 else self.moments[0]
            if isinstance(moment, Exception):
                raise moment
            moment = dict(moment)
            self.known = moment.pop("events", len(self.events))
            return httpx2.Response(200, json=job(**moment))
        return httpx2.Response(404, json={"error": {"message": f"no route {path}"}})

    def _page(self, found, request):
        after = request.url.params.get("after")
        start = 1 + [one["id"] for one in found].index(after) if after else 0
        size = min(self.page, int(request.url.params.get("limit", 20)))
        more = len(found) > start + size
        return httpx2.Response(200, json={"data": found[start : start + size], "has_more": more})


def job(status, id="ftjob-1", **fields):
    """A fine-tuning job as the API shows it."""
    hyperparameters = {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 1.0}
    common = {"id": id, "object": "fine_tuning.job", "status": status, "created_at": 0, "model": MODEL}
    common |= {"organization_id": "org-1", "result_files": [], "seed": 0, "training_file": "file-0"}
    return {**common, "hyperparameters": hyperparameters, **fields}


def event(number, data=None):
    """An event of a job, as the API shows it: a metric where it has data."""
    common = {"id": f"ftevent-{number}", "object": "fine_tuning.job.event", "created_at": number}
    kind = "metrics" if data else "message"
    return {**common, "level": "info", "message": f"event {number}", "type": kind, "data": data or {}}


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
