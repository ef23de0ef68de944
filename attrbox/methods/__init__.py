"""The methods: how a map is made from gradients, propagated gradients, feature maps or nothing at all."""
