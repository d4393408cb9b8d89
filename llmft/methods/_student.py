"""What methods share that train by another method, their student: its name, its settings, and its hooks."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from llmft.config import StrictModel
from llmft.errors import UserError
from llmft.methods._base import Method
from llmft.methods._registry import METHODS, build_method, complete_settings, method_class


class StudentSettings(StrictModel):
    student: str = Field("pattern", description="the method that trains it: pattern, lora, ...")
    student_settings: dict[str, Any] = Field(default_factory=dict, validate_default=True, description="its settings")

    @field_validator("student")
    @classmethod
    def _can_learn(cls, name: str) -> str:
        if name not in METHODS or not method_class(name).trains or issubclass(method_class(name).Settings, StudentSettings):
            raise ValueError("the student must be another method that trains, such as pattern, lora or vanilla")
        if method_class(name).shows_demonstrations:
            raise ValueError(f"a student reads the query alone, and {name!r} reads demonstrations: use pattern")
        return name

    @field_validator("student_settings")
    @classmethod
    def _complete(cls, settings: dict[str, Any], info: Any) -> dict[str, Any]:
        if "student" not in info.data:  # which is a mistake of its own
            return settings
        try:
            return complete_settings(info.data["student"], settings)
        except UserError as error:
            raise ValueError(str(error)) from None


class TextStudentSettings(StudentSettings):
    """Settings of a student that is trained to generate texts: references, or rationales and label words."""

    @field_validator("student")
    @classmethod
    def _generates(cls, name: str) -> str:
        if "generation" not in method_class(name).kinds:
            raise ValueError("the student must be a method that generates text, such as pattern or lora")
        return name


class ByStudent(Method):
    """A method that trains by its student: the hooks that it does not override are the student's."""

    def __init__(self, settings: StrictModel | None = None):
        super().__init__(settings)
        self.student = build_method(self.settings.student, self.settings.student_settings)
        self.has_own_head, self.base_weights = self.student.has_own_head, self.student.base_weights
        for hook in ("recipe", "prepare", "prepend_prompt", "scores", "loss", "finalize", "export"):
            if getattr(type(self), hook) is getattr(Method, hook):
                setattr(self, hook, getattr(self.student, hook))
