"""Timing of kernels, layers and whole models on this machine: honest, or not at all.

Start with `measure.py`: nothing is timed before it agrees with the reference, everything in a
comparison is timed interleaved, and each time stands beside the least that the machine allows.
Needs torch and masquant_kernels (whole models: Transformers), so that it runs from a checkout.
"""
