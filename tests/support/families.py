"""Tiny checkpoints of families that mlx-lm reads through its own model classes."""

import numpy as np

from quantkit.backend import mx
from quantkit.formats.tiers import TensorSpec
from tests.support import tiny

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
    "rope_theta": 10000,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}
MOE = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
GEMMA = {  # its class learns from the tensors that its head is the embedding
    **LLAMA,
    "model_type": "gemma3_text",
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 16,
    "sliding_window_pattern": 2,
}
# Models of which the layers, run once in turn, and the head are not the whole.
_WINDOWS = {"head_dim": 32, "sliding_window": 16, "max_position_embeddings": 512}
GEMMA4 = {  # a layer passes its keys and values on
    **{key: value for key, value in LLAMA.items() if key != "rope_theta"},
    **_WINDOWS,
    "model_type": "gemma4_text",
    "global_head_dim": 32,
    "sliding_window_pattern": 2,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "layer_types": ["sliding_attention", "full_attention"],
}
GEMMA3N = {  # a layer passes a stack of streams on
    "model_type": "gemma3n",
    "eos_token_id": 1,
    "vocab_size": 64,
    "text_config": {
        **LLAMA,
        **_WINDOWS,
        "model_type": "gemma3n_text",
        "intermediate_size": [128, 128],
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 32,
        "rope_local_base_freq": 10000.0,
        "final_logit_softcapping": 30.0,
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0, 0.0],
        "altup_num_inputs": 4,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 16,
    },
}
NANBEIGE = {  # all layers run twice
    **LLAMA,
    "model_type": "nanbeige",
    "num_loops": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}

FAMILIES = {  # mixtures of experts
    "qwen3-moe": MOE,
    "olmoe": {
        **LLAMA,
        "model_type": "olmoe",
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
        "tie_word_embeddings": False,
    },
    "mixtral": {
        **LLAMA,
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    "glm4-moe": {
        **LLAMA,
        "model_type": "glm4_moe",
        "head_dim": 32,
        "max_position_embeddings": 512,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1,
        "use_qk_norm": False,
        "attention_bias": False,
        "partial_rotary_factor": 0.5,
        "rope_scaling": None,
        "tie_word_embeddings": False,
    },
}


def specs(config, dtype="BF16"):
    """The tensors of a Hugging Face checkpoint of `config`: llama, with qwen3's experts."""
    hidden, inter = config["hidden_size"], config["intermediate_size"]
    keys = 32 * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
        for name, rows in {"q": 64, "k": keys, "v": keys, "o": hidden}.items():
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (rows, hidden)
        if config["model_type"] == "qwen3_moe":
            shapes |= {f"{at}.self_attn.{n}_norm.weight": (32,) for n in ("q", "k")}
        stacks = [(f"{at}.mlp", inter)]
        if layer not in config.get("mlp_only_layers", range(99)):
            shapes[f"{at}.mlp.gate.weight"] = (config["num_experts"], hidden)
            width = config["moe_intermediate_size"]
            stacks = [(f"{at}.mlp.experts.{e}", width) for e in range(config["num_experts"])]
        for stack, width in stacks:
            shapes |= {f"{stack}.{n}_proj.weight": (width, hidden) for n in ("gate", "up")}
            shapes[f"{stack}.down_proj.weight"] = (hidden, width)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return [TensorSpec(name, dtype, shape) for name, shape in shapes.items()]


def write(folder, config, dtype="BF16"):
    rng = np.random.default_rng(0)
    tensors = [(spec, tiny.random_values(spec, rng)) for spec in specs(config, dtype)]
    return tiny.write_checkpoint(folder, config, tensors)


def tensors(repo):
    return {k: v for path in repo.glob("model*.safetensors") for k, v in mx.load(str(path)).items()}


def write_from_model(folder, config, dtype_of=lambda name: "BF16", extra=()):
    """A checkpoint of any family, under mlx-lm's own names, with `extra` tensors beside."""
    from mlx.utils import tree_flatten

    from quantkit.checkpoint.generic import build_model

    rng = np.random.default_rng(0)
    shapes = {n: v.shape for n, v in tree_flatten(build_model(config).parameters())}
    if config.get("tie_word_embeddings"):
        shapes.pop("lm_head.weight", None)
    shapes |= dict.fromkeys(extra, (4, 4))
    stored = [TensorSpec(name, dtype_of(name), shape) for name, shape in shapes.items()]
    return tiny.write_checkpoint(
        folder, config, [(spec, tiny.random_values(spec, rng)) for spec in stored]
    )
