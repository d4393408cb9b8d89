"""In-context learning (Brown et al. 2020): the shots stand in the prompt as demonstrations, and no weight changes.

Scored as in Mosbach et al. 2023: the most probable of the label words after the query. Whole demonstrations that do not fit the
model's context are left out evenly over the labels, and counted. Where text is generated, a demonstration shows its first
reference. `calibration` is that of zero-shot prompting, with the demonstrations in front of the content-free queries
too.
"""

from llmft.methods.zero_shot import ZeroShot


class InContext(ZeroShot):
    uses_shots = True
    paper = "Brown et al. 2020"

    def context(self, shots):
        return shots


METHOD = InContext
