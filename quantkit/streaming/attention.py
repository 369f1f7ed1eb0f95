"""Check that stock mlx-lm builds the attention that a model's own config specifies.

mlx-lm silently drops RoPE settings in a form that it does not read, and a comparison of two models
from the same config cannot reveal it. So this module reads the config a second time, independently
of `model_config`, and compares it to the computations of mlx-lm's modules.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from quantkit.backend import mx
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.generic import build_model
from quantkit.errors import SourceError, first_line

SLIDING, FULL = "sliding_attention", "full_attention"
_OFFSETS = (0, 1000, 30000)  # positions at which rotations are compared
_TOLERANCE = 1e-3
_LOCAL = ("rope_local_base_freq", "rope_local_theta", "swa_rope_theta")  # of sliding layers
_KEYS = (
    *("rope_theta", "rope_scaling", "rope_parameters", *_LOCAL),
    *("layer_types", "sliding_window", "max_position_embeddings", "num_hidden_layers"),
    "original_max_position_embeddings",
)


@dataclass(frozen=True)
class Rope:
    """The RoPE settings of one layer: the base, None for the family's default, and the scaling."""

    theta: float | None
    scaling: Mapping[str, Any]

    def __str__(self) -> str:
        base = "" if self.theta is None else f"rope_theta {self.theta:g}, "
        return f"{base}{self.scaling.get('rope_type', 'default')} scaling"


def attention_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the RoPE and sliding-window settings of a config, verbatim, with those in
    `text_config`.
    """
    settings = {key: config[key] for key in _KEYS if key in config}
    if isinstance(text := config.get("text_config"), Mapping):
        settings["text_config"] = attention_settings(text)
    return settings


def require_same_attention(checkpoint: Checkpoint) -> None:
    """Check that mlx-lm builds the attention that the checkpoint's config specifies.

    Raises SourceError: measurements and repos would be wrong in a way that no file shows.
    """
    wanted = attention_settings(checkpoint.stated_config)
    if differences := attention_differences(wanted, build_model(checkpoint.config)):
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        raise SourceError(
            f"config.json: {differences[0]}{more}. mlx-lm {version('mlx-lm')} does not support "
            "these settings of RoPE or attention for this architecture."
        )


def attention_differences(wanted: Mapping[str, Any], model: Any) -> list[str]:
    """Return the differences between a config and `model`, mlx-lm's, a line each.

    `wanted` are the `attention_settings` of the source's config. Layers without mlx-lm's common
    RoPE modules, or without settings in the config, are left out.
    """
    settings, layers, kinds = _by_layer(wanted, model)
    differences = [
        *_rope_differences(settings, layers, kinds),
        *_cache_differences(settings, model, kinds),
    ]
    return list(dict.fromkeys(differences))


def compared_layers(wanted: Mapping[str, Any], model: Any) -> tuple[int, int]:
    """Return how many layers `attention_differences` can compare, and how many there are."""
    settings, layers, kinds = _by_layer(wanted, model)
    compared = [
        bool(_ropes(settings, kind, number)) and any(True for _ in _rope_modules(layer))
        for number, (layer, kind) in enumerate(zip(layers, kinds, strict=True))
    ]
    return sum(compared), len(layers)


def _by_layer(
    wanted: Mapping[str, Any], model: Any
) -> tuple[dict[str, Any], list[Any], list[str | None]]:
    """Return the settings of the language model, its layers, and their kinds, None if unknown."""
    settings = {**wanted, **(wanted.get("text_config") or {})}
    layers, kinds = list(model.layers), settings.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != len(layers):
        kinds = [None] * len(layers)
    return settings, layers, kinds


def _rope_differences(
    settings: Mapping[str, Any], layers: Sequence[Any], kinds: Sequence[str | None]
) -> Iterator[str]:
    longest = settings.get("max_position_embeddings")
    others: list[tuple[int, str | None, Rope, Any]] = []
    is_realised = False
    for number, (layer, kind) in enumerate(zip(layers, kinds, strict=True)):
        accepted = _ropes(settings, kind, number)
        for module in _rope_modules(layer) if accepted else ():
            try:
                if any(_same_rotation(module, rope, longest) for rope in accepted):
                    is_realised = True
                else:
                    others.append((number, kind, accepted[0], module))
            except (KeyError, TypeError, ValueError) as exc:
                fault = f"which mlx-lm cannot build ({first_line(exc)})"
                yield f"layer {number}: the config specifies {accepted[0]}, {fault}"
    for number, kind, rope, module in others:
        # Some families (OLMo 3) scale only full attention, by the same settings.
        may_be_plain = kind == SLIDING and is_realised and not _stated(settings)[1]
        if may_be_plain and _same_rotation(module, Rope(rope.theta, {}), longest):
            continue
        yield f"layer {number}: the config specifies {rope}; mlx-lm builds another"


def _stated(settings: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return the RoPE settings as transformers 5 reads them, and whether they are per layer type.

    `rope_scaling` replaces `rope_parameters` whole, unless these are per layer type.
    """
    forms = [settings.get(key) for key in ("rope_parameters", "rope_scaling")]
    parameters, scaling = (dict(form) if isinstance(form, Mapping) else {} for form in forms)
    for stated in (parameters, scaling):
        if stated and all(isinstance(value, Mapping) for value in stated.values()):
            return stated, True
    if scaling and "rope_theta" in parameters and settings.get("rope_theta") is None:
        scaling.setdefault("rope_theta", parameters["rope_theta"])
    return scaling or parameters, False


