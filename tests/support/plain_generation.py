"""Generation with plain transformers, one full prompt at a time."""

from __future__ import annotations

import torch
from transformers import GenerationConfig

from llmft.models.loading import borrow_model
from llmft.trial.preparation import prepare_trial


def plain_generate(spec, prompts: list[str], **settings) -> list[str]:
    """transformers' own `generate`, one prompt at a time."""
    decoding, texts = prepare_trial(spec).decoding, []
    with borrow_model(spec.model, "fp32", torch.device("cpu")) as model:
        for prompt in prompts:
            inputs = decoding.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
            config = GenerationConfig(max_new_tokens=spec.generation.max_new_tokens, eos_token_id=2, pad_token_id=1, **settings)
            ids = model.network.generate(**inputs, generation_config=config)[0, inputs["input_ids"].shape[1] :]
            texts.append(decoding.tokenizer.decode(ids, skip_special_tokens=True).strip())
    return texts
