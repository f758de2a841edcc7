"""Chat examples as tokens.

An example is rendered as `companion.local.completions` renders a request, with the chat template that lies in
the model's file, so that training sees what serving will send. The loss counts what the model would have to
write: each assistant message whose `weight` is not 0, and the token that ends it.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import toolcalls
from ..engine import CONTEXT
from ..wire import ApiError, ChatRequest, parse


class ExampleError(ValueError):
    """An example that cannot be trained on: `code` and the message name what and where."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Tokens:
    """One example. ids: [length] int32. weights: [length] float32, of predicting each token from those before
    it; 0 where it is not the model's to write."""

    ids: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


class Encoder:
    """The tokenizer and the chat template of a GGUF file with a GPT-2 vocabulary."""

    def __init__(self, file: Path) -> None:
        import gguf
        import jinja2.sandbox

        fields = gguf.GGUFReader(file).fields

        def value(key: str):
            return fields[f"tokenizer.{key}"].contents()

        names, kinds = value("ggml.tokens"), value("ggml.token_type")
        special = [name for name, kind in zip(names, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
        merges = [tuple(merge.split(" ")) for merge in value("ggml.merges")]
        self.tokenizer = _tokenizer({name: id for id, name in enumerate(names)}, merges, special)
        self.template_source = value("chat_template")
        # The options are those with which chat templates are written, transformers' own.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self._template = environment.from_string(self.template_source)
        self.end = names[value("ggml.eos_token_id")]

    def render(self, messages: list[dict[str, str]]) -> str:
        """The text that the model reads."""
        return self._template.render(messages=messages)

    def encode(self, example: dict) -> Tokens:
        """The tokens of one example of OpenAI's chat format. Raises ExampleError."""
        try:
            request = parse(ChatRequest, {"model": "", **example})
            plain = toolcalls.plain_messages(request.messages, request.tools or [], may_end_with_call=True)
        except ApiError as error:
            raise ExampleError("invalid_example", str(error)) from None
        given = [
            message.get("weight", 1) for message in example["messages"] if message["role"] == "assistant"
        ]
        ids: list[int] = []
        weights: list[float] = []

        def add(text: str, weight: float) -> None:
            more = self.tokenizer.encode(text).ids
            ids.extend(more)
            weights.extend([weight] * len(more))

        # What the model writes is cut into tokens by itself, as it is when it is served.
        done = ""
        for place, message in enumerate(plain):
            if message["role"] != "assistant":
                continue
            whole, written = self.render(plain[: place + 1]), message["content"] + self.end
            start = whole.rindex(written)
            add(whole[len(done) : start], 0)
            add(written, given.pop(0))
            done = whole[: start + len(written)]
        if len(ids) > CONTEXT:
            raise ExampleError("example_too_long", f"{len(ids)} tokens, where a request holds {CONTEXT}")
        if not any(weights):
            raise ExampleError("nothing_to_learn", "no assistant message with a weight other than 0")
        return Tokens(np.array(ids, np.int32), np.array(weights, np.float32))

    def load(self, path: Path) -> list[Tokens]:
        """All examples of a JSONL file. Raises ExampleError that names the line."""
        found = []
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    found.append(self.encode(json.loads(line)))
                except ExampleError as error:
                    raise ExampleError(error.code, f"line {number}: {error}") from None
        return found


def _tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]], special: list[str]):
    """SmolLM2's tokenizer: byte-level BPE (Radford et al. 2019) that keeps digits apart."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return tokenizer


def batches(lengths: Sequence[int], size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """One epoch's batches of example numbers: each example once, in an order drawn from (seed, epoch).

    Batches are cut from pools of 8 batches that are sorted by length, so that a batch's examples are of like
    length, and shuffled.
    """
    draw = np.random.default_rng((seed, epoch))
    order = draw.permutation(len(lengths))
    cut: list[list[int]] = []
    for start in range(0, len(order), 8 * size):
        pool = sorted(order[start : start + 8 * size].tolist(), key=lambda number: lengths[number])
        cut += [pool[first : first + size] for first in range(0, len(pool), size)]
    return [cut[number] for number in draw.permutation(len(cut))]


def pieces(batch: Sequence[int], lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """A batch in pieces of at most `most` tokens (or one example), of like length."""
    piece: list[int] = []
    for number in sorted(batch, key=lambda number: lengths[number]):
        if piece and sum(lengths[other] for other in piece) + lengths[number] > most:
            yield piece
            piece = []
        piece.append(number)
    if piece:
        yield piece
