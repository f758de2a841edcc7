"""Models and jobs taken elsewhere, out of a home that was filled by hand."""

import json
import re
from importlib.util import find_spec

import pytest
from test_dataset import ANSWER, CALLS, RESULT, TOOL, USER

from companion import dataset
from companion.local import export, weights
from companion.local.store import Store

PLAIN = {"messages": [USER, ANSWER]}
WITH_TOOLS = {"messages": [USER, CALLS, RESULT, ANSWER | {"weight": 0}, USER, ANSWER], "tools": [TOOL]}
TWELVE = [PLAIN] * 11 + [WITH_TOOLS]


@pytest.fixture
def store(tmp_path):
    found = Store(tmp_path / "home")
    yield found
    found.close()


def make_job(store, job_id="ftjob-1", status="succeeded", epochs=2, validation=None):
    """A job of twelve examples whose model, and one checkpoint before it, hold their own names."""
    for file in filter(None, ("file-1", validation)):
        dataset.save(TWELVE, store.content(file))
    numbers = {"n_epochs": epochs, "batch_size": 4, "learning_rate_multiplier": 0.5}
    job = {"id": job_id, "status": status, "model": "smollm2-135m-instruct", "seed": 7}
    job |= {"training_file": "file-1", "validation_file": validation, "hyperparameters": numbers}
    names = {"checkpoints/step-3": "ft:one:ckpt-step-3", "model": "ft:one"} if status == "succeeded" else {}
    store.add_job(job | {"fine_tuned_model": names.get("model")})
    for folder, name in names.items():
        place = store.job_folder(job_id) / folder
        place.mkdir(parents=True)
        for file in (*export.ADAPTER, "optimizer.pt"):
            (place / file).write_text(name)
        store.add_model(name, job_id, job["model"], place / "adapter.gguf")


@pytest.mark.parametrize(
    ("name", "whose"),
    [("ftjob-1", "ft:one"), ("ft:one", "ft:one"), ("ft:one:ckpt-step-3", "ft:one:ckpt-step-3")],
)
def test_an_adapter_is_found_by_its_job_and_by_its_name(name, whose, store, tmp_path):
    make_job(store)
    export.adapter(name, tmp_path / "deep" / "out", store)
    files = {file.name: file.read_text() for file in (tmp_path / "deep" / "out").iterdir()}
    assert files == dict.fromkeys(export.ADAPTER, whose)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_what_cannot_be_exported_is_said_and_nothing_is_left(store, tmp_path):
    make_job(store)
    make_job(store, "ftjob-2", status="running")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").touch()
    for write in (export.adapter, export.trl):
        with pytest.raises(ValueError, match="no job or tuned model 'ft:none', only ft:one"):
            write("ft:none", tmp_path / "out", store)
        with pytest.raises(FileExistsError, match="name a new one"):
            write("ftjob-1", full, store)
    with pytest.raises(ValueError, match="ftjob-2 is running and has no model yet"):
        export.adapter("ftjob-2", tmp_path / "out", store)
    (store.job_folder("ftjob-1") / "model" / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError):
        export.adapter("ftjob-1", tmp_path / "out", store)
    store.content("file-1").unlink()
    with pytest.raises(ValueError, match="file-1 of ftjob-1 was deleted"):
        export.trl("ftjob-1", tmp_path / "out", store)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "home"]
    assert [path.name for path in full.iterdir()] == ["thesis.txt"]


def test_a_model_is_merged_with_its_own_base(store, tmp_path, monkeypatch):
    adapter = pytest.importorskip("companion.local.training.adapter")
    asked = []
    monkeypatch.setattr(adapter, "merge", lambda *paths: asked.append(paths))
    make_job(store)
    export.merged("ftjob-1", tmp_path / "out", store)
    base = weights.path("smollm2-135m-instruct")
    assert asked == [(store.job_folder("ftjob-1") / "model", base, tmp_path / "out")]


