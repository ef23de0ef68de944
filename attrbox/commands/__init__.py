"""The larger commands, one a module; `attrbox.cli` puts them together."""
