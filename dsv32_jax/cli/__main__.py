"""`python -m dsv32_jax.cli`."""

from dsv32_jax.cli import main

main()
