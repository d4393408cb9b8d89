"""What methods share that train by another method, their student: its name, its settings, and its hooks."""

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
        if method_class(name).context is not Method.context:
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


class WordStudentSettings(StudentSettings):
    """Of a student that trains what shall be said, whatever that is, and keeps nothing about the shots."""

    @field_validator("student")
    @classmethod
    def _says_words(cls, name: str) -> str:
        student = method_class(name)
        if student.has_own_head or student.begin is not Method.begin:
            raise ValueError("the student must train what is said and nothing else, such as pattern, lora or prompt_tuning")
        return name


class ByStudent(Method):
    """A method that trains by its student: what it does not say itself, the student does."""

    def __init__(self, settings=None):
        super().__init__(settings)
        self.student = build_method(self.settings.student, self.settings.student_settings)
        for name in ("has_own_head", "n_virtual_tokens", "base_weights", "pull_to_start", "n_fisher_samples"):
            setattr(self, name, getattr(self.student, name))
        for hook in ("read", "prepare", "begin", "prepend_prompt", "scores", "loss", "fold", "virtual_tokens", "peft_adapter"):
            if getattr(type(self), hook) is getattr(Method, hook):
                setattr(self, hook, getattr(self.student, hook))

    def __getattr__(self, name):
        """What a student's hooks compute besides, through `Adapted`."""
        if "student" not in vars(self):
            raise AttributeError(name)
        return getattr(self.student, name)
