"""Settings of config.json that several versions of transformers write in several forms.

mlx-lm reads `rope_theta` and `rope_scaling` beside the other settings of a language model, as
transformers 4 writes them; transformers 5 puts both into `rope_parameters`, for every layer type
alike or one by one. `with_rope_settings` makes the two forms say the same.
"""

from collections.abc import Mapping
from typing import Any

from quantkit.errors import SourceError

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_DTYPE_KEYS = ("torch_dtype", "dtype")
_LARGEST = 1e30  # base of RoPE
_BESIDE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")


def with_rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` with its RoPE settings in the forms of transformers 4 and 5.

    Settings of a nested `text_config` stay there. A form that is absent is added only for mlx-lm's
    sake: `rope_parameters` is completed where it is there, never invented.
    """
    found = _with_both_forms(config)
    if isinstance(text := found.get("text_config"), Mapping):
        found["text_config"] = _with_both_forms(text)
    return found


def _with_both_forms(scope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of one language model with `rope_theta` and `rope_scaling`, and with
    `rope_theta` inside of `rope_parameters`. Where both forms are there, transformers 5 takes
    `rope_scaling` whole; settings for each layer type say more than it can."""
    found = dict(scope)
    for key in ("rope_theta", "rope_local_base_freq"):
        if found.get(key, 0) is None:
            del found[key]  # null means the default, which mlx-lm takes for a missing key
    _require_numbers(found)
    parameters, scaling = _settings(found, "rope_parameters"), _settings(found, "rope_scaling")
    given = parameters if _is_by_layer_type(parameters) else scaling or parameters
    if not given:
        return found
    if _is_by_layer_type(given):
        complete = {kind: _with_theta(one, found, {}) for kind, one in given.items()}
        own = complete.get("full_attention", next(iter(complete.values())))
        sliding = complete.get("sliding_attention", {})
        if "rope_theta" in sliding:
            found.setdefault("rope_local_base_freq", sliding["rope_theta"])
        beside = tuple(name for name in _BESIDE if name != "partial_rotary_factor")
    else:
        own = complete = _with_theta(given, found, parameters)
        beside = _BESIDE
    if parameters:
        found["rope_parameters"] = complete
        found.setdefault("rope_scaling", None)  # some of mlx-lm's models require the key
    found |= {name: own[name] for name in beside if own.get(name) is not None}
    plain = {name: value for name, value in own.items() if name != "rope_theta"}
    if plain.get("rope_type", plain.get("type", "default")) != "default":
        found["rope_scaling"] = plain
    elif scaling and plain != scaling:
        found["rope_scaling"] = None
    return found


def _settings(scope: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the RoPE settings under `key`; empty for null and for what is no object."""
    value = scope.get(key)
    return value if isinstance(value, Mapping) else {}


def _require_numbers(settings: Mapping[str, Any]) -> None:
    """Raises SourceError for a RoPE base that is no number, here or inside; some families have a
    list of them, one for each layer."""
    for key, value in settings.items():
        if key in ("rope_theta", "rope_local_base_freq") and value is not None:
            values = value if isinstance(value, list) and value else [value]
            if not all(_is_base(one) for one in values):
                raise SourceError(
                    f"config.json: {key} is {value!r:.40}, which is no positive number."
                )
        elif key in ("rope_parameters", "rope_scaling") or key.endswith("_attention"):
            _require_numbers(value if isinstance(value, Mapping) else {})


def _is_base(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _LARGEST


def _is_by_layer_type(settings: Mapping[str, Any]) -> bool:
    """Return whether there are settings for each layer type rather than for all layers."""
    return bool(settings) and all(isinstance(value, Mapping) for value in settings.values())


def _with_theta(
    settings: Mapping[str, Any], scope: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, Any]:
    """Return `settings` with a `rope_theta`: their own, else the one beside them, else that of the
    `other` form; and with one type: transformers reads `rope_type` first, mlx-lm `type`."""
    found = dict(settings)
    if "rope_type" in found and "type" in found:
        found["type"] = found["rope_type"]
    theta = found.get("rope_theta") or scope.get("rope_theta") or other.get("rope_theta")
    return {**found, "rope_theta": theta} if theta else found


def stated_dtype(config: Mapping[str, Any]) -> str | None:
    """Return the float type (BF16, F16 or F32) that a config states, None if it states none.

    Reads `torch_dtype` and `dtype`, at the top level and in `text_config`, in that order.
    """
    text = config.get("text_config")
    scopes = (config, text) if isinstance(text, Mapping) else (config,)
    stated = (str(scope.get(key)).removeprefix("torch.") for scope in scopes for key in _DTYPE_KEYS)
    return next((DTYPES[name] for name in stated if name in DTYPES), None)


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return `config` stating the float type `dtype` wherever it states another."""
    name = next(name for name, known in DTYPES.items() if known == dtype)
    found = dict(config)
    for key in _DTYPE_KEYS:
        if isinstance(found.get(key), str):
            found[key] = name
    if isinstance(text := found.get("text_config"), Mapping):
        found["text_config"] = with_dtype(text, dtype)
    return found


def mlx_quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return mlx-lm's `quantization`; None where that is missing, null or empty.

    Raises SourceError for anything but an object.
    """
    value = config.get("quantization")
    if value is not None and not isinstance(value, Mapping):
        raise SourceError("config.json: quantization is no object.")
    return value or None
