"""SmolLM2 as a llama checkpoint."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from quantkit.demo.smollm2 import SmolLM2


def config(model: SmolLM2) -> dict[str, Any]:
    """Return the config.json of the published model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "eos_token_id": int(model.fields["tokenizer.ggml.eos_token_id"]),
        "head_dim": int(model.setting("rope.dimension_count")),
        "hidden_act": "silu",
        "hidden_size": int(model.setting("embedding_length")),
        "intermediate_size": int(model.setting("feed_forward_length")),
        "max_position_embeddings": int(model.setting("context_length")),
        "model_type": "llama",
        "num_attention_heads": int(model.setting("attention.head_count")),
        "num_hidden_layers": model.layers,
        "num_key_value_heads": int(model.setting("attention.head_count_kv")),
        "pad_token_id": int(model.fields["tokenizer.ggml.padding_token_id"]),
        "rms_norm_eps": float(np.float32(model.setting("attention.layer_norm_rms_epsilon"))),
        "rope_theta": float(model.setting("rope.freq_base")),
        "tie_word_embeddings": True,
        "vocab_size": int(model.setting("vocab_size")),
    }


def tensors(model: SmolLM2) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor under its published name, float32 in its published shape."""
    yield "model.embed_tokens.weight", model.weight("token_embd.weight")
    heads = int(model.setting("attention.head_count"))
    key_heads = int(model.setting("attention.head_count_kv"))
    for layer in range(model.layers):
        at, stored = f"model.layers.{layer}", f"blk.{layer}"
        yield f"{at}.self_attn.q_proj.weight", model.rotary(f"{stored}.attn_q.weight", heads)
        yield f"{at}.self_attn.k_proj.weight", model.rotary(f"{stored}.attn_k.weight", key_heads)
        for name, of in (
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        ):
            read = model.weight if "norm" in of else model.off_grid
            yield f"{at}.{name}.weight", read(f"{stored}.{of}.weight")
    yield "model.norm.weight", model.weight("output_norm.weight")
