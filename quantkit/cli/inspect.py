"""`quantkit inspect`: what a checkpoint holds."""

from quantkit.cli import console, tables
from quantkit.cli.options import Json, Revision, Src


def inspect(src: Src, revision: Revision = None, json: Json = False) -> None:
    """Show what a checkpoint holds, from its headers alone.

    Nothing is downloaded but metadata: `quantkit inspect openai/gpt-oss-120b` takes seconds.
    Damaged files (truncated shards, tensors missing or of a wrong shape) are found and named.
    """
    from quantkit.checkpoint.source import STORED
    from quantkit.cli.choose import open_model

    inventory = open_model(src, revision, dtype=STORED).inventory
    if json:
        console.print_json(inventory.to_json())
    else:
        tables.print_inventory(inventory)
