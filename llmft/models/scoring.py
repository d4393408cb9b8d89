"""Scores are read off the logits at the answer's place; nothing is decoded or searched in text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from llmft.data import NO_LABEL
from llmft.models.batches import QueryBatch
from llmft.models.loading import LoadedModel
from llmft.models.prefix_attention import shared_attention
from llmft.prompting import LabelWords


@dataclass(frozen=True)
class Scores:
    """What a method says about a batch.

    Attributes:
        labels: [queries, labels]; the log-probability of each label word among all words (summed over its tokens), or the logits of
            a classification head. A softmax over them is the restricted rule.
        full_vocab: [queries], the label whose word is the most probable of the whole vocabulary, NO_LABEL where another token is;
            None with a classification head.
    """

    labels: torch.Tensor
    full_vocab: torch.Tensor | None = None


def _run(model: LoadedModel, module: torch.nn.Module, batch: QueryBatch) -> Any:
    """What `module`, the network or its base, says about the rows of a batch."""
    given, prefix = text_inputs(model, batch) | {"position_ids": batch.position_ids}, batch.prefix
    if prefix is None:
        return module(**given, attention_mask=batch.attention_mask, use_cache=False)
    if prefix.is_shared:
        with shared_attention(model.network, prefix) as cache:
            mask = batch.attention_mask[:, prefix.length :]
            return module(**given, attention_mask=mask, past_key_values=cache, use_cache=True)
    cache = prefix.cache(batch.n_rows)
    return module(**given, attention_mask=batch.attention_mask, past_key_values=cache, use_cache=True)


def text_inputs(model: LoadedModel, batch: QueryBatch) -> dict[str, torch.Tensor]:
    """What a network reads of a batch behind the prefix: token ids, or embeddings where a soft prompt opens them."""
    if batch.soft_prompt is None:
        return {"input_ids": batch.input_ids}
    embedded = model.network.get_input_embeddings()(batch.input_ids)
    opening = batch.soft_prompt.to(embedded.dtype).expand(embedded.shape[0], -1, -1)
    return {"inputs_embeds": torch.cat([opening, embedded], 1)}  # [rows, soft prompt + length, embedding width]


def encoder_outputs(model: LoadedModel, batch: QueryBatch):
    """What the encoder makes of each query; its `last_hidden_state` is [queries, length, width]."""
    return model.network.get_encoder()(**text_inputs(model, batch), attention_mask=batch.attention_mask)


def _encode(model: LoadedModel, batch: QueryBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The encoder's states and their mask for each of the decoder's rows, [rows, length, width] and [rows, length]."""
    encoded = encoder_outputs(model, batch).last_hidden_state
    n_each = batch.n_rows // len(batch)
    return encoded.repeat_interleave(n_each, 0), batch.attention_mask.repeat_interleave(n_each, 0)


def hidden_states(model: LoadedModel, batch: QueryBatch) -> torch.Tensor:
    """The last layer's states (a decoder's, where there is one of its own), [rows, length, width]."""
    if batch.decoder_input_ids is None:
        return _run(model, model.network.base_model, batch).last_hidden_state
    encoded, mask = _encode(model, batch)
    decoder = model.network.get_decoder()
    return decoder(
        input_ids=batch.decoder_input_ids, encoder_hidden_states=encoded, encoder_attention_mask=mask, use_cache=False
    ).last_hidden_state


def _own_logits(model: LoadedModel, batch: QueryBatch) -> torch.Tensor:
    """The logits of the network's own forward, [rows, length, vocabulary]."""
    if batch.decoder_input_ids is None:
        return _run(model, model.network, batch).logits
    from transformers.modeling_outputs import BaseModelOutput

    encoded, mask = _encode(model, batch)
    outputs = BaseModelOutput(last_hidden_state=encoded)
    return model.network(encoder_outputs=outputs, attention_mask=mask, decoder_input_ids=batch.decoder_input_ids, use_cache=False).logits


