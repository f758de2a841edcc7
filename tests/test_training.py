"""The trainer. Most tests train a model of two layers with random weights and the first words of the real
vocabulary; some compare the real model with PEFT and llama.cpp. All load torch, and so all are slow tests.
"""

import copy
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from disks import fill, small_disk

from companion import shop
from companion.local import completions, weights, wire
from companion.local.engine import CONTEXT, Engine

pytestmark = pytest.mark.slow
MODEL = "smollm2-135m-instruct"
WORDS = 1024  # of the vocabulary, in the small model
SIZES = {"block_count": 2, "embedding_length": 64, "feed_forward_length": 128, "context_length": 2048}
SIZES |= {"attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 16}

TOOL = {
    "type": "function",
    "function": {
        "name": "track",
        "parameters": {"type": "object", "properties": {"order_id": {"type": "string"}}},
    },
}
ARGUMENTS = '{"order_id": "FW-10269"}'
CALL = {"id": "c1", "type": "function", "function": {"name": "track", "arguments": ARGUMENTS}}
USER = {"role": "user", "content": "Where is FW-10269?"}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "in transit"}
ANSWER = {"role": "assistant", "content": "It is on its way — 2 days, naïve ☕."}
WITH_TOOLS = {
    "messages": [{"role": "developer", "content": "Be brief."}, USER, CALLING, RESULT, ANSWER],
    "tools": [TOOL],
}
UNANSWERED = {"messages": [USER, ANSWER, USER, CALLING], "tools": [TOOL]}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The small model has nothing for two to do."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def encoder():
    from companion.local.training.examples import Encoder

    return Encoder(weights.path(MODEL))


@pytest.fixture(scope="session")
def base(encoder, tmp_path_factory):
    """The small model's GGUF file. Its weights are numbers of bfloat16, so that a merge rounds nothing."""
    import gguf
    import torch

    file = tmp_path_factory.mktemp("base") / "small.gguf"
    vocabulary = encoder.tokenizer.get_vocab()
    names = sorted(vocabulary, key=vocabulary.get)[:WORDS]
    merges = json.loads(encoder.tokenizer.to_str())["model"]["merges"]
    merges = [pair for pair in merges if {*pair, "".join(pair)} <= set(names)]
    special = {token.content for token in encoder.tokenizer.get_added_tokens_decoder().values()}
    kinds = [gguf.TokenType.CONTROL if name in special else gguf.TokenType.NORMAL for name in names]
    out = gguf.GGUFWriter(file, "llama")
    for name, size in SIZES.items():
        out.add_uint32(f"llama.{name}", size)
    out.add_uint32("llama.vocab_size", len(names))
    out.add_rope_freq_base(10000.0)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list(names)
    out.add_token_types(kinds)
    out.add_token_merges([" ".join(pair) for pair in merges])
    out.add_eos_token_id(names.index(encoder.end))
    out.add_chat_template(encoder.template_source)
    draw = torch.Generator().manual_seed(1)

    def add(name: str, *shape: int) -> None:
        drawn = torch.randn(shape, generator=draw)
        drawn = drawn * shape[-1] ** -0.5 if len(shape) > 1 else 1 + drawn.abs()
        out.add_tensor(f"{name}.weight", drawn.bfloat16().float().numpy())

    add("token_embd", len(names), 64)
    add("output_norm", 64)
    for layer in range(SIZES["block_count"]):
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}", 64)
        shapes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
        shapes |= {"ffn_gate": (128, 64), "ffn_up": (128, 64), "ffn_down": (64, 128)}
        for name, shape in shapes.items():
            add(f"blk.{layer}.{name}", *shape)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return file


# --- examples as tokens -------------------------------------------------------------------------------------


def examples_of_fernway() -> list[dict]:
    tickets = shop.tickets("test").iloc[::12].itertuples()
    found = [
        {"messages": [{"role": "user", "content": t.text}, {"role": "assistant", "content": t.intent}]}
        for t in tickets
    ]
    for dialogue in shop.dialogues()[::8]:
        messages = dialogue["messages"]
        while messages[-1]["role"] != "assistant":
            messages = messages[:-1]
        found.append({"messages": messages})
    return [*found, WITH_TOOLS, UNANSWERED]


