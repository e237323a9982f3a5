"""The GPU that the configurations are for."""

SMS = 132
"""Multiprocessors of an H100 SXM and of an H200."""

SHARED_BYTES = 232448
"""Bytes of shared memory that a CTA can have, barriers included."""
