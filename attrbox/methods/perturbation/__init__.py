"""Methods that hide parts of the images."""