def spans(tokens) -> list[tuple[int, int]]:
    """Where the runs of tokens that count begin and end."""
    counts = np.flatnonzero(np.diff(np.concatenate(([0], tokens.weights > 0, [0]))))
    return list(zip(counts[::2].tolist(), counts[1::2].tolist(), strict=True))


def written(encoder, ids) -> str:
    return encoder.tokenizer.decode(list(ids), skip_special_tokens=False)


def test_training_sees_the_tokens_that_serving_sends(encoder):
    import httpx

    engine = Engine(weights.path(MODEL), MODEL, "chat", key="key")
    http = httpx.Client(base_url=engine.address, headers=engine.headers, timeout=60)

    def ask(route: str, body: dict) -> dict:
        return http.post(route, json=body).json()

    def tokenized(text: str) -> list[int]:
        return ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    found = examples_of_fernway()
    assert len(found) > 15
    for example in found:
        tokens = encoder.encode(example)
        places = [p for p, message in enumerate(example["messages"]) if message["role"] == "assistant"]
        for place, (start, stop) in zip(places, spans(tokens), strict=True):
            request = {"model": MODEL, **example, "messages": example["messages"][:place]}
            body = completions.engine_body(wire.parse(wire.ChatRequest, request))
            prompt = ask("/apply-template", {"messages": body["messages"]})["prompt"]
            assert tokens.ids[:start].tolist() == tokenized(prompt)
            answer = written(encoder, tokens.ids[start:stop])
            assert tokens.ids[start:stop].tolist() == tokenized(answer)
        assert stop == len(tokens)
    engine.close()


def test_the_loss_counts_what_the_assistant_writes_and_its_end(encoder):
    for example in examples_of_fernway()[:-2]:
        tokens = encoder.encode(example)
        said = [m["content"] + "<|im_end|>" for m in example["messages"] if m["role"] == "assistant"]
        assert [written(encoder, tokens.ids[start:stop]) for start, stop in spans(tokens)] == said
    call = '<tool_call>{"name": "track", "arguments": {"order_id": "FW-10269"}}</tool_call><|im_end|>'
    tokens = encoder.encode(WITH_TOOLS)
    said = [call, ANSWER["content"] + "<|im_end|>"]
    assert [written(encoder, tokens.ids[start:stop]) for start, stop in spans(tokens)] == said
    assert "<tool_response>in transit</tool_response>" in written(encoder, tokens.ids)
    tokens = encoder.encode(UNANSWERED)
    assert written(encoder, tokens.ids[slice(*spans(tokens)[-1])]) == call


def test_a_message_of_weight_0_is_read_and_not_learnt(encoder):
    silent, loud = ANSWER | {"weight": 0}, {"role": "assistant", "content": "Anything else?", "weight": 1}
    tokens = encoder.encode({"messages": [USER, silent, USER, loud]})
    [(start, stop)] = spans(tokens)
    assert written(encoder, tokens.ids[start:stop]) == "Anything else?<|im_end|>"
    assert ANSWER["content"] in written(encoder, tokens.ids[:start])
    both = encoder.encode({"messages": [USER, ANSWER, USER, loud]})
    assert both.ids.tolist() == tokens.ids.tolist() and both.weights.sum() > tokens.weights.sum()


def test_of_a_conversation_that_the_assistant_begins_only_its_words_are_learnt(encoder):
    greeting = {"role": "assistant", "content": "Fernway support, hello!"}
    tokens = encoder.encode({"messages": [greeting, USER, ANSWER]})
    said = [text["content"] + "<|im_end|>" for text in (greeting, ANSWER)]
    assert [written(encoder, tokens.ids[start:stop]) for start, stop in spans(tokens)] == said
    whole = encoder.render([greeting, USER, ANSWER])
    assert written(encoder, tokens.ids) == whole.removesuffix("\n")


def test_what_cannot_be_learnt_is_named_with_its_line(encoder, tmp_path):
    from companion.local.training.examples import ExampleError

    file, good = tmp_path / "train.jsonl", {"messages": [USER, ANSWER]}

    def error(example: dict) -> ExampleError:
        file.write_text("".join(json.dumps(line) + "\n" for line in (good, example, good)))
        with pytest.raises(ExampleError, match=r"^line 2: ") as caught:
            encoder.load(file)
        return caught.value

    long = error({"messages": [USER, ANSWER | {"content": "long " * CONTEXT}]})
    assert long.code == "example_too_long" and f"a request holds {CONTEXT}" in str(long)
    assert error({"messages": [USER, ANSWER | {"weight": 0}]}).code == "nothing_to_learn"
    assert error({"messages": [USER, RESULT, ANSWER]}).code == "invalid_example"


