"""What a run will need before it starts: memory, largest batch, hours."""
