"""LoRA (Hu et al. 2022): h = W x + (alpha / r) B A x, with W frozen, A random and B zero, trained to say the right label word.

The adapters are peft's. They start as the identity (B = 0) and can be merged into W without changing an answer beyond rounding.
`rslora` scales by alpha / sqrt(r) (Kalajdzievski 2023); `dora` learns the length of W's columns apart from their direction (Liu et
al. 2024). A plan searches ranks with `search: {r: {choices: [1, 2, 4, 8, 16, 64]}}`.
"""

from typing import Literal

from pydantic import Field

from llmft.errors import UserError
from llmft.methods._base import SearchRange
from llmft.methods._types import Generator, LoadedModel, PeftConfig, PreTrainedModel, Tensor
from llmft.methods.pattern import PatternBased, PatternSettings


class LoraSettings(PatternSettings):
    r: int = Field(8, ge=1, description="rank: the inner width of B A")
    alpha: int = Field(8, ge=1, description="B A is scaled by alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="of what A reads")
    init: Literal["kaiming", "gaussian"] = Field("kaiming", description="of A")
    rslora: bool = Field(False, description="scales by alpha / sqrt(r) instead")
    dora: bool = Field(False, description="learns the length of W's columns apart from their direction")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        (), description="names of linear layers, or every one but the head; empty: peft's choice (query and value)"
    )


class Lora(PatternBased):
    Settings = LoraSettings
    train_defaults = {"learning_rate": 2e-4}
    search = {"learning_rate": SearchRange(1e-5, 1e-2, log=True)}
    paper = "Hu et al. 2022"

    def peft_config(self, network: PreTrainedModel) -> PeftConfig:
        from peft import LoraConfig
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

        from llmft.methods.modules.peft_layers import task_type

        settings, architecture = self.settings, network.config.model_type
        if not settings.targets and architecture not in KNOWN:
            raise UserError(
                f"method 'lora': peft names no targets for {architecture!r} models. Set settings.targets, e.g. [q_proj, v_proj]."
            )
        targets = settings.targets or KNOWN[architecture]
        return LoraConfig(
            r=settings.r,
            lora_alpha=settings.alpha,
            lora_dropout=settings.lora_dropout,
            init_lora_weights="gaussian" if settings.init == "gaussian" else True,
            use_rslora=settings.rslora,
            use_dora=settings.dora,
            target_modules=targets if isinstance(targets, str) else sorted(targets),
            task_type=task_type(network),
        )

    def prepare(self, model: LoadedModel, n_labels: int, generator: Generator) -> None:
        from llmft.methods.modules.peft_layers import insert_peft_layers, linear_layers

        try:
            insert_peft_layers(self.peft_config(model.network), model.network, generator)
        except ValueError:
            raise UserError(
                f"method 'lora': settings.targets {list(self.settings.targets)} does not name linear layers of this model. "
                f"Layers: {', '.join(linear_layers(model.network))}."
            ) from None

    def export(self, model: LoadedModel) -> tuple[PeftConfig, dict[str, Tensor]] | None:
        from llmft.methods.modules.peft_layers import peft_layers_of

        return peft_layers_of(model.network)


METHOD = Lora
