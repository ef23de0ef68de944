"""One recorded forward pass, replayed backward under as many propagation rules as wanted."""
