"""Commands beside training and testing: doctor, curves, serve, parity, export, convert."""
