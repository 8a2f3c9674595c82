"""Commands other than training and testing: doctor, curves, serve, parity, export, convert."""
