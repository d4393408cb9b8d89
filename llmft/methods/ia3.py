"""(IA)3 (Liu et al. 2022): keys, values and the inner activations of the feed-forward part are multiplied by learned vectors.

k * l_k, v * l_v and l_ff * f(W_1 x) in every block, each l beginning at 1: so the network begins exactly as it was. The layers are
peft's, their places ours: the ones peft has for OPT scale the query in place of the value. Where query, key and value are one
projection (GPT-2, GPT-NeoX, BLOOM, Falcon) its whole output is scaled, the query with it.
"""

from llmft.methods._base import SearchRange
from llmft.methods._types import Generator, LoadedModel, PeftConfig, Tensor
from llmft.methods.pattern import PatternBased


class IA3(PatternBased):
    train_defaults = {"learning_rate": 3e-3}
    search = {"learning_rate": SearchRange(3e-4, 1e-1, log=True)}
    paper = "Liu et al. 2022"

    def prepare(self, model: LoadedModel, n_labels: int, generator: Generator) -> None:
        from peft import IA3Config

        from llmft.methods.modules.peft_layers import insert_peft_layers, task_type
        from llmft.models import names_in

        names = names_in(model.network, "ia3")
        inner = {writes for _, writes in names.feed_forward}
        config = IA3Config(
            target_modules=sorted({names.key, names.value} | inner), feedforward_modules=sorted(inner), task_type=task_type(model.network)
        )
        insert_peft_layers(config, model.network, generator)

    def export(self, model: LoadedModel) -> tuple[PeftConfig, dict[str, Tensor]] | None:
        from llmft.methods.modules.peft_layers import peft_layers_of

        return peft_layers_of(model.network)


METHOD = IA3
