"""The scale benchmark: how masquant's time and memory grow, and how they compare."""
