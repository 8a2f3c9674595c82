"""Files that are whole or absent, JSON that may be spoilt, and a folder that one process writes to."""
