"""The key of a resumable run: a named hash for every input that its results depend on."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class InputKey:
    """Named hashes, such as `plan` -> sha256. The names appear in errors."""

    hashes: Mapping[str, str]

    def extended(self, hashes: Mapping[str, str]) -> "InputKey":
        """Return this key with more named hashes."""
        return InputKey({**self.hashes, **hashes})

    def difference(self, saved: Mapping[str, str]) -> str | None:
        """Return the name of the first input that differs from `saved`, None if all agree."""
        return next((k for k, value in self.hashes.items() if saved.get(k) != value), None)
