"""`dsv32 serve` under load of every kind, with an account of each request: see `__main__.py`."""
