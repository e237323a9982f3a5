"""Trains the demo model, a small DeepSeek-V3.2, by the paper's stages: see `__main__.py`."""
