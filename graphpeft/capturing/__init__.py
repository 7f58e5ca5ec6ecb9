"""From what users hold to a graph: sample inputs, the capture itself, and equal blocks traced once."""
