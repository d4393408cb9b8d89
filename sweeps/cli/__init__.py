"""The command line: one file for each group of commands, and the work of those commands that have no other home."""

from sweeps.cli.app import main

__all__ = ["main"]
