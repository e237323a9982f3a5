"""Continuous batching of many requests over one model: the engine, its scheduler, blocks and device programs."""