def _ropes(settings: Mapping[str, Any], kind: str | None, number: int) -> list[Rope]:
    """Return the RoPE settings that layer `number` of a `kind` may have.

    One, or one per kind if its kind is unknown; empty if the config does not say.
    """
    stated, by_kind = _stated(settings)
    local = next((settings[key] for key in _LOCAL if settings.get(key)), None)
    if kind is None:
        names = list(stated) if by_kind else [FULL, *([SLIDING] if local else [])]
        return [rope for name in names for rope in _ropes(settings, name, number)]
    if by_kind:
        stated = stated.get(kind, {})
    elif kind == SLIDING and local:
        return [Rope(float(local), {})]
    theta = stated.get("rope_theta") or settings.get("rope_theta")
    if isinstance(theta, list):
        theta = theta[number] if number < len(theta) else None
    scaling = {key: value for key, value in stated.items() if key != "rope_theta"}
    if "rope_type" in scaling or "type" in scaling:  # mlx-lm reads `type` first
        name = scaling.pop("type", None)
        name = scaling.get("rope_type", name)
        scaling["rope_type"] = "longrope" if name == "su" else name
    kind_of_scaling = scaling.get("rope_type", "default")
    trained = "original_max_position_embeddings"
    if kind_of_scaling == "longrope" and trained in settings:  # the place of transformers 4
        scaling.setdefault(trained, settings[trained])
    if kind_of_scaling == "dynamic" or (by_kind and not stated):
        return []
    if theta is None:  # the family's default base, which scaling can be detected without
        return [] if kind_of_scaling == "default" else [Rope(None, scaling)]
    return [Rope(float(theta), scaling)]


def _rope_modules(layer: Any) -> Iterator[Any]:
    """Yield the RoPE modules of a layer that mlx-lm's `initialize_rope` may have built."""
    from mlx.nn import RoPE
    from mlx_lm.models import rope_utils

    for _, module in layer.named_modules():
        if type(module) is RoPE or type(module).__module__ == rope_utils.__name__:
            yield module


def _same_rotation(module: Any, rope: Rope, longest: int | None) -> bool:
    """Return whether `module` rotates like a module made from `rope`, at several positions."""
    from mlx_lm.models.rope_utils import SuScaledRoPE, initialize_rope

    dims = getattr(module, "dims", None) or module.dim
    if rope.theta is None:
        return not _is_plain(module)
    expected = initialize_rope(
        dims, rope.theta, getattr(module, "traditional", False), dict(rope.scaling) or None, longest
    )
    if isinstance(expected, SuScaledRoPE) and type(module) is SuScaledRoPE:
        # Each family reads the factor on long inputs by itself.
        return bool(mx.allclose(module._freqs, expected._freqs).item())
    x = 1 + mx.arange(2 * dims).reshape(1, 1, 2, dims) / dims
    return all(
        mx.allclose(module(x, offset=offset), expected(x, offset=offset), atol=_TOLERANCE).item()
        for offset in _OFFSETS
    )


def _is_plain(module: Any) -> bool:
    """Return whether a RoPE module has no scaling."""
    from mlx.nn import RoPE

    return type(module) is RoPE and getattr(module, "scale", 1.0) == 1.0


def _cache_differences(
    settings: Mapping[str, Any], model: Any, kinds: Sequence[str | None]
) -> Iterator[str]:
    """Yield layers whose KV cache has another window than the config.

    Models that cache everything in all layers mask the window instead, and are left out.
    """
    from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

    caches = make_prompt_cache(model)
    rotating = [isinstance(cache, RotatingKVCache) for cache in caches]
    window = settings.get("sliding_window")
    if not any(rotating) or len(caches) != len(kinds):
        return
    for number, (cache, kind) in enumerate(zip(caches, kinds, strict=True)):
        if kind not in (SLIDING, FULL):
            continue
        if rotating[number] != (kind == SLIDING):
            yield f"layer {number}: the config says {kind}; mlx-lm builds the other kind"
        elif rotating[number] and (
            not isinstance(window, int) or window < 1 or cache.max_size != window
        ):
            if not isinstance(window, int) or window < 1:
                yield f"layer {number}: sliding_window is {window!r}, not a positive whole number"
            else:
                yield f"layer {number}: the config's window is {window}; mlx-lm's {cache.max_size}"
