"""Paths: names of quantkit's own files, its shipped data, and its cache."""

import os
import tempfile
from pathlib import Path

from quantkit.errors import InputError

REPORT_FILE = "quantkit.json"  # inside a repo
PROFILE_FILE = "profile.json"  # inside the folder of a sensitivity profile


def recipes_folder() -> Path:
    """Return the folder of the shipped recipes. Raises InputError if the installation lacks it."""
    return _shipped("recipes", "recipes")


def benchmarks_folder() -> Path:
    """Return the folder of the shipped benchmarks. Raises InputError if the installation lacks
    it.
    """
    return _shipped("benchmarks", "evals/benchmarks")


def _shipped(name: str, checkout: str) -> Path:
    """Return a folder of shipped data: from the wheel, or from the checkout."""
    package = Path(__file__).parents[1]
    for folder in (package / "_data" / name, package.parent / checkout):
        if folder.is_dir():
            return folder
    raise InputError(f"this installation of quantkit lacks its {name}. Install it again.")


def user_path(name: str) -> Path:
    """Return `name` with a leading ~ expanded, unchanged for an unknown user."""
    return Path(os.path.expanduser(name))  # noqa: PTH111  (Path's own raises for ~nobody)


def plain_path(path: Path) -> Path:
    """Return the absolute path without "..", which Path would keep."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def cache_folder() -> Path:
    """Return the cache, which may not exist yet.

    `$QUANTKIT_CACHE`, else `quantkit` under `$XDG_CACHE_HOME` or ~/.cache; without a home, a folder
    under the system's temporary one.
    """
    if chosen := os.environ.get("QUANTKIT_CACHE"):
        return user_path(chosen)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "quantkit"
    if (home := home_folder()) is not None:
        return home / ".cache" / "quantkit"
    return Path(tempfile.gettempdir()) / f"quantkit-{os.getuid()}"


def home_folder() -> Path | None:
    """Return the user's home, None if HOME is unset and the system does not know the user.

    The latter happens in containers that run under an arbitrary user id.
    """
    try:
        return Path.home()
    except RuntimeError:
        return None
