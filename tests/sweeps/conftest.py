import os
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])  # for Ray's workers
os.environ["HF_HUB_OFFLINE"] = "1"

SMALL = """
name: small
models: [{model}]
tasks: [toy]
n_shots: [2, 4]
methods:
  zero_shot:
  in_context: {{n_shots: [2]}}
  lora: {{search: {{r: {{choices: [2, 4]}}}}}}
train: {{epochs: 2}}
search: {{n_trials: 4, seeds: [100, 101], round_size: 2}}
report: {{seeds: [0, 1, 2]}}
n_dev: 4
n_test: 8
"""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder with a random OPT of two layers: loads like any model, and is trained in a moment."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    from llmft.config.spec import DataRef
    from llmft.tasks._registry import load_task

    folder = tmp_path_factory.mktemp("models") / "tiny"
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = [" ".join([*example.fields.values(), "? Yes No"]) for example in load_task("toy").load(DataRef()).pool]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(text, trainers.BpeTrainer(vocab_size=500, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", bos_token="</s>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    OPTForCausalLM(
        OPTConfig(vocab_size=len(tokenizer), max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=1, **shape)
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def plan_file(tmp_path):
    """Writes a plan and gives its path; `changes` replace text of the small plan."""

    def write(*changes: tuple[str, str], model: str = "fake") -> Path:
        text = SMALL.format(model=model)
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "plan.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def small_cells(plan_file):
    """The small plan and its cells, on a model and data that do not exist."""
    from support.fakes import fake_data, fake_model

    from sweeps.planning.expand import build_cells
    from sweeps.planning.loader import load_plan

    def build(*changes: tuple[str, str]):
        plan, where = load_plan(str(plan_file(*changes)))
        return plan, build_cells(plan, where, fake_model, fake_data)

    return build
