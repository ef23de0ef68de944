"""The learned propagation rule of Yang et al., ECCV 2020."""
