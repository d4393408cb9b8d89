"""Chain-of-thought fine-tuning (Wei et al. 2022; Chung et al. 2022, in FLAN): the model is trained to say why, and then the label.

After each query stand the shot's rationale, the `marker` and the label word, and every token of them is trained (each shot counts
alike, however long its rationale). To answer, the model says a rationale of its own, up to the marker or `max_rationale_tokens`; the
label is read behind the marker, as in `in_context` with `rationales: true`, but without demonstrations. A task must have rationales.

`student` is how the weights are trained: pattern, lora, or another method without a head of its own.
"""

from dataclasses import replace

from llmft.methods._base import SearchRange
from llmft.methods._recipe import Recipe, TrialContext
from llmft.methods._student import ByStudent, TextStudentSettings
from llmft.methods.in_context import ReasoningSettings


class RationaleTuningSettings(ReasoningSettings, TextStudentSettings):
    pass


class RationaleTuning(ByStudent):
    kinds = ("classification",)
    Settings = RationaleTuningSettings
    search = {"learning_rate": SearchRange(1e-6, 1e-3, log=True)}
    paper = "Wei et al. 2022"

    def recipe(self, trial: TrialContext) -> Recipe:
        rationales = self.settings.rationale_format
        recipe = self.student.recipe(replace(trial, rationale_marker=rationales.marker))
        return replace(recipe, prompting=replace(recipe.prompting, rationales=rationales))


METHOD = RationaleTuning
