"""The command line: one file a group of commands, and what they share."""

from sweeps.cli.app import main

__all__ = ["main"]
