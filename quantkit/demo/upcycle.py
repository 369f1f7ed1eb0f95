"""A dense SwiGLU model turned into a gpt-oss mixture of experts that computes the same function.

gpt-oss's experts compute swiglu(g, u) = g' sigmoid(1.702 g') (u' + 1) with g' = min(g, 7) and
u' = clip(u, -7, 7). With g = gate / 1.702, u = S up - 1 (the -1 in the bias) and
down = 1.702 / S down, that is silu(gate) up as long as nothing clips.

The hidden units are cut into 4 shards; expert e holds shard e mod 4, its output times 4 to undo
the routing weight of 1/4. Experts 4 to 7 hold the same with a little noise. The router's rows are
four small random ones and their negatives: of the two experts of a shard just one has a positive
logit, so the top 4 hold each shard once, at nearly equal weights.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from quantkit.demo.smollm2 import SmolLM2
from quantkit.formats import mxfp4

_SHARDS = 4
_EXPERTS = 2 * _SHARDS
_SCALE = 0.15  # S: keeps S up - 1 inside the clip
_NOISE = 0.02
_ROUTER = 1e-4
_SINK = -30.0  # as good as no attention sink


def config(model: SmolLM2) -> dict[str, Any]:
    """Return the config.json of the upcycled model."""
    context = int(model.setting("context_length"))
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "eos_token_id": int(model.fields["tokenizer.ggml.eos_token_id"]),
        "experts_per_token": _SHARDS,
        "head_dim": int(model.setting("rope.dimension_count")),
        "hidden_act": "silu",
        "hidden_size": int(model.setting("embedding_length")),
        "intermediate_size": int(model.setting("feed_forward_length")) // _SHARDS,
        "layer_types": ["sliding_attention", "full_attention"] * (model.layers // 2),
        "max_position_embeddings": context,
        "model_type": "gpt_oss",
        "num_attention_heads": int(model.setting("attention.head_count")),
        "num_experts_per_tok": _SHARDS,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": int(model.setting("attention.head_count_kv")),
        "num_local_experts": _EXPERTS,
        "pad_token_id": int(model.fields["tokenizer.ggml.padding_token_id"]),
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": float(np.float32(model.setting("attention.layer_norm_rms_epsilon"))),
        "rope_scaling": {"rope_type": "default"},  # None would mean YaRN to transformers
        "rope_theta": float(model.setting("rope.freq_base")),
        "sliding_window": context,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": int(model.setting("vocab_size")),
    }


Tensor = tuple[str, str, np.ndarray]
"""(published name, safetensors dtype, values): float32 for BF16, else as stored."""


def tensors(model: SmolLM2, seed: int = 0) -> Iterator[Tensor]:
    """Yield every tensor of the upcycled model in gpt-oss's published layout. Deterministic for
    a seed.
    """
    rng = np.random.default_rng(seed)
    embedding = model.weight("token_embd.weight")
    yield "model.embed_tokens.weight", "BF16", embedding
    for layer in range(model.layers):
        at = f"model.layers.{layer}"
        yield from _attention(model, layer, f"{at}.self_attn")
        yield f"{at}.input_layernorm.weight", "BF16", model.weight(f"blk.{layer}.attn_norm.weight")
        norm = model.weight(f"blk.{layer}.ffn_norm.weight")
        yield f"{at}.post_attention_layernorm.weight", "BF16", norm
        yield from _experts(model, layer, f"{at}.mlp", rng)
    yield "model.norm.weight", "BF16", model.weight("output_norm.weight")
    yield "lm_head.weight", "BF16", embedding


def _attention(model: SmolLM2, layer: int, at: str) -> Iterator[Tensor]:
    heads = int(model.setting("attention.head_count"))
    key_heads = int(model.setting("attention.head_count_kv"))
    projections = {
        "q_proj": model.rotary(f"blk.{layer}.attn_q.weight", heads),
        "k_proj": model.rotary(f"blk.{layer}.attn_k.weight", key_heads),
        "v_proj": model.off_grid(f"blk.{layer}.attn_v.weight"),
        "o_proj": model.off_grid(f"blk.{layer}.attn_output.weight"),
    }
    for name, weight in projections.items():
        yield f"{at}.{name}.weight", "BF16", weight
        yield f"{at}.{name}.bias", "BF16", np.zeros(len(weight), np.float32)
    yield f"{at}.sinks", "BF16", np.full(heads, _SINK, np.float32)


def _experts(model: SmolLM2, layer: int, at: str, rng: np.random.Generator) -> Iterator[Tensor]:
    gate = model.weight(f"blk.{layer}.ffn_gate.weight") / 1.702
    up = model.weight(f"blk.{layer}.ffn_up.weight") * _SCALE
    down = model.weight(f"blk.{layer}.ffn_down.weight") * (1.702 / _SCALE * _SHARDS)
    rows = _ROUTER * rng.standard_normal((_SHARDS, gate.shape[1])).astype(np.float32)
    yield f"{at}.router.weight", "BF16", np.concatenate([rows, -rows])
    yield f"{at}.router.bias", "BF16", np.zeros(_EXPERTS, np.float32)

    width = len(gate) // _SHARDS
    gate_up = np.empty((_EXPERTS, 2 * width, gate.shape[1]), np.float32)
    gate_up[:_SHARDS, 0::2] = gate.reshape(_SHARDS, width, -1)
    gate_up[:_SHARDS, 1::2] = up.reshape(_SHARDS, width, -1)
    down_cut = np.empty((_EXPERTS, len(down), width), np.float32)
    down_cut[:_SHARDS] = down.reshape(len(down), _SHARDS, width).swapaxes(0, 1)
    for stack in (gate_up, down_cut):
        noise = rng.standard_normal(stack[:_SHARDS].shape, np.float32)
        stack[_SHARDS:] = stack[:_SHARDS] * (1 + _NOISE * noise)
    gate_up_bias = np.zeros(gate_up.shape[:2], np.float32)
    gate_up_bias[:, 1::2] = -1
    yield from _packed(f"{at}.experts.gate_up_proj", gate_up, gate_up_bias)
    yield from _packed(f"{at}.experts.down_proj", down_cut, np.zeros(down_cut.shape[:2], "f4"))


def _packed(name: str, stack: np.ndarray, bias: np.ndarray) -> Iterator[Tensor]:
    experts, n_out, n_in = stack.shape
    packed, scales = mxfp4.encode(stack.reshape(-1, n_in))
    shape = (experts, n_out, n_in // 32)
    yield f"{name}_blocks", "U8", packed.view(np.uint8).reshape(*shape, 16)
    yield f"{name}_scales", "U8", scales.reshape(shape)
    yield f"{name}_bias", "BF16", bias
