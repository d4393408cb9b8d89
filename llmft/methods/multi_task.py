"""Multi-task fine-tuning (Raffel et al. 2020, section 3.5.2; as instruction tuning, FLAN: Wei et al. 2022): training on a mixture of
other tasks, then a test on one that the training never saw.

The tasks are the `mixture` of a plan's entry. `n_examples` in all are drawn from their training pools, task m with the rate
r_m = min(e_m, K) / sum_n min(e_n, K) for pools of e_m examples and the `cap` K; a `temperature` T above 1 makes the rates more alike,
r_m^(1 / T). FLAN has a cap of 3,000. Every task is trained in its own pattern, with its own label words, or with its references
where it generates text; each batch holds examples of the tasks at random, so by their rates.

With `n_shots: [0]` the trial's task is held out, and its test is zero-shot; with shots, these are trained on as well, each
counting as much as any other example. The trial's own task is left out of its mixture: tasks that a plan both mixes and tests are
held out in turn. Whether texts of the held-out task come with another task is checked, and a finding of the record. Dev examples
are of the trial's task: where it shall not be seen at all, select the `last` checkpoint and do not search.

`student` is how the weights are trained: pattern, lora, or another method without a head of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from pydantic import Field

from llmft.methods._base import SearchRange
from llmft.methods._recipe import Recipe, TaskMixture, TrialContext
from llmft.methods._student import ByStudent, TextStudentSettings


class MultiTaskSettings(TextStudentSettings):
    n_examples: int = Field(1024, ge=1, description="of all tasks of the mixture together")
    cap: int = Field(3000, ge=1, description="the largest pool that raises a task's rate")
    temperature: float = Field(1.0, gt=0, description="above 1: rates more alike")


class MultiTask(ByStudent):
    Settings = MultiTaskSettings
    uses_mixture = True
    search = {"learning_rate": SearchRange(1e-6, 1e-3, log=True)}
    paper = "Raffel et al. 2020; Wei et al. 2022"

    def recipe(self, trial: TrialContext) -> Recipe:
        return replace(self.student.recipe(trial), mixture=TaskMixture(self.settings.n_examples, self.rates))

    def rates(self, sizes: Mapping[str, int]) -> Mapping[str, float]:
        """Return each task's share of the mixture by the `sizes` of the tasks' pools."""
        rates = mixing_rates(list(sizes.values()), self.settings.cap, self.settings.temperature)
        return dict(zip(sizes, rates, strict=True))


def mixing_rates(sizes: Sequence[int], cap: int, temperature: float = 1.0) -> list[float]:
    """Compute the rate of each task, by the `sizes` of their pools; they sum to one."""
    capped = [min(size, cap) for size in sizes]
    tempered = [(size / sum(capped)) ** (1 / temperature) for size in capped]
    return [rate / sum(tempered) for rate in tempered]


METHOD = MultiTask
