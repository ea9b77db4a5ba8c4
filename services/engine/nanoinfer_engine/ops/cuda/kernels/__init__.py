"""Triton kernels of the CUDA path; each file launches one family and knows no model.

Kernels that run in a decode step take `pdl`: programmatic dependent launch. Such a kernel lets its
successor start at once, loads what no earlier kernel of the step writes (weights, cached keys),
and only then waits for its predecessor. Every one of them waits before its first store, so waiting
for the predecessor means waiting for all that came before it.
"""
