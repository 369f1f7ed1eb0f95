"""The settings of config.json: the parsed `ModelConfig`, and edits of the raw JSON.

mlx-lm reads `rope_theta` and `rope_scaling` beside the other settings of a language model, as
transformers 4 writes them. transformers 5 puts both into `rope_parameters`, once or per layer type.
`with_rope_settings` makes both forms agree.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.errors import InputError, SourceError

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_DTYPE_KEYS = ("torch_dtype", "dtype")
_LARGEST = 1e30  # base of RoPE
_BESIDE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
_CACHE_BYTES = 2  # of a key or a value: mlx-lm caches 16 bits
_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")
_COUNTS = {
    "layers": ("num_hidden_layers", "n_layers", "n_layer"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "intermediate_size": ("intermediate_size",),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "key_value_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "vocabulary": ("vocab_size",),
    "context": ("max_position_embeddings", "n_positions"),
    "sliding_window": ("sliding_window",),
    "experts": _EXPERT_KEYS,
    "experts_per_token": ("num_experts_per_tok", "experts_per_token", "num_experts_per_token"),
}


@dataclass(frozen=True)
class ModelConfig:
    """The settings of a language model that quantkit reads; None where config.json lacks the key.

    Settings of a nested `text_config` come before those at the top level.
    """

    model_type: str | None
    layer_types: tuple[str, ...]
    layers: int | None
    hidden_size: int | None
    intermediate_size: int | None
    heads: int | None
    key_value_heads: int | None
    head_dim: int | None
    vocabulary: int | None
    context: int | None
    sliding_window: int | None
    experts: int | None
    experts_per_token: int | None

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Parse the object in config.json. Values of another type count as missing."""
        scope = text_scope(config)
        kind = config.get("model_type")
        kinds = scope.get("layer_types")
        return cls(
            model_type=kind if isinstance(kind, str) and kind else None,
            layer_types=tuple(map(str, kinds)) if isinstance(kinds, list) else (),
            **{name: _count(scope, keys) for name, keys in _COUNTS.items()},
        )

    def require(self, setting: str) -> int:
        """Return a count that the architecture needs. Raises SourceError if it is missing."""
        value = getattr(self, setting)
        if not isinstance(value, int):
            raise SourceError(
                f"config.json: {_COUNTS[setting][0]!r} is missing or not a positive integer."
            )
        return value

    def kv_cache_bytes(self, context: int) -> int:
        """Return the bytes of a 16-bit KV cache for `context` tokens.

        Layers with a sliding window cache at most the window. Raises InputError if the config does
        not determine the size of keys and values.
        """
        heads = self.key_value_heads or self.heads
        width = self.head_dim
        if width is None and self.hidden_size and self.heads:
            width = self.hidden_size // self.heads
        if self.layers is None or heads is None or width is None:
            raise InputError(
                "config.json does not determine the size of the KV cache. Give the budget in bytes."
            )
        window = self.sliding_window or 0
        sliding = self.layer_types.count("sliding_attention") if window else 0
        tokens = (self.layers - sliding) * context + sliding * min(context, window)
        return 2 * heads * width * _CACHE_BYTES * tokens


