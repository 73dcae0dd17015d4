"""Doors for `uv run -m scripts.NAME`."""
