"""`python -m nybble`: the command line, for launchers that start modules, such as torchrun."""

from .cli.app import main

if __name__ == "__main__":
    main()
