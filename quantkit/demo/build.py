"""Build the demo checkpoints, once, into the cache."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.backend import mx
from quantkit.checkpoint.checkpoint import INDEX_FILE, SINGLE_FILE
from quantkit.demo import llama, upcycle
from quantkit.demo.smollm2 import SmolLM2, gguf_path
from quantkit.demo.tokenizer import write_tokenizer
from quantkit.errors import OutputError
from quantkit.formats.codec import to_numpy
from quantkit.formats.files import write_file
from quantkit.formats.tiers import TensorSpec
from quantkit.storage.json_files import dump_json
from quantkit.storage.paths import cache_folder

Stored = tuple[TensorSpec, np.ndarray]

_NAME = "smollm2-135m-gpt-oss-v2"  # any change of the checkpoint needs another name

_PLAIN_NAME = "smollm2-135m-llama-v2"

_CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct, upcycled by quantkit to the gpt-oss architecture (8 experts, top 4, MXFP4).
Its attention got noise as wide as the steps of the 4-bit file that it was read from, so that it
does not lie on a grid of few bits.
"""
_PLAIN_CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct in BF16, as quantkit reads it from a GGUF file of 4 bits, with noise as wide
as the file's steps, so that no weight lies on a grid of few bits.
"""


def demo_checkpoint(step: Callable[[int, int], None] | None = None) -> Path:
    """Return the demo model's folder, which is built on first use (about 15 s).

    `step` receives the finished layers and all layers. Raises SourceError if the package with the
    weights is not installed.
    """
    return _built(_NAME, lambda model, folder: build(model, folder, step))


def plain_checkpoint() -> Path:
    """Return the folder of SmolLM2-135M-Instruct itself, a dense llama in BF16, built on first
    use.
    """
    return _built(_PLAIN_NAME, build_plain)


def _built(name: str, write: Callable[[SmolLM2, Path], None]) -> Path:
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    building = folder.with_name(f"{name}.{os.getpid()}.partial")
    try:
        building.mkdir(parents=True)
    except OSError as exc:
        raise OutputError(
            f"{folder}: cannot be written ({exc.strerror}). Set QUANTKIT_CACHE to another folder."
        ) from exc
    try:
        write(SmolLM2.open(gguf_path()), building)
        try:
            building.replace(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def build_plain(model: SmolLM2, folder: Path) -> None:
    """Write `model` as a llama checkpoint in BF16. Deterministic."""
    stored = []
    for name, values in llama.tensors(model):
        carrier = to_numpy(mx.array(values).astype(mx.bfloat16))
        stored.append((TensorSpec(name, "BF16", values.shape), carrier))
    write_file(folder / SINGLE_FILE, stored)
    _write_rest(model, folder, llama.config(model), _PLAIN_CARD)


def build(model: SmolLM2, folder: Path, step: Callable[[int, int], None] | None = None) -> None:
    """Write `model` as a gpt-oss checkpoint in the published layout. Deterministic."""
    shards: tuple[list[Stored], list[Stored]] = ([], [])
    done = 0
    for name, dtype, values in upcycle.tensors(model):
        if name.endswith("input_layernorm.weight"):
            done += 1
            if step:
                step(done, model.layers)
        carrier = to_numpy(mx.array(values).astype(mx.bfloat16)) if dtype == "BF16" else values
        half = int(done > model.layers // 2)
        shards[half].append((TensorSpec(name, dtype, values.shape), carrier))
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"model-{number:05d}-of-{len(shards) - 1:05d}.safetensors"
        write_file(folder / file, shard)
        weight_map.update({spec.name: file for spec, _ in shard})
    total = sum(spec.nbytes for shard in shards for spec, _ in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(dump_json(index))
    _write_rest(model, folder, upcycle.config(model), _CARD)


def _write_rest(model: SmolLM2, folder: Path, settings: dict[str, Any], card: str) -> None:
    eos = {"eos_token_id": [settings["eos_token_id"]], "pad_token_id": settings["pad_token_id"]}
    (folder / "config.json").write_text(dump_json(settings))
    (folder / "generation_config.json").write_text(dump_json(eos))
    (folder / "README.md").write_text(card)
    write_tokenizer(model.fields, folder)
