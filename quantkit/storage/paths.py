"""Where things lie: the data that ships with quantkit, and its cache."""

import os
import tempfile
from pathlib import Path

from quantkit.errors import InputError


def data_folder(name: str) -> Path:
    """The folder `recipes` or `evals`: in the wheel, or in the checkout quantkit runs from.

    Raises InputError when the installation lacks it.
    """
    package = Path(__file__).parents[1]
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
    """`$QUANTKIT_CACHE`, else `quantkit` under `$XDG_CACHE_HOME` or ~/.cache, or in the folder for
    temporary files where there is no home. May not exist yet."""
    if own := os.environ.get("QUANTKIT_CACHE"):
        return user_path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "quantkit"
    if (home := home_folder()) is not None:
        return home / ".cache" / "quantkit"
    return Path(tempfile.gettempdir()) / f"quantkit-{os.getuid()}"


def home_folder() -> Path | None:
    """The user's home; None where HOME is not set and the system does not know the user, as in
    containers that run under an arbitrary number."""
    try:
        return Path.home()
    except RuntimeError:
        return None
