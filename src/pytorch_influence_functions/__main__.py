"""`python -m pytorch_influence_functions` is the command line `ptif`."""

from .cli import main

if __name__ == "__main__":
    main()
