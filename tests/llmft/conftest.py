from __future__ import annotations

import pyarrow.parquet as parquet
import pytest
import torch
from support.small_models import ENCODER_DECODERS, byte_level_tokenizer, save_model, t5_tokenizer, toy_text

from llmft.config.spec import DataRef, GenerationSpec, ModelRef, TaskRef, TrainSpec, TrialSpec
from llmft.methods._registry import complete_settings, method_class
from llmft.models.info import resolve_model
from llmft.tasks._registry import load_task

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def rte(data_dir) -> DataRef:
    return load_task("rte").resolve_data(data_dir)


@pytest.fixture(scope="session")
def tokenizer():
    return byte_level_tokenizer(toy_text())


@pytest.fixture(scope="session")
def small_opt(tmp_path_factory, tokenizer) -> ModelRef:
    """Two layers, 32 wide, for the toy language."""
    return resolve_model(save_model(tmp_path_factory.mktemp("models") / "small-opt", "opt", tokenizer, std=0.2))


@pytest.fixture(scope="session")
def rte_tokenizer(data_dir):
    rows = parquet.read_table(f"{data_dir}/rte_train.parquet").to_pylist()
    text = [f"{row['sentence1']} question: {row['sentence2']} Yes or No? answer: Yes No ?\n\n" for row in rows]
    return byte_level_tokenizer(text, vocabulary_size=8000)


@pytest.fixture(scope="session")
def rte_opt(tmp_path_factory, rte_tokenizer) -> ModelRef:
    """Two layers, 64 wide, 2048 positions: 16 real demonstrations fit."""
    folder = tmp_path_factory.mktemp("models") / "rte-opt"
    return resolve_model(save_model(folder, "opt", rte_tokenizer, width=64, n_positions=2048, std=0.2))


@pytest.fixture(scope="session")
def wide_opt(tmp_path_factory, tokenizer) -> ModelRef:
    """The same, 64 wide: the least that can be held in 4 bits."""
    return resolve_model(save_model(tmp_path_factory.mktemp("models") / "wide-opt", "opt", tokenizer, width=64, std=0.2))


@pytest.fixture(scope="session")
def refs(tmp_path_factory):
    """Small models with an encoder, by family."""
    folder, t5 = tmp_path_factory.mktemp("models"), t5_tokenizer(toy_text())
    tokenizers = {"t5": t5, "flan": t5, "bart": byte_level_tokenizer(toy_text(), template="<s> $A </s>")}
    return {
        family: resolve_model(save_model(folder / family, architecture, tokenizers[family], **changed))
        for family, (architecture, changed) in ENCODER_DECODERS.items()
    }


@pytest.fixture(scope="session")
def spec_of(small_opt, wide_opt):
    """A short trial on the toy task; keywords change the spec, those of TrainSpec its training."""

    def make(method: str = "zero_shot", settings: dict | None = None, **changed) -> TrialSpec:
        train = {name: changed.pop(name) for name in list(changed) if name in TrainSpec.model_fields}
        train = TrainSpec(**{"learning_rate": 1e-3, "epochs": 2, "batch_size": 8} | train)
        model = small_opt if method_class(method).base_weights == "fp32" else wide_opt
        usual = {"model": model, "task": "toy", "n_shots": 16, "n_dev": 8, "n_test": 16}
        if "classification" not in method_class(method).kinds:
            usual |= {"task": "toy_text", "generation": GenerationSpec(max_new_tokens=5)}
        if method == "sequence_distillation":  # a small random model never ends
            settings = {"n_unlabelled": 16, "keep_unfinished": True, **(settings or {})}
        if method == "multi_task":
            other = "toy" if changed.get("task") == "toy_text" else "toy_text"
            usual["mixture"] = {other: TaskRef(data=load_task(other).resolve_data(None))}
            settings = {"n_examples": 16, **(settings or {})}
        if method == "rationale_tuning":
            settings = {"max_rationale_tokens": 8, **(settings or {})}
        return TrialSpec(method=method, settings=complete_settings(method, settings or {}), train=train, **usual | changed)

    return make
