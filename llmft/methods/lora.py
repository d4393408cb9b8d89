"""LoRA (Hu et al. 2022): h = W x + (alpha / r) B A x, with W frozen, A random and B zero, trained to say the right label word.

The adapters are peft's. They start as the identity (B = 0) and can be merged into W without changing an answer beyond rounding.
"""

from pydantic import Field

from llmft.errors import UserError
from llmft.method import Range
from llmft.methods.pattern import PatternBased, PatternSettings


class LoraSettings(PatternSettings):
    r: int = Field(8, ge=1)
    alpha: int = Field(8, ge=1)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] = ()  # names of linear layers; empty: peft's choice for the architecture (query and value)


class Lora(PatternBased):
    Settings = LoraSettings
    train_defaults = {"learning_rate": 2e-4}
    search = {"learning_rate": Range(1e-5, 1e-2, log=True)}
    paper = "Hu et al. 2022"

    def prepare(self, model, n_labels, generator):
        import torch
        from peft import LoraConfig, inject_adapter_in_model

        settings = self.settings
        config = LoraConfig(
            r=settings.r,
            lora_alpha=settings.alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=list(settings.targets) or None,
        )
        if config.target_modules is None:
            from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

            architecture = model.network.config.model_type
            if architecture not in KNOWN:
                raise UserError(
                    f"method 'lora': peft names no targets for {architecture!r} models. Set settings.targets, e.g. [q_proj, v_proj]."
                )
            config.target_modules = set(KNOWN[architecture])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
            try:
                inject_adapter_in_model(config, model.network)
            except ValueError:  # what peft raises where no layer has one of the names, or one that it cannot adapt
                linear = sorted(
                    {
                        name.split(".")[-1]
                        for name, module in model.network.named_modules()
                        if isinstance(module, torch.nn.Linear)
                    }
                )
                raise UserError(
                    f"method 'lora': settings.targets {list(settings.targets)} does not name linear layers of this model. "
                    f"Layers: {', '.join(linear)}."
                ) from None
        model.network.requires_grad_(False)
        for name, parameter in model.network.named_parameters():
            parameter.requires_grad_("lora_" in name)


METHOD = Lora
