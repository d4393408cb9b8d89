"""Load, batch, shard and run language models: scores of label words, and generated text."""

from llmft.models.adapted import AdaptedModel
from llmft.models.architectures import DROPOUT, find_blocks, find_sublayers, is_norm, language_model, names_in
from llmft.models.batch_planning import (
    batch_by_tokens,
    largest_training_step,
    query_budget,
    shard_batches,
    smaller_budget,
    split_for_training,
)
from llmft.models.batches import Prefix, QueryBatch, encode_prefix, make_batch, scoring_budget, with_prefix, with_soft_prompt
from llmft.models.generation import end_tokens, generate
from llmft.models.info import ModelInfo, read_model_info, resolve_model
from llmft.models.loading import HALF, LoadedModel, borrow_model, check_bitsandbytes, load_config, load_tokenizer, n_parameters
from llmft.models.parallel import distributed_runtime, is_lost_peer, is_sharded, shard_of, whole
from llmft.models.prefix_attention import encode_shared
from llmft.models.scoring import (
    Scores,
    all_logits,
    answer_hidden,
    answer_logits,
    completion_loss,
    label_word_scores,
    next_token_log_probabilities,
    word_log_probabilities,
)

__all__ = [
    "AdaptedModel", "DROPOUT", "HALF", "LoadedModel", "ModelInfo", "Prefix", "QueryBatch", "Scores", "all_logits", "answer_hidden",
    "answer_logits", "batch_by_tokens", "borrow_model", "check_bitsandbytes", "completion_loss", "distributed_runtime", "encode_prefix",
    "encode_shared", "end_tokens", "find_blocks", "find_sublayers", "generate", "is_lost_peer", "is_norm", "is_sharded",
    "label_word_scores", "language_model", "largest_training_step", "load_config", "load_tokenizer", "make_batch", "n_parameters",
    "names_in", "next_token_log_probabilities", "query_budget", "read_model_info", "resolve_model", "scoring_budget", "shard_batches",
    "shard_of", "smaller_budget", "split_for_training", "whole", "with_prefix", "with_soft_prompt", "word_log_probabilities",
]  # fmt: skip
