"""Files: where they lie, how they are written, and the scratch of runs that resume."""
