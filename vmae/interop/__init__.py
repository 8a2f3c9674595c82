"""Meeting other code: published checkpoints and golden files."""
