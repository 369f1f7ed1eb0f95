"""The text part of multimodal models: settings and files of absent encoders are left out."""

from collections.abc import Iterator, Mapping
from inspect import Parameter, signature
from typing import Any

from quantkit.artifacts.inventory import Inventory
from quantkit.backend import mx  # noqa: F401  (before mlx-lm: see backend)

_MODALITIES = {  # words in the names of tensors and settings
    "vision": ("vision", "visual", "image", "video", "mm", "boi", "eoi"),
    "audio": ("audio", "speech", "boa", "eoa"),
}


def settings_without_tensors(config: Mapping[str, Any], inventory: Inventory) -> Iterator[str]:
    """Yield the config keys of image and audio encoders that the repo lacks.

    Apps that find such keys load the repo as a vision-language model, and fail. Settings that
    mlx-lm's model requires stay.
    """
    absent = absent_modalities(inventory)
    words = [word for modality in absent for word in _MODALITIES[modality]]
    keys = [key for key in config if key.partition("_")[0] in words]
    required = _required_settings(config) if keys else set()
    yield from (key for key in keys if key not in required)


def absent_modalities(inventory: Inventory) -> list[str]:
    """Return the modalities, `vision` and `audio`, that a checkpoint has no tensors of."""
    names = [w.name for w in inventory.weights] + [t.name for t in inventory.unquantized]
    present = {word.partition("_")[0] for name in names for word in name.split(".")}
    return [m for m, words in _MODALITIES.items() if not present.intersection(words)]


def _required_settings(config: Mapping[str, Any]) -> set[str]:
    """Return the config keys that mlx-lm's model requires."""
    from mlx_lm.utils import _get_classes

    parameters = signature(_get_classes(dict(config))[1]).parameters.values()
    return {p.name for p in parameters if p.default is Parameter.empty}
