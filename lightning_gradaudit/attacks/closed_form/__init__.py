"""Attacks that solve for the inputs of a layer, without a search."""
