"""Recovery of the labels from a gradient."""
