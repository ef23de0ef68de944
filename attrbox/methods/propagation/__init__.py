"""Methods that replay a propagation rule."""
