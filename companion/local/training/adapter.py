"""A trained adapter as files: for PEFT, for llama.cpp, and merged into the base model.

Formats: https://huggingface.co/docs/peft/developer_guides/checkpoint and llama.cpp's
`convert_lora_to_gguf.py`. Every file is written beside its place and then renamed.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .examples import Encoder
from .model import GROUPS, Config, Model, interleaved, read_base

REPOSITORIES = {"smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # on Hugging Face


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """A file to write that takes `file`'s place when all is written; nothing is left where that fails.

    Raises OSError with ENOSPC where the disk is full, which every writer says in its own way.
    """
    new = file.with_name(f"{file.name}.new")
    try:
        yield new
        with new.open("rb+") as data:
            os.fsync(data.fileno())
        os.chmod(new, 0o644)
        os.replace(new, file)
    except BaseException as error:
        free = shutil.disk_usage(file.parent).free
        new.unlink(missing_ok=True)
        if isinstance(error, Exception) and free < 1 << 20:
            raise OSError(errno.ENOSPC, str(error)) from error
        raise


def save(model: Model, folder: Path, base: str) -> None:
    """Write `adapter_model.safetensors`, `adapter_config.json` and `adapter.gguf`.

    base: the base model's name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for part in model.parts():
        name = f"base_model.model.model.layers.{part.layer}.{part.names[0]}"
        tensors[f"{name}.lora_A.weight"] = part.a.cpu().contiguous()
        tensors[f"{name}.lora_B.weight"] = part.b.cpu().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": REPOSITORIES.get(base, base),
        "r": model.rank,
        "lora_alpha": model.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [names[0].split(".")[1] for group in GROUPS for names in group],
        "inference_mode": True,
    }
    with replaced(folder / "adapter_model.safetensors") as file:
        save_file(tensors, file, metadata={"format": "pt"})
    with replaced(folder / "adapter_config.json") as file:
        file.write_text(json.dumps(config, indent=2) + "\n")
    with replaced(folder / "adapter.gguf") as file:
        _save_gguf(model, file)


def _save_gguf(model: Model, file: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", model.alpha)
    for part in model.parts():
        a, b = part.a.cpu(), part.b.cpu()
        if part.names[1] in ("attn_q", "attn_k"):
            b = interleaved(b, model.config.head)
        name = f"blk.{part.layer}.{part.names[1]}.weight"
        writer.add_tensor(f"{name}.lora_a", a.half().contiguous().numpy())
        writer.add_tensor(f"{name}.lora_b", b.half().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def merge(adapter: Path, base: Path, out: Path) -> None:
    """Write a full checkpoint that transformers and vLLM load: base model plus adapter, in bfloat16.

    adapter: a folder that `save` wrote. base: the base model's GGUF file. out: a new or empty folder. Raises
    FileExistsError where it holds something.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty: name a new folder")
    config, tensors = read_base(base)
    lora = load_file(Path(adapter) / "adapter_model.safetensors")
    settings = json.loads((Path(adapter) / "adapter_config.json").read_text())
    scale = settings["lora_alpha"] / settings["r"]
    merged = {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
    }
    if "output.weight" in tensors:
        merged["lm_head.weight"] = tensors["output.weight"]
    for layer in range(config.layers):
        own = f"model.layers.{layer}"
        merged[f"{own}.input_layernorm.weight"] = tensors[f"blk.{layer}.attn_norm.weight"]
        merged[f"{own}.post_attention_layernorm.weight"] = tensors[f"blk.{layer}.ffn_norm.weight"]
        for peft_name, gguf_name in (names for group in GROUPS for names in group):
            name = f"base_model.model.{own}.{peft_name}"
            change = lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"]
            merged[f"{own}.{peft_name}.weight"] = tensors[f"blk.{layer}.{gguf_name}.weight"] + scale * change
    merged = {name: tensor.to(torch.bfloat16) for name, tensor in merged.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as name:
        folder = Path(name)
        save_file(merged, folder / "model.safetensors", metadata={"format": "pt"})
        encoder = Encoder(base)
        encoder.tokenizer.save(str(folder / "tokenizer.json"))
        files = _configuration(config, encoder, tied="lm_head.weight" not in merged)
        for file, content in files.items():
            (folder / file).write_text(json.dumps(content, indent=2) + "\n")
        for file in folder.iterdir():
            os.chmod(file, 0o644)
        os.chmod(folder, 0o755)
        if out.exists():
            out.rmdir()
        os.replace(folder, out)
        folder.mkdir()  # for the context manager to remove


def _configuration(config: Config, encoder: Encoder, tied: bool) -> dict[str, dict]:
    end = encoder.tokenizer.token_to_id(encoder.end)
    model = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.epsilon,
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "vocab_size": config.vocabulary,
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": end,
        "pad_token_id": end,
        "dtype": "bfloat16",
    }
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": encoder.tokenizer.id_to_token(1),
        "eos_token": encoder.end,
        "pad_token": encoder.end,
        "model_max_length": config.context,
        "chat_template": encoder.template_source,
        "clean_up_tokenization_spaces": False,
    }
    generation = {"bos_token_id": 1, "eos_token_id": end, "pad_token_id": end}
    return {
        "config.json": model,
        "tokenizer_config.json": tokenizer,
        "generation_config.json": generation,
    }
