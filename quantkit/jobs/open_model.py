"""Open the checkpoint that a user names."""

from pathlib import Path

from quantkit.checkpoint.source import STATED, Source, open_source

DEMOS = ("demo", "demo-llama")


def open_model(
    name: str,
    revision: str | None = None,
    *,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Source:
    """Open a folder, a Hub id, or one of the small models `demo` and `demo-llama`.

    The small models are built on first use. `dtype` is the float type of `open_source`. Raises
    InputError.
    """
    name = resolved(name)
    floats = STATED if dtype is None else dtype
    return open_source(name, revision, floats=floats, trust_remote_code=trust_remote_code)


def resolved(name: str) -> str:
    """Return the folder of a small model, and other names as they are."""
    if name not in DEMOS or Path(name).exists():
        return name
    from quantkit.demo import build

    return str(build.demo_checkpoint() if name == "demo" else build.plain_checkpoint())
