"""Sequence-level distillation (Kim & Rush 2016; Wu et al. 2023, LaMini-LM): a student is trained to say what a teacher said.

The teacher is the same model, untouched, with the shots as demonstrations in its prompt, or an instruction, or both; or another
one (`teacher` of a plan's entry) of any family and tokenizer, since only texts pass from one to the other: a larger model, or one
that was tuned to follow instructions (`teacher_context: none`). It answers `n_unlabelled` examples of the training pool once,
before the training, as the plan's `generation` says (greedily, by beams as Kim & Rush, or at a temperature); their own references
are never read. The student reads the query alone and is trained on these answers with the cross-entropy of their tokens, as on
references. With `train_on_shots` the shots and their references are trained on as well.

An answer without text is left out, and so is one that did not come to its end, unless `keep_unfinished`: what is cut would teach
to stop anywhere. The record counts both. The answers lie beside the record, in `responses.parquet`, with the fields that they
answer. Such a file, or any of given answers, is a task's own training file (llmft/tasks/README.md): training on it is plain
instruction tuning, by the method `pattern` or any other.

The student is any method that trains and generates, by its name (pattern, lora, ...), with `student_settings`; the rate is that of
the student. Wu et al. train for 5 epochs in batches of 1,024, at 5e-4 encoder-decoder models and at 2e-5 causal ones, and put
every query into Alpaca's wrapper, in training and in evaluation (`format: alpaca` of a task).
"""

from dataclasses import replace
from typing import Literal

from pydantic import Field

from llmft.methods._base import SearchRange
from llmft.methods._recipe import Distillation, Recipe, TeacherPrompt, TrialContext
from llmft.methods._student import ByStudent, TextStudentSettings


class SequenceDistillationSettings(TextStudentSettings):
    teacher_context: Literal["demonstrations", "none"] = Field("demonstrations", description="what stands in the teacher's prompt")
    instruction: str = Field("", description="opens the teacher's prompt, with or without demonstrations")
    n_unlabelled: int = Field(128, ge=1, description="examples of the training pool that the teacher answers")
    train_on_shots: bool = Field(False, description="the shots and their references are trained on as well")
    keep_unfinished: bool = Field(False, description="answers that were cut are learned from too")


class SequenceDistillation(ByStudent):
    kinds = ("generation",)
    uses_teacher = True
    Settings = SequenceDistillationSettings
    search = {"learning_rate": SearchRange(1e-6, 1e-3, log=True)}
    paper = "Kim & Rush 2016; Wu et al. 2023"

    def recipe(self, trial: TrialContext) -> Recipe:
        settings, shots = self.settings, trial.draw.shots
        shown = shots if settings.teacher_context == "demonstrations" else ()
        prompt = TeacherPrompt(tuple(range(settings.n_unlabelled)), shown, settings.instruction)
        teacher = Distillation((prompt,), n_unlabelled=settings.n_unlabelled, keep_truncated_texts=settings.keep_unfinished)
        return replace(self.student.recipe(trial), trained_shots=shots if settings.train_on_shots else (), teacher=teacher)


METHOD = SequenceDistillation
