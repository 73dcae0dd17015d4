"""`uv run -m scripts.evaluate ...` is `rediffuse evaluate ...`."""

from rediffuse.cli import main

if __name__ == "__main__":
    main(["evaluate"])
