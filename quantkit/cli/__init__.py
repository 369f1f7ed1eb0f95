"""The command line: a few lines a command over the library; alone in knowing typer and rich."""