def test_a_batch_has_each_example_once_an_epoch_in_an_order_of_seed_and_epoch():
    from companion.local.training.examples import batches

    lengths = np.random.default_rng(0).integers(20, 400, 203).tolist()
    found = batches(lengths, 8, seed=7, epoch=0)
    assert sorted(number for batch in found for number in batch) == list(range(203))
    assert len(found) == 26 and max(map(len, found)) == 8
    assert found == batches(lengths, 8, seed=7, epoch=0)
    assert len({str(batches(lengths, 8, seed=s, epoch=e)) for s, e in ((7, 0), (7, 1), (8, 0))}) == 3
    spread = [np.ptp([lengths[number] for number in batch]) for batch in found]
    assert np.mean(spread) < np.ptp(lengths) / 4


def test_a_piece_is_bounded_and_nothing_is_lost():
    from companion.local.training.examples import pieces

    lengths = [500, 30, 1200, 900, 10, 700]
    found = list(pieces([0, 1, 2, 3, 5], lengths, 1000))
    assert sorted(number for piece in found for number in piece) == [0, 1, 2, 3, 5]
    assert all(len(piece) == 1 or sum(lengths[n] for n in piece) <= 1000 for piece in found)
    assert [1, 0] in found


# --- the model, against transformers and PEFT ---------------------------------------------------------------


def drawn_examples(*lengths: int) -> list:
    from companion.local.training.examples import Tokens

    draw = np.random.default_rng(sum(lengths))
    found = []
    for length in lengths:
        counts = (draw.random(length) < 0.4).astype(np.float32)
        counts[0], counts[-1] = 0, 1
        found.append(Tokens(draw.integers(0, WORDS, length).astype(np.int32), counts))
    return found


@pytest.fixture(scope="session")
def adapted(base, tmp_path_factory):
    """Our model, whose adapter changes much, its saved folder, and the base model in transformers."""
    import torch
    from transformers import LlamaForCausalLM

    from companion.local.training import adapter
    from companion.local.training.model import Model

    folder = tmp_path_factory.mktemp("adapter")
    model = Model(base, seed=3, dtype=torch.float32)
    adapter.save(model, folder / "none", MODEL)
    adapter.merge(folder / "none", base, folder / "base")
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for part in model.parts():
            part.b.copy_(torch.randn(part.b.shape, generator=draw) * 0.1)
    adapter.save(model, folder / "trained", MODEL)
    reference = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    return model, folder / "trained", reference


@pytest.fixture
def peft(adapted):
    from peft import PeftModel

    found = PeftModel.from_pretrained(adapted[2], adapted[1], is_trainable=True)
    yield found
    found.unload()


def gradients(model) -> dict:
    """The adapter's gradient under PEFT's names."""
    from companion.local.training.model import GROUPS

    found = {}
    for layer, matrices in enumerate(model.adapter):
        for group, outs, (a, b) in zip(GROUPS, model.outputs, matrices, strict=True):
            row = 0
            for place, ((name, _), out) in enumerate(zip(group, outs, strict=True)):
                columns = slice(place * model.rank, (place + 1) * model.rank)
                full = f"base_model.model.model.layers.{layer}.{name}"
                found[f"{full}.lora_A.default.weight"] = a.grad[columns]
                found[f"{full}.lora_B.default.weight"] = b.grad[row : row + out, columns]
                row += out
    return found


def worst_difference(found: dict, wanted: dict) -> float:
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


@pytest.mark.parametrize(
    "lengths",
    [(40, 40, 40), (23, 24, 25, 60), (50, 7, 31, 48, 8), (500, 12, 400), (9,)],
    ids=["equal", "alike", "unequal", "long", "one"],
)
def test_loss_and_gradient_are_those_of_peft(adapted, peft, lengths):
    import torch

    model, examples = adapted[0], drawn_examples(*lengths)
    total = sum(float(example.weights.sum()) for example in examples)
    model.gradient.zero_()
    loss, right = model.loss(examples, total=total)
    wanted, hits = 0.0, 0
    for example in examples:
        ids, counts = torch.from_numpy(example.ids).long(), torch.from_numpy(example.weights)[1:]
        logits = peft(ids[None]).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        ((each * counts).sum() / total).backward()
        wanted += float((each * counts).sum().detach())
        hits += int(((logits.argmax(-1) == ids[1:]) & (counts > 0)).sum())
    assert loss == pytest.approx(wanted, rel=1e-5) and right == hits
    theirs = {name: p.grad for name, p in peft.named_parameters() if p.grad is not None}
    ours = gradients(model)
    assert worst_difference(ours, theirs) < 1e-4
    # What stands outside the layers' own blocks of B is no part of the adapter, and stays 0.
    own = sum(float(part.square().sum()) for part in ours.values())
    assert float(model.gradient.square().sum()) == pytest.approx(own, rel=1e-5)


