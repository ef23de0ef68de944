"""Propagation rules, one family a file. Each is a small class; `attrbox.methods.propagation` registers them."""
