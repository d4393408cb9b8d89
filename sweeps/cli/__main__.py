"""`python -m sweeps.cli`: the command line without an installed script."""

from sweeps.cli.app import main

if __name__ == "__main__":
    main()
