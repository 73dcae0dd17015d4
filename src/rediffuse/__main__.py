"""`python -m rediffuse` is `rediffuse`."""

from rediffuse.cli import main

if __name__ == "__main__":
    main()
