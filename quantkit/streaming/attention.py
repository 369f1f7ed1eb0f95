"""Whether stock mlx-lm builds the attention that a model's own config asks for.

A config in a form that mlx-lm does not read loses its RoPE scaling without a word, and no
comparison finds it when both sides are built from the same config. So the config is read here a
second time, independently of the reading that the repo was written by, and held against what the
modules of mlx-lm's model really compute.
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
_KEYS = (
    *("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq"),
    *("layer_types", "sliding_window", "max_position_embeddings", "num_hidden_layers"),
    "original_max_position_embeddings",
)


@dataclass(frozen=True)
class Rope:
    """RoPE settings of one layer: the base, and the scaling as `rope_scaling` states it."""

    theta: float
    scaling: Mapping[str, Any]

    def __str__(self) -> str:
        kind = self.scaling.get("rope_type") or self.scaling.get("type") or "default"
        return f"rope_theta {self.theta:g}, {kind} scaling"


def attention_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a config that decide on RoPE and on sliding windows, as they stand,
    with those of a nested `text_config`."""
    found = {key: config[key] for key in _KEYS if key in config}
    if isinstance(text := config.get("text_config"), Mapping):
        found["text_config"] = attention_settings(text)
    return found


def require_same_attention(checkpoint: Checkpoint) -> None:
    """Raise SourceError where stock mlx-lm builds another attention than the checkpoint's config
    asks for: what is measured or written of it would be wrong in a way that no file shows."""
    wanted = attention_settings(checkpoint.stated_config)
    if found := attention_differences(wanted, build_model(checkpoint.config)):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise SourceError(
            f"config.json: {found[0]}{more}. mlx-lm {version('mlx-lm')} does not support these "
            "settings of RoPE or attention for this architecture."
        )


def attention_differences(wanted: Mapping[str, Any], model: Any) -> list[str]:
    """Return what `model`, mlx-lm's, does otherwise than a config asks for, a line per difference.

    `wanted` are the `attention_settings` of the source's config. Layers whose rotations mlx-lm does
    not make with its common RoPE modules, or of which the config says nothing, are left out.
    """
    settings = {**wanted, **(wanted.get("text_config") or {})}
    layers = list(model.layers)
    kinds = settings.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != len(layers):
        kinds = [None] * len(layers)
    found = [
        *_rope_differences(settings, layers, kinds),
        *_cache_differences(settings, model, kinds),
    ]
    return list(dict.fromkeys(found))


def _rope_differences(
    settings: Mapping[str, Any], layers: Sequence[Any], kinds: Sequence[str | None]
) -> Iterator[str]:
    longest = settings.get("max_position_embeddings")
    others: list[tuple[int, str | None, Rope, Any]] = []
    is_realised = False
    for number, (layer, kind) in enumerate(zip(layers, kinds, strict=True)):
        accepted = _ropes(settings, kind)
        for module in _rope_modules(layer) if accepted else ():
            try:
                if any(_same_rotation(module, rope, longest) for rope in accepted):
                    is_realised = True
                else:
                    others.append((number, kind, accepted[0], module))
            except (KeyError, TypeError, ValueError) as exc:
                what = f"which mlx-lm does not know ({first_line(exc)})"
                yield f"layer {number}: the config asks for {accepted[0]}, {what}"
    for number, kind, rope, module in others:
        # Some families (OLMo 3) scale full attention only; then others read the same settings.
        may_be_plain = kind == SLIDING and is_realised and not _stated(settings)[1]
        if may_be_plain and _same_rotation(module, Rope(rope.theta, {}), longest):
            continue
        yield f"layer {number}: the config asks for {rope}; mlx-lm builds another"


def _stated(settings: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return the RoPE settings as transformers 5 reads them, and whether they are given for every
    layer type."""
    stated: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        given = settings.get(key)
        stated |= given if isinstance(given, Mapping) else {}
        if stated and all(isinstance(value, Mapping) for value in stated.values()):
            return stated, True  # no more can be said
    return stated, False


def _ropes(settings: Mapping[str, Any], kind: str | None) -> list[Rope]:
    """Return the RoPE settings that a layer of `kind` may have: one, or those of every kind where
    the kind is not known. Empty where the config does not say."""
    own, by_kind = _stated(settings)
    local = settings.get("rope_local_base_freq")
    if kind is None:
        names = list(own) if by_kind else [FULL, *([SLIDING] if local else [])]
        return [rope for name in names for rope in _ropes(settings, name)]
    if by_kind:
        own = own.get(kind, {})
    elif kind == SLIDING and local:
        return [Rope(float(local), {})]
    theta = own.get("rope_theta") or settings.get("rope_theta")
    scaling = {key: value for key, value in own.items() if key != "rope_theta"}
    types = (scaling.get("rope_type"), scaling.get("type"))
    trained = "original_max_position_embeddings"
    if "longrope" in types and trained in settings:  # where transformers 4 has it
        scaling.setdefault(trained, settings[trained])
    if theta is None or "dynamic" in types or (by_kind and not own):
        return []
    return [Rope(float(theta), scaling)]


def _rope_modules(layer: Any) -> Iterator[Any]:
    """Yield the RoPE modules of a layer that mlx-lm's `initialize_rope` can have made."""
    from mlx.nn import RoPE
    from mlx_lm.models import rope_utils

    for _, module in layer.named_modules():
        if type(module) is RoPE or type(module).__module__ == rope_utils.__name__:
            yield module


def _same_rotation(module: Any, rope: Rope, longest: int | None) -> bool:
    """Return whether `module` rotates as a module made from `rope` does, at several positions."""
    from mlx_lm.models.rope_utils import initialize_rope

    dims = getattr(module, "dims", None) or module.dim
    expected = initialize_rope(
        dims, rope.theta, getattr(module, "traditional", False), dict(rope.scaling) or None, longest
    )
    x = 1 + mx.arange(2 * dims).reshape(1, 1, 2, dims) / dims
    return all(
        mx.allclose(module(x, offset=offset), expected(x, offset=offset), atol=_TOLERANCE).item()
        for offset in _OFFSETS
    )


def _cache_differences(
    settings: Mapping[str, Any], model: Any, kinds: Sequence[str | None]
) -> Iterator[str]:
    """Yield layers whose KV cache keeps another window than the config says; models that keep
    everything for all layers mask the window instead, and are left out."""
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
            yield f"layer {number}: the config's window is {window}; mlx-lm's is {cache.max_size}"
