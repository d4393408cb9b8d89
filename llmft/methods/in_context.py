"""In-context learning (Brown et al. 2020): the shots stand in the prompt as demonstrations, and no weight changes.

Scored as in Mosbach et al. 2023: the most probable of the label words after the query. Whole demonstrations that do not fit the
model's context are left out evenly over the labels, and counted. Where text is generated, a demonstration shows its first
reference. `calibration` is that of zero-shot prompting, with the demonstrations in front of the content-free queries
too.

`rationales: true` is chain-of-thought prompting (Wei et al. 2022): each demonstration says between query and label word why its label
is right, followed by the `marker`. The model first says a rationale of its own, most probable token by token, up to the marker or
`max_rationale_tokens`; then its label is read behind the marker, which is put there where the model did not come to it. A task must
have rationales: a user's own names their column.
"""

from dataclasses import replace

from pydantic import Field, model_validator

from llmft.config import StrictModel
from llmft.errors import UserError
from llmft.methods._recipe import Rationales, Recipe, TrialContext
from llmft.methods.zero_shot import PromptingSettings, ZeroShot


class ReasoningSettings(StrictModel):
    marker: str = Field(" The answer is", pattern=r"\S$", description="stands between a rationale and its label word")
    max_rationale_tokens: int = Field(64, ge=1, description="the longest rationale that the model says")

    @property
    def rationale_format(self) -> Rationales:
        return Rationales(self.marker, self.max_rationale_tokens)


class InContextSettings(ReasoningSettings, PromptingSettings):
    rationales: bool = Field(False, description="chain of thought: demonstrations say why")

    @model_validator(mode="after")
    def _one_reading(self):
        if self.rationales and self.calibration != "none":
            raise ValueError("calibration: a query without content has no rationale: set calibration to none, or rationales to false")
        return self


class InContext(ZeroShot):
    uses_shots = True
    shows_demonstrations = True
    paper = "Brown et al. 2020"
    Settings = InContextSettings

    def recipe(self, trial: TrialContext) -> Recipe:
        rationales = self.settings.rationale_format if self.settings.rationales else None
        if rationales and trial.spec.generation:
            raise UserError(
                f"method '{trial.spec.method}': settings.rationales lead to label words, and '{trial.spec.task}' generates text. Use false."
            )
        prompting = replace(super().recipe(trial).prompting, demonstrations=trial.draw.shots, rationales=rationales)
        return Recipe(prompting=prompting)


METHOD = InContext
