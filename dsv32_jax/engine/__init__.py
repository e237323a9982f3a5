"""Continuous batching of many requests over one model: the engine, its scheduler, its blocks and its device programs."""