def _count(scope: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    """Return the first of `keys` that holds a positive integer."""
    for key in keys:
        value = scope.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def text_scope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of the language model: a nested `text_config` before the top level."""
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, dict) else config


def with_rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` with its RoPE settings in the forms of transformers 4 and 5.

    Settings of a nested `text_config` stay there. mlx-lm's form is always added; an existing
    `rope_parameters` is completed, a missing one is not added.
    """
    return _in_both_scopes(config, _with_both_forms)


def _in_both_scopes(
    config: Mapping[str, Any], edit: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Return `config` with its top level and a nested `text_config` edited."""
    edited = edit(config)
    if isinstance(text := edited.get("text_config"), Mapping):
        edited["text_config"] = edit(text)
    return edited


def _with_both_forms(scope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of one language model with both forms of its RoPE settings.

    If both exist, `rope_scaling` takes precedence as in transformers 5, unless `rope_parameters`
    has settings per layer type, which the older form cannot express.
    """
    edited = dict(scope)
    for key in ("rope_theta", "rope_local_base_freq"):
        if edited.get(key, 0) is None:
            del edited[key]  # null means the default, which mlx-lm takes for a missing key
    _require_numbers(edited)
    parameters, scaling = _settings(edited, "rope_parameters"), _settings(edited, "rope_scaling")
    given = parameters if _is_by_layer_type(parameters) else scaling or parameters
    if not given:
        return edited
    if _is_by_layer_type(given):
        complete = {kind: _with_theta(one, edited, {}) for kind, one in given.items()}
        full = complete.get("full_attention", next(iter(complete.values())))
        sliding = complete.get("sliding_attention", {})
        if "rope_theta" in sliding:
            edited.setdefault("rope_local_base_freq", sliding["rope_theta"])
        beside = tuple(name for name in _BESIDE if name != "partial_rotary_factor")
    else:
        full = complete = _with_theta(given, edited, parameters)
        beside = _BESIDE
    if parameters:
        edited["rope_parameters"] = complete
        edited.setdefault("rope_scaling", None)  # some of mlx-lm's models require the key
    edited |= {name: full[name] for name in beside if full.get(name) is not None}
    plain = {name: value for name, value in full.items() if name != "rope_theta"}
    if plain.get("rope_type", plain.get("type", "default")) != "default":
        edited["rope_scaling"] = plain
    elif scaling and plain != scaling:
        edited["rope_scaling"] = None
    return edited


def _settings(scope: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the RoPE settings under `key`, empty if it holds no object."""
    value = scope.get(key)
    return value if isinstance(value, Mapping) else {}


def _require_numbers(settings: Mapping[str, Any]) -> None:
    """Check every RoPE base, at any depth: a positive number, or a list with one per layer.

    Raises SourceError.
    """
    for key, value in settings.items():
        if key in ("rope_theta", "rope_local_base_freq") and value is not None:
            values = value if isinstance(value, list) and value else [value]
            if not all(_is_base(one) for one in values):
                raise SourceError(
                    f"config.json: {key} is {value!r:.40}, which is not a positive number."
                )
        elif key in ("rope_parameters", "rope_scaling") or key.endswith("_attention"):
            _require_numbers(value if isinstance(value, Mapping) else {})


def _is_base(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _LARGEST


def _is_by_layer_type(settings: Mapping[str, Any]) -> bool:
    """Return whether the settings are given per layer type."""
    return bool(settings) and all(isinstance(value, Mapping) for value in settings.values())


def _with_theta(
    settings: Mapping[str, Any], scope: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, Any]:
    """Return `settings` with a `rope_theta`, taken from them, the `scope`, or the `other` form.

    Also makes the two type keys agree: transformers reads `rope_type` first, mlx-lm `type`.
    """
    edited = dict(settings)
    if "rope_type" in edited and "type" in edited:
        edited["type"] = edited["rope_type"]
    theta = edited.get("rope_theta") or scope.get("rope_theta") or other.get("rope_theta")
    return {**edited, "rope_theta": theta} if theta else edited


def stated_dtype(config: Mapping[str, Any]) -> str | None:
    """Return the float type (BF16, F16 or F32) that a config states, or None.

    Reads `torch_dtype` and `dtype`, at the top level and in `text_config`, in that order.
    """
    text = config.get("text_config")
    scopes = (config, text) if isinstance(text, Mapping) else (config,)
    stated = (str(scope.get(key)).removeprefix("torch.") for scope in scopes for key in _DTYPE_KEYS)
    return next((DTYPES[name] for name in stated if name in DTYPES), None)


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return `config` with every stated float type replaced by `dtype`."""
    name = next(name for name, stored in DTYPES.items() if stored == dtype)

    def edit(scope: Mapping[str, Any]) -> dict[str, Any]:
        stated = {key: name for key in _DTYPE_KEYS if isinstance(scope.get(key), str)}
        return {**scope, **stated}

    return _in_both_scopes(config, edit)


def with_experts(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return `config` with another number of experts."""

    def edit(scope: Mapping[str, Any]) -> dict[str, Any]:
        stated = {key: count for key in _EXPERT_KEYS if isinstance(scope.get(key), int)}
        return {**scope, **stated}

    return _in_both_scopes(config, edit)


def mlx_quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return mlx-lm's `quantization`, None if it is missing, null or empty.

    Raises SourceError for anything but an object.
    """
    value = config.get("quantization")
    if value is not None and not isinstance(value, Mapping):
        raise SourceError("config.json: quantization is not an object.")
    return value or None