def test_a_batch_in_pieces_has_the_gradient_of_the_whole(adapted):
    model, examples = adapted[0], drawn_examples(60, 30, 420, 33, 20)
    total = sum(float(example.weights.sum()) for example in examples)
    model.gradient.zero_()
    whole = model.loss(examples, total=total)
    gradient = model.gradient.clone()
    model.gradient.zero_()
    parts = [model.loss(piece, total=total) for piece in (examples[3:], examples[:1], examples[1:3])]
    assert sum(part[0] for part in parts) == pytest.approx(whole[0], rel=1e-5)
    assert sum(part[1] for part in parts) == whole[1]
    assert float((model.gradient - gradient).norm() / gradient.norm()) < 1e-5
    before = model.gradient.clone()
    assert model.loss(examples)[0] == pytest.approx(whole[0], rel=1e-5)  # without `total` it only measures
    assert (model.gradient == before).all()


def test_a_merged_checkpoint_is_the_base_model_with_the_adapter_in_it(adapted, peft, base, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from companion.local.training import adapter
    from companion.local.training.examples import Encoder

    adapter.merge(adapted[1], base, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert ours.dtype == torch.bfloat16
    ids = torch.from_numpy(drawn_examples(60)[0].ids).long()[None]
    merged = copy.deepcopy(peft).merge_and_unload()
    with torch.no_grad():
        wanted, found = merged(ids).logits, ours.float()(ids).logits
    assert float((found - wanted).norm() / wanted.norm()) < 0.02
    for name, values in merged.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], values, rtol=2**-8, atol=1e-6)  # rounded
    own, tokenizer = Encoder(base), AutoTokenizer.from_pretrained(tmp_path / "merged")
    for ticket in shop.tickets("test").itertuples():
        assert tokenizer(ticket.text).input_ids == own.tokenizer.encode(ticket.text).ids
    messages = [USER, ANSWER, USER]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == own.render(messages)
    assert (tokenizer.eos_token, tokenizer.pad_token) == (own.end, own.end)
    with pytest.raises(FileExistsError, match="name a new folder"):
        adapter.merge(adapted[1], base, tmp_path / "merged")


# --- a run --------------------------------------------------------------------------------------------------


def make_job(folder: Path, *, examples: int = 24, validation: int = 8, **more) -> Path:
    """A job whose examples are Fernway's subjects and intents."""
    folder.mkdir(exist_ok=True)
    tickets = shop.tickets("train").dropna(subset=["subject"])
    lines = [
        json.dumps(
            {"messages": [{"role": "user", "content": t.subject}, {"role": "assistant", "content": t.intent}]}
        )
        for t in tickets.sample(examples + validation, random_state=0).itertuples()
    ]
    (folder / "train.jsonl").write_text("\n".join(lines[:examples]) + "\n")
    (folder / "validation.jsonl").write_text("\n".join(lines[examples:]) + "\n")
    order = {"job": "ftjob-1", "model": MODEL, "n_epochs": 2, "batch_size": 8, "seed": 7}
    order |= {"learning_rate_multiplier": 5.0, "early_stopping_patience": None}
    order |= {"train": str(folder / "train.jsonl")}
    order |= {"validation": str(folder / "validation.jsonl") if validation else None}
    (folder / "job.json").write_text(json.dumps(order | more))
    return folder


def told(folder: Path) -> list[dict]:
    """The events as readers take them: whole lines, of each key the first."""
    found: dict[str, dict] = {}
    for line in (folder / "events.jsonl").read_bytes().split(b"\n")[:-1]:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        found.setdefault(event["key"], event)
    return list(found.values())


def losses(folder: Path) -> list[float]:
    return [event["train_loss"] for event in told(folder) if event["type"] == "step"]


