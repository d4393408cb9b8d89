"""The training loop, optimizers, checkpoints and the weight anchor."""

from llmft.training.checkpoints import Checkpoint, TrainingResult
from llmft.training.loop import train
from llmft.training.optimizers import check_blocks, check_optimizer, state_bytes

__all__ = ["Checkpoint", "TrainingResult", "check_blocks", "check_optimizer", "state_bytes", "train"]
