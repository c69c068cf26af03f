"""Every figure: quality, compute and speed of pruned models and baselines, and the conditions of a measurement."""
