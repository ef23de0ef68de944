"""Layer-wise relevance propagation: rules at activations and at layers, and composites of them."""
