"""Fine-tuning, then in-context learning: all weights are trained on shots (Schick & Schuetze 2021), and further shots stand in
the prompt as demonstrations (Brown et al. 2020) when dev and the test sets are scored.

The first `n_demonstrations` shots of the draw are the demonstrations. `train_on: others` trains on the remaining shots, so that
the method sees as many examples as any other with so many shots; `train_on: all` trains on the demonstrations too. Training
prompts are the query alone, or, `train_prompts: with_demonstrations`, look like those of the evaluation. Both together are
refused: a demonstration that is also the query would have its answer in the prompt.
"""

from typing import Literal

from pydantic import Field, model_validator

from llmft.errors import UserError
from llmft.methods._base import SearchRange
from llmft.methods._recipe import Prompting, Recipe, TrialContext
from llmft.methods.pattern import WholeModel, WholeModelSettings


class FinetunedInContextSettings(WholeModelSettings):
    n_demonstrations: int = Field(4, ge=1, description="shots that stand in the prompt")
    train_on: Literal["others", "all"] = Field("others", description="the other shots, or all of them")
    train_prompts: Literal["bare", "with_demonstrations"] = Field("bare", description="what a prompt holds in training")

    @model_validator(mode="after")
    def _no_answer_in_the_prompt(self):
        if self.train_on == "all" and self.train_prompts == "with_demonstrations":
            raise ValueError(
                "train_on 'all' with train_prompts 'with_demonstrations' would show the answer of a query that is also a demonstration. "
                "Use train_on: others, or train_prompts: bare"
            )
        return self


class FinetunedInContext(WholeModel):
    Settings = FinetunedInContextSettings
    shows_demonstrations = True
    search = {"learning_rate": SearchRange(1e-6, 1e-4, log=True)}
    paper = "Schick & Schuetze 2021; Brown et al. 2020"

    def recipe(self, trial: TrialContext) -> Recipe:
        shots, n = trial.draw.shots, self.settings.n_demonstrations
        n_needed = n + (self.settings.train_on == "others")
        if len(shots) < n_needed:
            raise UserError(
                f"n_shots: 'finetuned_in_context' with n_demonstrations {n} and train_on '{self.settings.train_on}' needs at least "
                f"{n_needed} shots in all (got {len(shots)}). Set n_demonstrations lower or n_shots higher."
            )
        prompting = Prompting(demonstrations=shots[:n], train_without_demonstrations=self.settings.train_prompts == "bare")
        return Recipe(shots[n:] if self.settings.train_on == "others" else shots, prompting)


METHOD = FinetunedInContext
