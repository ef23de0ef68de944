"""Methods of plain gradients."""
