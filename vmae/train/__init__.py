"""Training: one loop, its optimizer, checkpoints and logs."""
