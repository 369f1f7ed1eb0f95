"""Tiny random checkpoints, written by the tests themselves."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.checkpoint.gpt_oss import stored_tensors
from quantkit.formats.files import header_bytes, write_file
from quantkit.formats.tiers import TensorSpec

CONFIG: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "eos_token_id": 1,
    "head_dim": 32,
    "hidden_size": 128,
    "intermediate_size": 192,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "model_type": "gpt_oss",
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"rope_type": "default"},
    "rope_theta": 10000,
    "sliding_window": 16,
    "tie_word_embeddings": False,
    "vocab_size": 64,
}
Tensors = list[tuple[TensorSpec, np.ndarray]]


def bf16(values: np.ndarray) -> np.ndarray:
    """float32 values cut to BF16, as uint16 bits."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def random_values(spec: TensorSpec, rng: np.random.Generator) -> np.ndarray:
    if spec.name.endswith("_scales"):
        return rng.integers(118, 124, spec.shape, np.uint8)
    if spec.dtype == "U8":
        return rng.integers(0, 256, spec.shape, np.uint8)
    scale = 1.0 if "norm" in spec.name else 0.1
    offset = 1.0 if "norm" in spec.name else 0.0
    values = offset + scale * rng.standard_normal(spec.shape).astype(np.float32)
    if spec.dtype in ("F16", "F32"):
        return values.astype({"F16": np.float16, "F32": np.float32}[spec.dtype])
    return bf16(values)


def gpt_oss_tensors(config: dict[str, Any] = CONFIG, packed: bool = True, seed: int = 0) -> Tensors:
    rng = np.random.default_rng(seed)
    return [(spec, random_values(spec, rng)) for spec in stored_tensors(config, packed)]


def write_checkpoint(
    folder: Path, config: dict[str, Any], tensors: Tensors, shards: int = 2
) -> Path:
    """Config, index, shards and a tokenizer; tensors are dealt to the shards in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    dealt: list[Tensors] = [tensors[i::shards] for i in range(shards)]
    weight_map = {}
    for number, shard in enumerate(dealt):
        name = f"model-{number:05d}-of-{shards - 1:05d}.safetensors"
        write_file(folder / name, shard)
        weight_map.update({spec.name: name for spec, _ in shard})
    total = sum(spec.nbytes for spec, _ in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1]}))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n")
    (folder / "LICENSE").write_text("Apache-2.0\n")
    write_tokenizer(folder, config["vocab_size"])
    return folder


def write_gpt_oss(
    folder: Path,
    change: Callable[[dict[str, np.ndarray]], None] | None = None,
    *,
    config: dict[str, Any] = CONFIG,
    packed: bool = True,
) -> Path:
    """A tiny random gpt-oss; `change` may edit its values by name before they are written."""
    if not packed:
        config = {k: v for k, v in config.items() if k != "quantization_config"}
    tensors = gpt_oss_tensors(config, packed)
    if change:
        change({spec.name: values for spec, values in tensors})
    return write_checkpoint(folder, config, tensors)


def write_headers_only(
    folder: Path, config: dict[str, Any], specs: Iterable[TensorSpec], weight_map: dict[str, str]
) -> Path:
    """A checkpoint of any size that takes no disk: true headers, holes for values."""
    folder.mkdir(parents=True)
    shards: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        shards.setdefault(weight_map[spec.name], []).append(spec)
    for name, held in shards.items():
        header = header_bytes(held, "pt")
        with open(folder / name, "wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(spec.nbytes for spec in held))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "<eos>": 1, "The": 2}
    words.update({f"w{i}": i for i in range(3, vocabulary)})
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