def test_trl_gets_the_texts_that_the_local_trainer_reads(store, tmp_path):
    make_job(store, validation="file-2")
    export.trl("ftjob-1", tmp_path / "out", store)
    lines = (tmp_path / "out" / "data" / "train.jsonl").read_text().splitlines()
    assert (tmp_path / "out" / "data" / "validation.jsonl").read_text().splitlines() == lines
    first, *_, last = (json.loads(line)["messages"] for line in lines)
    assert first == [USER, ANSWER | {"weight": 1}]
    assert [message["role"] for message in last] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert last[2]["content"].startswith('<tool_call>{"name": "track"')
    assert last[3]["content"] == "<tool_response>in transit</tool_response>"
    assert [message.get("weight") for message in last] == [None, None, 1, None, 0, None, 1]


@pytest.mark.slow
@pytest.mark.parametrize("validation", [None, "file-2"])
def test_trls_own_parser_reads_the_configuration(validation, store, tmp_path, monkeypatch):
    sft = pytest.importorskip("trl.scripts.sft")
    import torch
    from trl import get_peft_config

    make_job(store, validation=validation)
    export.trl("ftjob-1", tmp_path / "out", store)
    monkeypatch.chdir(tmp_path / "out")
    script, training, model, _ = sft.make_parser().parse_args_and_config(
        ["--config", "sft.yaml", *([] if torch.accelerator.is_available() else ["--use_cpu"])]
    )
    assert (tmp_path / "out" / script.dataset_name).is_dir()
    assert (tmp_path / "out" / training.chat_template_path).read_text() == export.CHAT_TEMPLATE
    assert training.assistant_only_loss and training.bf16 and training.max_length == 2048
    assert (training.num_train_epochs, training.per_device_train_batch_size) == (2, 4)
    assert training.learning_rate == export.LEARNING_RATE / 2 and training.seed == 7
    assert training.lr_scheduler_kwargs == {"min_lr_rate": 0.1} and training.get_warmup_steps(100) == 10
    assert training.eval_strategy == ("epoch" if validation else "no")
    assert training.load_best_model_at_end == bool(validation)
    lora = get_peft_config(model)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (16, 32, 0.0, "all-linear")


@pytest.mark.slow
def test_the_template_is_the_models_own_and_marks_what_the_local_trainer_learns(store, tmp_path):
    pytest.importorskip("transformers")
    examples = pytest.importorskip("companion.local.training.examples")
    from transformers.utils.chat_template_utils import render_jinja_template

    make_job(store)
    export.trl("ftjob-1", tmp_path / "out", store)
    lines = (tmp_path / "out" / "data" / "train.jsonl").read_text().splitlines()
    encoder = examples.Encoder(weights.path("smollm2-135m-instruct"))
    for line, example in ((lines[0], PLAIN), (lines[-1], WITH_TOOLS)):
        messages = json.loads(line)["messages"]
        (text,), (spans,) = render_jinja_template(
            [messages], chat_template=export.CHAT_TEMPLATE, return_assistant_tokens_mask=True
        )
        tokens = encoder.encode(example)
        # The template ends a message with a newline; behind the last one there is nothing to learn.
        assert text.removesuffix("\n") == encoder.tokenizer.decode(
            tokens.ids.tolist(), skip_special_tokens=False
        )
        learnt = [id for id, weight in zip(tokens.ids.tolist(), tokens.weights, strict=True) if weight]
        marked = "".join(text[start:end] for start, end in spans)
        assert marked == encoder.tokenizer.decode(learnt, skip_special_tokens=False) != ""


@pytest.mark.skipif(find_spec("torch") is None, reason="needs the extra `train`")
def test_the_configuration_has_the_trainers_own_numbers():
    from companion.local.training import adapter, run

    assert (export.LEARNING_RATE, export.WARM_UP) == (run.LEARNING_RATE, run.WARM_UP)
    assert export.REPOSITORIES == adapter.REPOSITORIES


def test_every_template_marker_is_closed():
    assert len(re.findall(r"{% (if|for|generation)", export.CHAT_TEMPLATE)) == len(
        re.findall(r"{% end(if|for|generation)", export.CHAT_TEMPLATE)
    )
