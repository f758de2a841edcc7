"""What fine-tuning made, taken elsewhere: an adapter for PEFT, a full checkpoint, or an order for `trl sft`.

Everything is read from the companion's home; no endpoint is asked. A folder that is written appears whole or
not at all.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import toolcalls, weights
from .store import Store, TunedModel
from .supervisor import resolve
from .wire import ChatRequest, parse

ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "adapter.gguf")
REPOSITORIES = {"smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
LEARNING_RATE, WARM_UP = 1e-3, 0.1  # the trainer's: at a multiplier of 1, and as a share of all steps

# SmolLM2's own template, with what is learnt marked as trl wants it: an answer and the token that ends it.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face' }}"
    "{{ '<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and message['weight'] != 0 %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def adapter(name: str, out: Path, store: Store | None = None) -> None:
    """Copy a tuned model's adapter: PEFT's two files, and llama.cpp's.

    Args:
        name: a tuned model, or a job, for the model that it made last.
        out: a new or empty folder.
        store: where jobs and models are remembered; the user's if None.

    Raises:
        ValueError: there is no such model.
        FileExistsError: `out` holds something.
    """
    model = _model(store or Store(), name)
    with _folder(out) as folder:
        for file in ADAPTER:
            shutil.copy2(model.adapter.parent / file, folder / file)


def merged(name: str, out: Path, store: Store | None = None) -> None:
    """Write a full checkpoint in bfloat16, base and adapter in one, for transformers and vLLM.

    Arguments and errors as in `adapter`.
    """
    from .training.adapter import merge

    model = _model(store or Store(), name)
    merge(model.adapter.parent, weights.path(model.base), out)


def trl(name: str, out: Path, store: Store | None = None) -> None:
    """Write what `trl sft` (trl 1.16) needs to do a job again on a cluster, in `out`.

    `sft.yaml` is its configuration, `chat_template.jinja` the base model's template with what is learnt
    marked, and `data/` holds the examples with tools, calls and results written out, as the local trainer
    does it. On n devices a step takes n times the examples that it takes here.

    Arguments and errors as in `adapter`; ValueError also where the job's training file was deleted.
    """
    store = store or Store()
    model = store.model(name)
    job = store.job(model.job if model else name)
    if job is None:
        raise _unknown(store, name)
    data = {"train": _examples(store, job, "training_file")}
    if job["validation_file"]:
        data["validation"] = _examples(store, job, "validation_file")
    settings = _settings(job, len(data["train"]))
    with _folder(out) as folder:
        (folder / "data").mkdir()
        for part, examples in data.items():
            lines = (json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
            (folder / "data" / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
        lines = (f"{key}: {json.dumps(value)}\n" for key, value in settings.items())  # JSON is YAML
        (folder / "sft.yaml").write_text("".join(lines), encoding="utf-8")


def _settings(job: dict, examples: int) -> dict:
    numbers = resolve(job["hyperparameters"], examples)
    settings = {
        "model_name_or_path": REPOSITORIES.get(job["model"], job["model"]),
        "dtype": "bfloat16",
        "bf16": True,
        "dataset_name": "data",
        "chat_template_path": "chat_template.jinja",
        "assistant_only_loss": True,
        "max_length": 2048,
        "use_peft": True,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "lora_target_modules": ["all-linear"],
        "num_train_epochs": numbers["n_epochs"],
        "per_device_train_batch_size": numbers["batch_size"],
        "learning_rate": LEARNING_RATE * numbers["learning_rate_multiplier"],
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": WARM_UP,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "group_by_length",
        "seed": job["seed"],
        "logging_steps": 1,
        "save_strategy": "epoch",
        "output_dir": "adapter",
        "report_to": "none",
    }
    if job["validation_file"]:
        settings |= {"dataset_test_split": "validation", "eval_strategy": "epoch"}
        settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    return settings


def _examples(store: Store, job: dict, param: str) -> list[dict]:
    """A job's examples with the texts that the model reads; weights are kept, the template heeds them."""
    places = (store.content(job[param]), store.job_folder(job["id"]) / f"{param}.jsonl")
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise ValueError(f"the file {job[param]} of {job['id']} was deleted: upload it and run the job again")
    found = []
    for line in file.read_text(encoding="utf-8").split("\n"):
        if not line.strip():
            continue
        example = json.loads(line)
        request = parse(ChatRequest, {"model": "", **example})
        messages = toolcalls.plain_messages(request.messages, request.tools or [], may_end_with_call=True)
        given = [message for message in example["messages"] if message["role"] == "assistant"]
        learnt = [message for message in messages if message["role"] == "assistant"]
        for message, original in zip(learnt, given, strict=True):
            message["weight"] = original.get("weight", 1)
        found.append({"messages": messages})
    return found


def _model(store: Store, name: str) -> TunedModel:
    if model := store.model(name):
        return model
    job = store.job(name)
    if job is None:
        raise _unknown(store, name)
    made = [model for model in store.models_of(name) if model.adapter.exists()]
    if not made:
        raise ValueError(f"{name} is {job['status']} and has no model yet")
    return next((model for model in made if model.name == job["fine_tuned_model"]), made[-1])


def _unknown(store: Store, name: str) -> ValueError:
    known = [model["id"] for model in store.models()]
    return ValueError(
        f"there is no job or tuned model {name!r}, only {', '.join(known) or 'the base models'}"
    )


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which then becomes `out`."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already and not an empty folder: name a new one")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield folder
        folder.chmod(0o755)
        if out.exists():
            out.rmdir()
        os.replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
