"""`uv run -m scripts.train ...` is `rediffuse train ...`."""

from rediffuse.cli import main

if __name__ == "__main__":
    main(["train"])
