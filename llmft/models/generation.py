"""Generated text: transformers' `generate` on a batch of queries, and what is read from the tokens that it gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmft.models.batches import QueryBatch
from llmft.models.loading import LoadedModel
from llmft.models.scoring import encoder_outputs, text_inputs
from llmft.prompting import Decoding
from llmft.seeds import derive


def end_tokens(model: LoadedModel, decoding: Decoding) -> list[int]:
    """The tokens that end a text: the tokenizer's, and those with which the model was published."""
    published = model.network.generation_config.eos_token_id
    published = [published] if isinstance(published, int) else published or []
    return sorted({*published, decoding.tokenizer.eos_token_id} - {None})


@torch.no_grad()
def generate(model: LoadedModel, batch: QueryBatch, decoding: Decoding) -> torch.Tensor:
    """The tokens that follow each query, [queries, new tokens]; behind an output's end anything may stand.

    Each query's answer is the one that it would get alone: padding is masked and takes no position, and what is drawn for a query
    does not hang on the others.
    """
    spec, n_beams = decoding.spec, decoding.spec.num_beams
    inputs, n_given = _decoder_inputs(model, batch) if batch.decoder_input_ids is not None else _inputs(model, batch, n_beams)
    ends = end_tokens(model, decoding)
    pad = decoding.tokenizer.pad_token_id
    with _own_defaults(model.network):
        output = model.network.generate(
            **inputs,
            generation_config=GenerationConfig(
                max_new_tokens=spec.max_new_tokens,
                num_beams=n_beams,
                do_sample=False,
                eos_token_id=ends or None,
                pad_token_id=ends[0] if pad is None else pad,
                decoder_start_token_id=getattr(model.network.config, "decoder_start_token_id", None),
            ),
            logits_processor=_draws(batch, decoding),
            stopping_criteria=StoppingCriteriaList([_Stop(decoding, n_given)] if decoding.stop else []),
            synced_gpus=dist.is_initialized() and dist.get_world_size() > 1,  # FSDP gathers weights in all processes at once
        )
    return output[:, n_given:]


def _inputs(model: LoadedModel, batch: QueryBatch, n_beams: int) -> tuple[dict[str, Any], int]:
    """What a causal model goes on from, and how many tokens of it the output repeats."""
    start = batch.prefix.length if batch.prefix else 0
    opening, mask = batch.attention_mask[:, :start], batch.attention_mask[:, start:]
    length = mask.shape[1]
    n_pads = length - mask.sum(1, keepdim=True)
    places = (torch.arange(length, device=model.device) - n_pads) % length  # [queries, length], padding moved to the left
    inputs, n_given = text_inputs(model, batch), 0
    if "input_ids" in inputs:
        ids = torch.cat([torch.zeros_like(opening), batch.input_ids.gather(1, places)], 1)  # of the prefix only the length is read
        inputs, n_given = {"input_ids": ids}, ids.shape[1]  # which the output repeats
    else:
        embedded = inputs["inputs_embeds"]
        inputs = {"inputs_embeds": embedded.gather(1, places[..., None].expand_as(embedded))}
    inputs["attention_mask"] = torch.cat([opening, mask.gather(1, places)], 1)
    inputs["past_key_values"] = batch.prefix.cache(len(batch) * n_beams) if batch.prefix else None
    return inputs, n_given


def _decoder_inputs(model: LoadedModel, batch: QueryBatch) -> tuple[dict[str, Any], int]:
    """What a decoder of its own goes on from, and how many tokens of it the output repeats; all rows begin alike."""
    start = batch.decoder_input_ids
    inputs = {"encoder_outputs": encoder_outputs(model, batch), "attention_mask": batch.attention_mask, "decoder_input_ids": start}
    return inputs, start.shape[1]


@contextmanager
def _own_defaults(network: torch.nn.Module) -> Iterator[None]:
    """Without the settings that a model was published with (sampling, penalties), which `generate` would mix in."""
    published, network.generation_config = network.generation_config, GenerationConfig()
    try:
        yield
    finally:
        network.generation_config = published


def _draws(batch: QueryBatch, decoding: Decoding) -> LogitsProcessorList:
    spec = decoding.spec
    if not spec.temperature:
        return LogitsProcessorList()
    chain: list[LogitsProcessor] = [TemperatureLogitsWarper(spec.temperature)]
    if spec.top_k:
        chain.append(TopKLogitsWarper(spec.top_k))
    if spec.top_p < 1:
        chain.append(TopPLogitsWarper(spec.top_p))
    return LogitsProcessorList([*chain, _Gumbel(decoding.seed, batch.indices)])


class _Gumbel(LogitsProcessor):
    """Makes the most probable token a drawn one: argmax(log p + Gumbel noise) is distributed as p (Maddison et al. 2014).

    `generate` itself draws for a whole batch from one stream. Here each query has its own.
    """

    def __init__(self, seed: int, indices: torch.Tensor):
        self.generators = [torch.Generator(indices.device).manual_seed(derive(seed, f"query/{index}")) for index in indices.tolist()]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()


class _Stop(StoppingCriteria):
    """Ends an output whose text holds one of `Decoding.stop`. transformers' own would also see what the prompt ends with."""

    def __init__(self, decoding: Decoding, start: int):
        self.decoding, self.start = decoding, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        texts = self.decoding.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        done = [any(stop in text for stop in self.decoding.stop) for text in texts]
        return torch.tensor(done, device=input_ids.device)
