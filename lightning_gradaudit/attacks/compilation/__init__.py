"""Compiled evaluations: the traced graph, CUDA graphs, and evaluations batched across starts."""
