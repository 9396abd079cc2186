"""Inversion layer by layer, from the head to the image."""
