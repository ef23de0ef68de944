"""The subcommands of `attrbox`."""
