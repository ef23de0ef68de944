"""Propagation rules, one family a file. Each is a small class; `attrbox.methods.propagation.rule_methods` registers
them."""
