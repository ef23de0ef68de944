"""Methods of feature maps and of attention."""
