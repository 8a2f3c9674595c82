"""Atomic writes, JSON that may be damaged, and a lock for a folder that one process writes to."""
