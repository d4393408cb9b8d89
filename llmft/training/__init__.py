"""The training loop, optimizers, checkpoints and the weight anchor."""

from llmft.training.checkpoints import Checkpoint, TrainingResult
from llmft.training.loop import train
from llmft.training.optimizers import check_blocks, check_optimizer, state_bytes
from llmft.training.weight_anchor import sum_of_squares

__all__ = ["Checkpoint", "TrainingResult", "check_blocks", "check_optimizer", "state_bytes", "sum_of_squares", "train"]
