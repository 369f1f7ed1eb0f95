"""Where a result comes from: the versions and source files that its bytes depend on."""

from collections.abc import Mapping
from importlib.metadata import version

from quantkit.checkpoint.source import Source
from quantkit.storage.input_key import InputKey


def versions() -> dict[str, str]:
    """Return the versions of the packages on which written bytes depend."""
    return {package: version(package) for package in ("quantkit", "mlx", "mlx-lm")}


def input_key(source: Source, hashes: Mapping[str, str]) -> InputKey:
    """Return the key of a run over `source`, whose other inputs have the named `hashes`.

    Samples the shards instead of hashing them whole, which takes a few MB of reading.
    """
    files = {
        f"source file {file.name}": source.checkpoint.fingerprint(file)
        for file in source.checkpoint.files
    }
    structure = source.inventory.source.structure
    return InputKey(
        {
            "source structure": structure,
            "float type": source.floats,
            **files,
            **hashes,
            **{f"version of {package}": number for package, number in versions().items()},
        }
    )
