"""The command line: the only place that composes the stages, and that knows typer and rich."""
