"""Write a repo from a source and a plan: a block at a time, resumable and atomic."""
