"""What the benchmarks share: records, tables, steps in processes of their own, plots, heartbeats."""
