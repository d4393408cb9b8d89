"""What methods share that train by another method, their student: its name, its settings, and its hooks."""

from typing import Any

from pydantic import Field, field_validator

from llmft.errors import UserError
from llmft.registry import METHODS, build_method, complete_settings, method_class
from llmft.spec import Spec


class StudentSettings(Spec):
    student: str = "pattern"
    student_settings: dict[str, Any] = Field(default_factory=dict, validate_default=True)

    @field_validator("student")
    @classmethod
    def _can_learn(cls, name: str) -> str:
        if name not in METHODS or not method_class(name).trains or issubclass(method_class(name).Settings, StudentSettings):
            raise ValueError("the student must be another method that trains, such as pattern, lora or vanilla")
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


def take_student(method, *more):
    """Build the student that `method.settings` names, and let it do what a training needs besides the loss; `more` are further hooks
    that shall be the student's."""
    student = method.student = build_method(method.settings.student, method.settings.student_settings)
    for name in ("has_own_head", "n_virtual_tokens", "base_weights", "pull_to_start"):
        setattr(method, name, getattr(student, name))
    for hook in ("read", "prepare", "begin", "condition", "scores", "fold", "virtual_tokens", "peft_config", *more):
        setattr(method, hook, getattr(student, hook))