def best_adapter(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / told(folder)[-1]["best"] / "adapter_model.safetensors")


@pytest.fixture
def train(base, monkeypatch):
    """Trains the job of a folder here, up to its end or until an event with the key `until` was told."""
    from companion.local.training import run

    monkeypatch.setattr(weights, "path", lambda *_, **__: base)

    def go(folder: Path, until: str | None = None) -> bool:
        stop, events = threading.Event(), run.Events(folder / "events.jsonl")
        add = events.add

        def tell(type: str, key: str, **fields) -> None:
            add(type, key, **fields)
            if key == until:
                stop.set()

        events.add = tell
        return run.Run(folder, events).go(stop)

    return go


def test_a_run_tells_what_it_does_in_order(train, tmp_path):
    folder = make_job(tmp_path / "job")
    assert train(folder)
    events = told(folder)
    assert [event["key"] for event in events] == [
        *("start", "step-1", "step-2", "step-3", "eval-3", "checkpoint-3"),
        *("step-4", "step-5", "step-6", "eval-6", "checkpoint-6", "end"),
    ]
    assert "24 examples" in events[0]["message"] and "6 steps" in events[0]["message"]
    steps = [event for event in events if event["type"] == "step"]
    assert [(event["step"], event["total_steps"], event["epoch"]) for event in steps] == [
        (step, 6, 1 + step // 4) for step in range(1, 7)
    ]
    tokens = [event["trained_tokens"] for event in steps]
    assert tokens == sorted(tokens) and tokens[5] == 2 * tokens[2] == events[-1]["trained_tokens"]
    evaluation, checkpoint = events[9], events[10]
    assert checkpoint["full_valid_loss"] == evaluation["valid_loss"]
    assert checkpoint["full_valid_mean_token_accuracy"] == evaluation["valid_mean_token_accuracy"]
    assert checkpoint["train_loss"] == steps[-1]["train_loss"]
    assert all(0 <= event["train_mean_token_accuracy"] <= 1 for event in steps)
    assert events[-1]["outcome"] == "succeeded" and events[-1]["best"] == "checkpoints/step-6"
    assert [event["at"] for event in events] == sorted(event["at"] for event in events)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    saved = {"adapter.gguf", "adapter_model.safetensors", "adapter_config.json"}
    assert files == {
        *("job.json", "train.jsonl", "validation.jsonl", "events.jsonl"),
        *(f"checkpoints/step-{step}/{name}" for step in (3, 6) for name in saved),
    }


def test_a_loss_begins_at_the_base_models_and_falls(train, base, tmp_path):
    import torch

    from companion.local.training.examples import Encoder, batches
    from companion.local.training.model import Model
    from companion.local.training.run import device_and_dtype

    folder = make_job(tmp_path / "job", n_epochs=10, validation=0)
    assert train(folder)
    found = losses(folder)
    examples = Encoder(base).load(folder / "train.jsonl")
    first = [examples[n] for n in batches([len(e) for e in examples], 8, seed=7, epoch=0)[0]]
    device, dtype = device_and_dtype()
    with torch.no_grad():
        model = Model(base, device=device, dtype=dtype)
    total = sum(float(example.weights.sum()) for example in first)
    assert found[0] == pytest.approx(model.loss(first)[0] / total, rel=0.01)
    assert np.mean(found[-3:]) < 0.7 * np.mean(found[:3])
    assert not any(event["type"] == "eval" for event in told(folder))
    assert told(folder)[-1]["best"] == "checkpoints/step-30"


def test_the_same_seed_gives_the_same_run_and_another_does_not(train, tmp_path):
    folders = [make_job(tmp_path / str(number), seed=7 + number // 2, n_epochs=1) for number in range(3)]
    for folder in folders:
        assert train(folder)
    assert losses(folders[0]) == losses(folders[1])
    assert losses(folders[0]) != losses(folders[2])


@pytest.fixture
def undisturbed(train, tmp_path):
    folder = make_job(tmp_path / "undisturbed", n_epochs=3)
    assert train(folder)
    return folder


def assert_alike(folder: Path, undisturbed: Path) -> None:
    """No event is missing, and losses and adapter are those of the run that nothing disturbed."""
    found = [event for event in told(folder) if event["type"] != "message"]
    wanted = [event for event in told(undisturbed) if event["type"] != "message"]
    assert [event["key"] for event in found] == [event["key"] for event in wanted]
    assert losses(folder) == pytest.approx(losses(undisturbed), rel=1e-3)
    ours, theirs = best_adapter(folder), best_adapter(undisturbed)
    assert worst_difference(ours, theirs) < 1e-3


@pytest.mark.parametrize("until", ["step-2", "checkpoint-3", "step-7"])
def test_a_stopped_run_goes_on_where_it_was_and_ends_as_one_that_was_not(train, undisturbed, tmp_path, until):
    folder = make_job(tmp_path / "stopped", n_epochs=3)
    assert not train(folder, until)
    reached = told(folder)[-1]["key"]
    assert reached == until and not any(event["type"] == "end" for event in told(folder))
    assert train(folder)
    again = [json.loads(line)["key"] for line in (folder / "events.jsonl").read_text().splitlines()]
    steps = [key for key in again if key.startswith("step-")]
    assert steps == [f"step-{step}" for step in range(1, 10)]  # a run that saved its state does no step twice
    assert any(key.startswith("resumed-") for key in again)
    assert_alike(folder, undisturbed)


def test_a_line_that_a_kill_cut_off_is_ended(train, tmp_path):
    folder = make_job(tmp_path / "job", n_epochs=1)
    assert not train(folder, "step-1")
    with (folder / "events.jsonl").open("a") as out:
        out.write('{"type": "step", "key": "step-2", "at": 1.')
    assert train(folder)
    keys = [event["key"] for event in told(folder) if event["type"] == "step"]
    assert keys == ["step-1", "step-2", "step-3"]
    assert told(folder)[-1]["outcome"] == "succeeded"


def with_validation_losses(monkeypatch, *values: float) -> None:
    from companion.local.training.run import Run

    measure, left = Run._losses, list(values)

    def losses(self, examples, training):
        return measure(self, examples, training) if training else (left.pop(0), 1, 2, 1.0)

    monkeypatch.setattr(Run, "_losses", losses)


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


def test_the_best_checkpoint_and_the_newest_three_are_kept(train, tmp_path, monkeypatch):
    folder = make_job(tmp_path / "job", examples=8, n_epochs=7)
    with_validation_losses(monkeypatch, 3.0, 1.0, 2.0, 5.0, 4.0, 6.0, 2.5)
    assert train(folder)
    assert told(folder)[-1]["best"] == "checkpoints/step-2"
    assert kept(folder) == [2, 5, 6, 7]


@pytest.mark.parametrize(("patience", "steps"), [(None, 6), (1, 3), (2, 5)])
def test_a_run_stops_early_only_when_asked_and_when_validation_has_not_improved(
    train, tmp_path, monkeypatch, patience, steps
):
    folder = make_job(tmp_path / "job", examples=8, n_epochs=6, early_stopping_patience=patience)
    with_validation_losses(monkeypatch, 3.0, 2.0, 2.5, 1.0, 1.5, 1.2) if patience != 2 else (
        with_validation_losses(monkeypatch, 3.0, 2.0, 1.0, 2.5, 1.5, 1.2)
    )
    assert train(folder)
    assert len(losses(folder)) == steps
    early = [event["message"] for event in told(folder) if event["key"] == "stopped-early"]
    assert [str(patience) in message for message in early] == ([True] if patience else [])


def test_a_loss_that_is_no_number_fails_the_job_with_advice(train, tmp_path):
    from companion.local.training.run import TrainingError

    folder = make_job(tmp_path / "job", learning_rate_multiplier=1e30)
    with pytest.raises(TrainingError, match=r"Try a lower learning_rate_multiplier than 1e\+30") as caught:
        train(folder)
    assert (caught.value.code, caught.value.param) == ("training_diverged", "learning_rate_multiplier")


def test_a_last_step_that_leaves_no_numbers_fails_the_job_too(train, tmp_path):
    from companion.local.training.run import TrainingError

    for validation in (0, 4):
        folder = make_job(
            tmp_path / str(validation),
            examples=8,
            validation=validation,
            n_epochs=1,
            learning_rate_multiplier=1e60,
        )
        with pytest.raises(TrainingError, match="no longer a number"):
            train(folder)
        assert not (folder / "checkpoints").exists()


def test_bfloat16_is_used_only_where_the_processor_has_it(train, tmp_path, monkeypatch):
    import torch

    from companion.local.training import run

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert run.device_and_dtype() == (torch.device("cpu"), torch.float32)
    folder = make_job(tmp_path / "job", examples=8, n_epochs=1)
    assert train(folder)
    assert told(folder)[0]["message"].endswith("on cpu in float32")


# --- the process --------------------------------------------------------------------------------------------


def forked(base: Path, folder: Path, save_every: float, pipe) -> None:
    """`python -m companion.local.training`, in a process that has imported torch already."""
    import torch

    from companion.local.training import run

    torch.set_num_threads(1)
    os.dup2(pipe.fileno(), 0)
    weights.path = lambda *_, **__: base
    run.SAVE_EVERY = save_every
    sys.exit(run.main(folder))


@pytest.fixture(scope="session")
def start(base):
    """Starts a trainer as a process; returns it, and the pipe to its standard input."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("no processes can be forked here")
    context = multiprocessing.get_context("forkserver")
    ours = ("training.run", "completions", "engine")
    theirs = ("torch._dynamo", "gguf", "pytest", "pandas")  # what makes a start slow
    context.set_forkserver_preload([*(f"companion.local.{name}" for name in ours), *theirs])

    def go(folder: Path, save_every: float = 30.0):
        theirs, ours = context.Pipe(duplex=False)
        process = context.Process(target=forked, args=(base, folder, save_every, theirs), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    return go


def wait_for(folder: Path, lines: int, process) -> None:
    """Until so many events stand in the file, or the process has ended."""
    file, deadline = folder / "events.jsonl", time.monotonic() + 60
    while process.is_alive() and (not file.exists() or file.read_bytes().count(b"\n") < lines):
        assert time.monotonic() < deadline
        time.sleep(0.002)


def ended(process) -> int:
    process.join(60)
    return process.exitcode


def test_a_trainer_whose_parent_dies_or_says_stop_saves_its_state_and_leaves(start, tmp_path):
    folder = make_job(tmp_path / "job", n_epochs=100)
    process, stdin = start(folder)
    wait_for(folder, 3, process)
    stdin.close()
    assert ended(process) == 3 and (folder / "state.pt").exists()
    first = len(losses(folder))
    process, stdin = start(folder)
    wait_for(folder, first + 10, process)
    os.write(stdin.fileno(), b"st")
    os.write(stdin.fileno(), b"op\n")
    assert ended(process) == 3
    assert len(losses(folder)) > first and not any(event["type"] == "end" for event in told(folder))


def test_a_failed_job_ends_with_the_error_and_status_1(start, tmp_path):
    folder = make_job(tmp_path / "job", learning_rate_multiplier=1e30)
    process, _stdin = start(folder)
    assert ended(process) == 1
    event = told(folder)[-1]
    assert (event["key"], event["outcome"]) == ("end", "failed")
    assert event["error"]["code"] == "training_diverged"
    assert event["error"]["param"] == "learning_rate_multiplier"
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[4] = json.dumps({"messages": [USER, ANSWER | {"content": "x " * CONTEXT}]})
    (folder / "train.jsonl").write_text("\n".join(lines))
    process, _stdin = start(make_job(tmp_path / "other", train=str(folder / "train.jsonl")))
    assert ended(process) == 1
    error = told(tmp_path / "other")[-1]["error"]
    assert (error["code"], error["param"]) == ("example_too_long", "training_file")
    assert error["message"].startswith("The training file has line 5: ")


def test_a_trainer_killed_at_any_moment_ten_times_ends_as_one_that_was_not(start, train, tmp_path):
    undisturbed = make_job(tmp_path / "undisturbed", n_epochs=40)
    assert train(undisturbed)
    folder = make_job(tmp_path / "killed", n_epochs=40)
    moments, events, kills = random.Random(1), folder / "events.jsonl", 0
    while True:
        process, _stdin = start(folder, save_every=0.0)
        if kills < 10:
            lines = events.read_bytes().count(b"\n") if events.exists() else 0
            wait_for(folder, lines + moments.randrange(8), process)
            time.sleep(moments.uniform(0, 0.03))
            process.kill()
            kills += 1
        status = ended(process)
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert kills == 10
    assert_alike(folder, undisturbed)
    assert kept(folder) == kept(undisturbed)
    left = {path.name for path in folder.rglob("*") if path.is_file() and path.name.endswith(".new")}
    assert not left


@pytest.mark.parametrize("room", [0, 8, 100, 180, 260, 500])
def test_a_full_disk_fails_the_job_and_leaves_nothing_half_made(start, tmp_path, room):
    with small_disk(tmp_path / "disk") as disk:
        folder = make_job(disk / "job", n_epochs=4, validation=0)
        (folder / "events.jsonl").touch()
        fill(disk, room << 10)
        process, _stdin = start(folder)
        assert ended(process) == 1
        if room:
            event = told(folder)[-1]
            assert (event["key"], event["outcome"]) == ("end", "failed")
            assert event["error"]["code"] == "insufficient_storage"
            assert str(folder) in event["error"]["message"]
        checkpoints = {e["folder"] for e in told(folder) if e["type"] == "checkpoint"}
        found = {str(path.relative_to(folder)) for path in folder.glob("checkpoints/*")}
        assert found == checkpoints
        assert all(len(list((folder / name).iterdir())) == 3 for name in found)
        names = {path.name for path in folder.iterdir()} - {"checkpoints"}
        assert names == {"job.json", "train.jsonl", "validation.jsonl", "events.jsonl"}


# --- the real model -----------------------------------------------------------------------------------------


def triage(ticket) -> dict:
    answer = json.dumps({"intent": ticket.intent, "urgency": ticket.urgency})
    return {"messages": [{"role": "user", "content": ticket.text}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a triage job that has trained the real model for 24 steps."""
    folder = tmp_path_factory.mktemp("real") / "job"
    make_job(folder, n_epochs=4, learning_rate_multiplier=1.0)
    tickets = shop.tickets("train")
    short = tickets[tickets.text.str.len() < 250].sample(48, random_state=0)
    (folder / "train.jsonl").write_text("".join(json.dumps(triage(t)) + "\n" for t in short.itertuples()))
    command = [sys.executable, "-m", "companion.local.training", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.wait() == 0
    return folder


def test_the_adapter_says_the_same_in_peft_and_in_llama(trained):
    import httpx
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(os.cpu_count())
    checkpoint = trained / told(trained)[-1]["best"]
    tickets = shop.tickets("test")
    chats = [
        [{"role": "user", "content": text}] for text in tickets.text[tickets.text.str.len() < 250].head(6)
    ]
    file = weights.path(MODEL)
    engine = Engine(file, MODEL, "chat", [checkpoint / "adapter.gguf"], key="key")
    body = {"temperature": 0, "max_tokens": 40}
    served = [
        httpx.post(
            f"{engine.address}/v1/chat/completions",
            json=body | {"messages": chat},
            headers=engine.headers,
            timeout=60,
        ).json()["choices"][0]["message"]["content"]
        for chat in chats
    ]
    engine.close()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, checkpoint)
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**inputs, max_new_tokens=40, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert tokenizer.batch_decode(made, skip_special_tokens=True) == served and len(set(served)) > 1
    assert any(
        text.startswith('{"intent"') for text in served
    )  # 24 steps teach the form, not yet each answer


def test_training_on_the_longest_examples_takes_less_than_3_gb(tmp_path, encoder):
    ids = encoder.tokenizer.encode(" ".join(shop.tickets("train").text)).ids

    def example(asked: int, answered: int) -> dict:
        """Of so many tokens, and a few more for the roles."""
        texts = [encoder.tokenizer.decode(ids[:count]) for count in (asked, answered)]
        roles = ("user", "assistant")
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        return {"messages": messages}

    longest = [example(1000, CONTEXT - 1050), example(CONTEXT - 350, 300), *[example(200, 140)] * 5]
    lengths = [len(encoder.encode(found)) for found in longest]
    assert all(length > 0.95 * CONTEXT for length in lengths[:2])
    folder = make_job(tmp_path / "job", n_epochs=1, batch_size=len(longest))
    for name in ("train", "validation"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(found) + "\n" for found in longest))
    # A process's peak counts from its parent's, so a small one stands between the tests' and the trainer's.
    code = "import os, subprocess, sys\n"
    code += "process = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=sys.stderr)\n"
    code += "_, status, used = os.wait4(process.pid, 0); print(status, used.ru_maxrss)"
    command = [sys.executable, "-m", "companion.local.training", str(folder)]
    status, peak = map(int, subprocess.check_output([sys.executable, "-c", code, *command]).split())
    assert status == 0 and told(folder)[-1]["outcome"] == "succeeded"
    assert peak < 3e6  # Linux counts in kB
