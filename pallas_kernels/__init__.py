"""Kernels of DeepSeek-V3.2, one folder an op, usable without the rest of this project.

Every op is a function with one `backend` argument: "reference" is the specification in plain `jax.numpy`, runs anywhere
and is differentiable; a named kernel backend runs or raises; "auto" takes the best that is available.
"""
