"""A full-shape gpt-oss-20b of random values, in the published layout, for measuring."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from quantkit.checkpoint.gpt_oss import stored_tensors
from quantkit.formats.files import header_bytes
from quantkit.formats.tiers import TensorSpec

CONFIG_20B = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "eos_token_id": 200002,
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "quantization_config": {"quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
_SHARD_BYTES = 4_800_000_000
_CHUNK = 1 << 24


def write_checkpoint(folder: Path, config: dict[str, object], seed: int = 0) -> None:
    """Write config, index and shards; values are random, MXFP4 scales of a usual size."""
    folder.mkdir(parents=True)
    shards: list[list[TensorSpec]] = [[]]
    for spec in stored_tensors(config):
        if sum(s.nbytes for s in shards[-1]) + spec.nbytes > _SHARD_BYTES:
            shards.append([])
        shards[-1].append(spec)
    rng = np.random.default_rng(seed)
    weight_map = {}
    for number, specs in enumerate(shards):
        name = f"model-{number:05d}-of-{len(shards) - 1:05d}.safetensors"
        with open(folder / name, "wb") as file:
            file.write(header_bytes(specs, "pt"))
            for spec in specs:
                weight_map[spec.name] = name
                for block in _values(spec, rng):
                    file.write(block.data)
    total = sum(spec.nbytes for specs in shards for spec in specs)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _values(spec: TensorSpec, rng: np.random.Generator) -> Iterator[np.ndarray]:
    for start in range(0, spec.nbytes, _CHUNK):
        size = min(_CHUNK, spec.nbytes - start)
        if spec.dtype == "BF16":
            yield (0.02 * rng.standard_normal(size // 2, np.float32)).view(np.uint16)[1::2].copy()
        elif spec.name.endswith("_scales"):
            yield rng.integers(118, 123, size, np.uint8)
        else:
            yield rng.integers(0, 256, size, np.uint8)
