"""Zero-shot prompting: the model reads the query alone and the most probable label word wins.

The floor that every other method must clear. Nothing is trained and no labelled example is used. Where text is generated, it is what
the model says after the query.

`calibration: contextual` (Zhao et al. 2021) divides the label words' probabilities by their mean for queries in which "N/A", "" and
"[MASK]" stand in the place of every text: what the prompt alone makes the model say. A label word that wins always, whatever the
query, then loses its lead. The full-vocabulary rule is left as it is.
"""

from typing import Literal

from pydantic import Field

from llmft.config import StrictModel
from llmft.errors import UserError
from llmft.methods._base import Method
from llmft.methods._recipe import Prompting, Recipe, TrialContext

CONTENT_FREE = ("N/A", "", "[MASK]")  # Zhao et al. 2021, section 5


class PromptingSettings(StrictModel):
    calibration: Literal["none", "contextual"] = Field(
        "none", description="contextual: label words are judged against prompts without content"
    )


class ZeroShot(Method):
    trains = False
    uses_shots = False
    paper = "Radford et al. 2019"
    Settings = PromptingSettings

    def recipe(self, trial: TrialContext) -> Recipe:
        if self.settings.calibration == "none":
            return Recipe()
        if trial.label_words is None:
            raise UserError(
                f"method '{trial.spec.method}': settings.calibration is for label words, and '{trial.spec.task}' generates text. Use none."
            )
        return Recipe(prompting=Prompting(calibration_texts=CONTENT_FREE))


METHOD = ZeroShot
