"""QLoRA (Dettmers et al. 2023): LoRA on every linear layer but the head, over a base whose linear layers are held in 4 bits (NF4).

The base is quantised by bitsandbytes (`pip install 'llmft[qlora]'`) in blocks of 64, the blocks' scales quantised again, and
computes in bf16; adapters, norms and embeddings stay fp32. Of the paper's training the settings here differ in the optimiser, which
is AdamW unless the plan says `train: {optimizer: adamw_8bit}`, and in gradient checkpointing, off unless it is asked for.
bitsandbytes computes on CPUs too, unpacking every matrix in every pass: right for small models and tests, slow for others. Several
processes for one trial are refused.
"""

from typing import Literal

from pydantic import Field

from llmft.methods.lora import Lora, LoraSettings


class QLoraSettings(LoraSettings):
    r: int = Field(64, ge=1, description="rank: the inner width of B A")
    alpha: int = Field(16, ge=1, description="B A is scaled by alpha / r")
    targets: Literal["all-linear"] | tuple[str, ...] = Field("all-linear", description="as of lora")


class QLora(Lora):
    Settings = QLoraSettings
    base_weights = "nf4"
    train_defaults = {"learning_rate": 2e-4, "warmup_ratio": 0.03, "clip_norm": 0.3}
    paper = "Dettmers et al. 2023"


METHOD = QLora
