"""Methods that optimize a mask."""
