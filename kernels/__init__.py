"""Triton kernels of dsd_fast, imported as ``dsd_fast.kernels`` and only when a GPU pass asks."""
