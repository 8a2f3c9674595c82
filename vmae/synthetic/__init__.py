"""Made videos with known labels, boxes and segments, and the sample clips."""
