"""`python -m ferrum` is `ferrum`."""

from ferrum.local.path import leave_here

if __name__ == "__main__":
    leave_here()

    from ferrum.cli import main

    main()
