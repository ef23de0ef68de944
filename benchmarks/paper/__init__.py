"""The experiments of Yang et al., "Learning Propagation Rules for Attribution Map Generation" (ECCV 2020)."""
