"""Files: their paths, atomic writing, hashing, and the directories of resumable runs."""
