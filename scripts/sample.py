"""`uv run -m scripts.sample ...` is `rediffuse sample ...`."""

from rediffuse.cli import main

if __name__ == "__main__":
    main(["sample"])
