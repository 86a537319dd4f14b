"""`python -m ferrum` is `ferrum`."""

from ferrum.cli import main

if __name__ == "__main__":
    main()
