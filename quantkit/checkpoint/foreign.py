"""Files and tensor names of other tools, and advice on them."""

import re
from collections.abc import Callable, Iterable

_FILES = (
    (
        r"adapter_(config\.json|model\.safetensors|model\.bin)|adapters\.safetensors",
        "a LoRA adapter without its base model. Merge it first, for example with "
        "mlx_lm.fuse --model BASE --adapter-path ADAPTER",
    ),
    (
        r".*\.gguf",
        "a GGUF model, llama.cpp's format. Start from the safetensors that it was made from",
    ),
    (
        r"pytorch_model.*\.bin|model.*\.bin|.*\.pth?",
        "PyTorch weights. Convert them to safetensors: load the model with transformers and "
        "call save_pretrained",
    ),
    (r".*\.npz", "weights in NumPy's format. Convert the original again with mlx_lm.convert"),
    (
        r".*\.(h5|msgpack|onnx|tflite)",
        "weights of another framework. Start from the safetensors of the same model",
    ),
    (
        r"(?!model.*\.safetensors$).*\.safetensors",
        "safetensors of other names than model*.safetensors, which mlx-lm does not load. Rename "
        "them, or add a model.safetensors.index.json that names them",
    ),
)

_TENSORS = (
    (
        r"\.lora_[AB]\b|\.lora_(embedding|magnitude)|^base_model\.model\.",
        "a LoRA adapter; merge it into its base model: mlx_lm.fuse, or PEFT's merge_and_unload",
    ),
    (
        r"\.base_layer\.",
        "a model with LoRA layers that were not merged; call PEFT's merge_and_unload and save it",
    ),
    (
        r"\.router\.linear\.|\.experts\.(gate_up|down)_projs\.\d+\.",
        "unsloth's training layout; save it merged: model.save_pretrained_merged(FOLDER, "
        'tokenizer, save_method="merged_16bit")',
    ),
    (
        r"^block\.\d+\.|^(un)?embedding\.weight$",
        "OpenAI's original layout; use the safetensors at the top level of the Hub repo",
    ),
    (r"^blk\.\d+\.|^token_embd\.", "a GGUF model's names; start from the original safetensors"),
    (
        r"\.(weight_packed|weight_scale(_inv)?|weight_global_scale|input_scale)$",
        "compressed-tensors or FP8: quantized already; start from the BF16 checkpoint",
    ),
    (
        r"\.(qweight|qzeros|g_idx)$",
        "GPTQ or AWQ: quantized already; start from the BF16 checkpoint",
    ),
    (
        r"\.(absmax|quant_map|nested_absmax|SCB)$|\.quant_state\.",
        "bitsandbytes: quantized already; start from the checkpoint in 16 bits",
    ),
    (
        r"^(_orig_mod|module)\.",
        "a wrapped PyTorch model; save the module inside of the wrapper (model.module, or "
        "model._orig_mod)",
    ),
    (
        r"^(model\.)?(language_model|text_model|vision_tower|visual)\.",
        "a part of a vision-language model; give config.json the model_type of the whole",
    ),
    (
        r"\.experts\.\d+\.",
        "one tensor per expert; convert it with the tool that wrote it to transformers' layout",
    ),
)


def recognize_files(names: Iterable[str]) -> str | None:
    """Identify the files of a folder without loadable weights, and advise on them."""
    return _recognize(_FILES, names, re.fullmatch)


def recognize_tensors(names: Iterable[str]) -> str | None:
    """Identify the tool behind tensor names, and advise on its checkpoint."""
    return _recognize(_TENSORS, names, re.search)


def _recognize(
    table: Iterable[tuple[str, str]], names: Iterable[str], match: Callable[[str, str], object]
) -> str | None:
    names = sorted(names)
    for pattern, description in table:
        example = next((name for name in names if match(pattern, name)), None)
        if example is not None:
            return f"found {example}; this looks like {description}."
    return None
