"""Metrics, one family a file; importing a module registers its metrics."""
