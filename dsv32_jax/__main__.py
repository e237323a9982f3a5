"""`python -m dsv32_jax`, the same as `dsv32`."""

from dsv32_jax.cli import main

if __name__ == "__main__":
    main()
