"""`dsv32 bench`: every op over its shapes, beside its reference, its roofline and the best published kernel."""
