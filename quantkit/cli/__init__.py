"""The command line: arguments in, outcome out. Only this room imports typer and rich."""
