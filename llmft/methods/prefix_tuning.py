"""Prefix tuning (Li & Liang 2021): k trained keys and values in every layer, which every token of the prompt attends to.

No weight is changed, and no token goes through the network for them. `reparametrise` computes them, as the paper does, from one
embedding a place by a network of two layers with a tanh between (peft's), which training needs and the saved prefix does not:
keys and values take its place at the end. Without it they begin near zero, N(0, 0.02). An attention that has more to look at is
another one even then: there is no identity to begin with. Text begins at position k.

Gradient checkpointing is refused: transformers drops the cache that holds the prefix where it is on.
"""

from pydantic import Field

from llmft.errors import UserError
from llmft.method import Range
from llmft.methods.prompt_tuning import SoftPromptMethod, SoftPromptSettings

INIT_STD = 0.02


class PrefixSettings(SoftPromptSettings):
    reparametrise: bool = False
    encoder_width: int = Field(512, ge=1)


class PrefixTuning(SoftPromptMethod):
    Settings = PrefixSettings
    train_defaults = {"learning_rate": 1e-2}
    search = {"learning_rate": Range(1e-4, 1.0, log=True)}
    paper = "Li & Liang 2021"

    def read(self, spec, tokenizer, words):
        if spec.train.gradient_checkpointing:
            raise UserError(
                "train.gradient_checkpointing: 'prefix_tuning' cannot have it, since transformers drops the keys and values that are "
                "learned. Set it to false, or use prompt_tuning."
            )

    def prepare(self, model, n_labels, generator):
        import torch
        from peft import PrefixEncoder, PrefixTuningConfig

        from llmft.soft_prompt import EncodedPrompt, SoftPrompt, trained_alone

        settings, (n_layers, n_heads, size) = self.settings, cache_shape(model.network.config)
        if settings.reparametrise:
            config = PrefixTuningConfig(
                num_virtual_tokens=settings.n_virtual_tokens, token_dim=n_heads * size, num_layers=n_layers,
                encoder_hidden_size=settings.encoder_width, prefix_projection=True,
            )  # fmt: skip
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
                prompt = EncodedPrompt(PrefixEncoder(config), settings.n_virtual_tokens)
        else:
            vectors = torch.empty(settings.n_virtual_tokens, n_layers * 2 * n_heads * size)
            prompt = SoftPrompt(vectors.normal_(0, INIT_STD, generator=generator))
        trained_alone(model, prompt)

    def begin(self, adapted, batches):
        wanted = cache_shape(adapted.network.config)
        layers = adapted("prefix", (0,)).layers
        found = (len(layers), *layers[0][0].shape[1::2])
        if found != wanted:
            raise UserError(
                f"method 'prefix_tuning': {adapted.network.config.model_type!r} models keep keys of (layers, heads, size) {found}, and "
                f"their configuration says {wanted}. Use prompt_tuning."
            )

    def condition(self, model, batch):
        from llmft.batches import Prefix, with_prefix
        from llmft.model import HALF

        n_layers, n_heads, size = cache_shape(model.network.config)
        vectors = self.soft_prompt(model).to(HALF.get(model.precision))  # [virtual tokens, layers x 2 x heads x size]
        pairs = vectors.view(len(vectors), n_layers, 2, n_heads, size).permute(1, 2, 3, 0, 4)  # [layers, 2, heads, tokens, size]
        return with_prefix(batch, Prefix(tuple((keys[None], values[None]) for keys, values in pairs), len(vectors)))

    def virtual_tokens(self, model, tokenizer):
        return []  # keys and values are no embeddings

    def peft_adapter(self, model):
        from peft import PrefixTuningConfig

        vectors, (n_layers, n_heads, size) = self.soft_prompt(model).detach(), cache_shape(model.network.config)
        config = PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=len(vectors), token_dim=n_heads * size, num_layers=n_layers,
            num_attention_heads=n_heads, inference_mode=True,
        )  # fmt: skip
        return config, {"prompt_embeddings": vectors}


def cache_shape(config) -> tuple[int, int, int]:
    """(layers, heads, size): how many keys of which size the model keeps for each token."""
    n_heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or n_heads, size


METHOD = PrefixTuning
