"""Zero-shot prompting: the model reads the query alone and the most probable label word wins.

Where text is generated, it is what the model says after the query. The floor that every other method must clear. Nothing is trained and no labelled example is used.
"""

from llmft.method import Method


class ZeroShot(Method):
    trains = False
    uses_shots = False
    paper = "Radford et al. 2019"


METHOD = ZeroShot
