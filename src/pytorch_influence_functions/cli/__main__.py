"""`python -m pytorch_influence_functions.cli`: the same as `ptif`."""

from . import main

if __name__ == "__main__":
    main()
