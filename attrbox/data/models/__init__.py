"""Models by name, with the preprocessing and the class names that belong to them."""
