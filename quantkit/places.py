"""Where things lie: the data that ships with quantkit, and its cache."""

import os
from pathlib import Path

from quantkit.errors import InputError


def data_folder(name: str) -> Path:
    """The folder `recipes` or `evals`: in the wheel, or in the checkout quantkit runs from.

    Raises InputError when the installation lacks it.
    """
    package = Path(__file__).parent
    for folder in (package / "_data" / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise InputError(f"this installation of quantkit lacks its folder {name}/. Install it again.")


def user_path(name: str) -> Path:
    """`name` with a leading ~ expanded; left as it is where nobody goes by that name."""
    return Path(os.path.expanduser(name))  # noqa: PTH111  (Path's own raises for ~nobody)


def plain_path(path: Path) -> Path:
    """`path` from the root, without the ".." that Path keeps."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def cache_folder() -> Path:
    """`$QUANTKIT_CACHE`, else `quantkit` under `$XDG_CACHE_HOME` or ~/.cache. May not exist yet."""
    if own := os.environ.get("QUANTKIT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantkit"
