"""Models: find the experts, read a layer, feed it, watch it."""
