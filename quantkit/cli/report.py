"""`quantkit report`: what a repo holds."""

from quantkit.cli import console, tables
from quantkit.cli.options import Json, Repo


def report(out: Repo, json: Json = False) -> None:
    """Show what a repo holds: size, bits per weight, the tier table, hashes, versions.

    Reads OUT/quantkit.json. `quantkit verify OUT` checks that it is true.
    """
    from quantkit.publish.report import read_report

    found = read_report(out)
    if json:
        console.print_json(found.to_json())
    else:
        tables.print_report(found, str(out))
