"""Processes that are killed at any of the things that they do to the disk."""

# Counts what the process does to `out` (opening, renaming, removing) and kills it at one of them.
WATCH = """
import os, signal, sys
def watch(out, moment):
    seen = [0]
    def hook(event, args):
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            if isinstance(args[0], (str, bytes, os.PathLike)) and out in os.fspath(args[0]):
                seen[0] += 1
                if seen[0] == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    return seen
"""
