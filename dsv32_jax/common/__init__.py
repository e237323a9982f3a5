"""Helpers that every room uses: checks of arguments and fields, files, progress, units."""
