"""Layers that methods add to a network, and distances between distributions."""

from llmft.methods.modules.peft_layers import merge, merged_deltas

__all__ = ["merge", "merged_deltas"]
