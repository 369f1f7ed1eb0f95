"""`quantkit inspect`: the inventory of a checkpoint."""

from quantkit.cli import console, tables
from quantkit.cli.options import Json, Revision, Src


def inspect(src: Src, revision: Revision = None, json: Json = False) -> None:
    """Show the tensors of a checkpoint, from its headers alone.

    Downloads metadata only. Damaged files (truncated shards, tensors that are missing or have a
    wrong shape) are reported.

    `quantkit inspect openai/gpt-oss-120b`
    """
    from quantkit.checkpoint.source import STORED
    from quantkit.jobs.open_model import open_model

    inventory = open_model(src, revision, dtype=STORED).inventory
    if json:
        console.print_json(inventory.to_json())
    else:
        tables.print_inventory(inventory)
