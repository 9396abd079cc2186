"""Compiled evaluations: the traced graph and CUDA graphs."""
