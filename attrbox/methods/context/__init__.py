"""What a method may ask for: a recorded pass, gradients, scores; each computed once."""
