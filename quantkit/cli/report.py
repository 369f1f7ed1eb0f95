"""`quantkit report`: the report of a repo."""

from quantkit.cli import console, tables
from quantkit.cli.options import Json, Repo


def report(out: Repo, json: Json = False) -> None:
    """Show the report of a repo: size, bits per weight, tiers, hashes, versions.

    Reads OUT/quantkit.json. `quantkit verify OUT` checks it.

    `quantkit report gpt-oss-20b-16GB`
    """
    from quantkit.publish.record import read_report

    read = read_report(out)
    if json:
        console.print_json(read.to_json())
    else:
        tables.print_report(read, str(out))