def answer_hidden(model: LoadedModel, batch: QueryBatch) -> torch.Tensor:
    """The state from which each query's answer is said, [queries, width]: at the right-most real token, or a decoder's first."""
    rows = torch.arange(len(batch), device=model.device) * (batch.n_rows // len(batch))
    return hidden_states(model, batch)[rows, batch.answer_at[rows]]


def _logits_at(model: LoadedModel, batch: QueryBatch):
    """A function from (rows, places) to full-vocabulary logits; only what is asked for is projected."""
    if model.plain_head:
        hidden, head = hidden_states(model, batch), model.network.get_output_embeddings()
        return lambda rows, places: head(hidden[rows, places])
    logits = _own_logits(model, batch)
    return lambda rows, places: logits[rows, places]


def answer_logits(model: LoadedModel, batch: QueryBatch) -> torch.Tensor:
    """Return the logits wherever a label word may go on, [queries, `LabelWords.continuation_prefixes`, vocabulary]."""
    logits_at, words = _logits_at(model, batch), batch.label_words
    rows, places = torch.arange(batch.n_rows, device=model.device).view(len(batch), -1), []
    for beginning in words.continuation_prefixes:
        longer = (i for i, ids in enumerate(words.ids) if len(ids) > len(beginning) and ids[: len(beginning)] == beginning)
        mine = rows[:, 0 if words.single else next(longer)]
        places.append(logits_at(mine, batch.answer_at[mine] + len(beginning)))
    return torch.stack(places, 1)[..., : words.n_known].float()


def word_log_probabilities(log_probabilities: torch.Tensor, words: LabelWords) -> torch.Tensor:
    """The log-probability of every label word, summed over its tokens, [queries, labels].

    Args:
        log_probabilities: of all words at the places of `answer_logits`, [queries, places, vocabulary].
    """
    place = {beginning: i for i, beginning in enumerate(words.continuation_prefixes)}
    return torch.stack([sum(log_probabilities[:, place[ids[:step]], ids[step]] for step in range(len(ids))) for ids in words.ids], 1)


def all_logits(model: LoadedModel, batch: QueryBatch) -> torch.Tensor:
    """The logits of every word at every place of the rows (a decoder's, where there is one of its own), [rows, length, words], for what
    must be read beyond the answer."""
    read = batch.input_ids if batch.decoder_input_ids is None else batch.decoder_input_ids
    return _own_logits(model, batch)[:, -read.shape[1] :]


def label_word_scores(model: LoadedModel, batch: QueryBatch) -> Scores:
    """The log-probability of every label word after every query, and which word is the best of all."""
    logits_at, words, n = _logits_at(model, batch), batch.label_words, len(batch)
    rows = torch.arange(batch.n_rows, device=model.device)
    if words.single:
        logits = logits_at(rows, batch.answer_at).float()  # [queries, vocabulary]
        ids = torch.tensor([word[0] for word in words.ids], device=model.device)
        is_best = logits.argmax(-1, keepdim=True) == ids  # [queries, labels]
        return Scores(logits.log_softmax(-1)[:, ids], _best_label(is_best))
    scores, is_best = [], []
    for label, word in enumerate(words.ids):
        mine = rows.view(n, -1)[:, label]
        total, agrees = 0.0, torch.ones(n, dtype=torch.bool, device=model.device)
        for step, token in enumerate(word):
            logits = logits_at(mine, batch.answer_at[mine] + step).float()
            total = total + logits.log_softmax(-1)[:, token]
            agrees &= logits.argmax(-1) == token
        scores.append(total)
        is_best.append(agrees)
    return Scores(torch.stack(scores, 1), _best_label(torch.stack(is_best, 1)))


def completion_loss(model: LoadedModel, batch: QueryBatch) -> torch.Tensor:
    """The negative log-likelihood of a completion's tokens, in nats: the mean over its tokens, then over the examples.

    So each example counts alike, however long its reference is, and however the batch is cut into forward passes.
    """
    import torch.nn.functional as F

    lengths, device = batch.completion_lengths, model.device
    rows = torch.tensor([row for row, n in enumerate(lengths) for _ in range(n)], device=device)
    steps = torch.tensor([step for n in lengths for step in range(n)], device=device)
    weights = torch.tensor([1.0 / (n * len(batch)) for n in lengths for _ in range(n)], device=device)
    logits = _logits_at(model, batch)(rows, batch.answer_at[rows] + steps).float()  # [tokens, vocabulary]
    return F.cross_entropy(logits, batch.completions, reduction="none") @ weights


def next_token_log_probabilities(model: LoadedModel, batch: QueryBatch) -> torch.Tensor:
    """What the model expects behind every query: log-probabilities of all words, [queries, vocabulary]."""
    rows = torch.arange(len(batch), device=model.device) * (batch.n_rows // len(batch))
    return _logits_at(model, batch)(rows, batch.answer_at[rows]).float().log_softmax(-1)


def _best_label(is_best: torch.Tensor) -> torch.Tensor:
    """[queries, labels] of claims -> [queries] of labels, NO_LABEL where none holds."""
    return torch.where(is_best.any(1), is_best.int().argmax(1), NO_LABEL)
