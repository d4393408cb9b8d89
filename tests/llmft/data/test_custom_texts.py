"""Custom tasks that generate text: their rows, formats and digests."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from pydantic import ValidationError
from support.custom_task_files import load_completed, parse_task, replace_text, text_task
from support.small_models import CPU

from llmft.config.spec import GenerationSpec, TrialSpec
from llmft.data.custom import TableTask, complete
from llmft.errors import UserError
from llmft.trial.preparation import encode_prompts, prepare_trial
from llmft.trial.run import run_trial

PAIRS = [{"question": f"Who is {i}?", "answers": [f"Doctor {i}", f"Nurse {i}"], "hint": "a guess" if i % 2 else ""} for i in range(30)]
ALPACA_ROWS = [{"instruction": f"Say {i}.", "input": "" if i % 2 else f"in word {i}", "output": f"number {i}"} for i in range(30)]


@pytest.fixture
def texts(tmp_path):
    """pairs.jsonl and pairs_test.parquet with lists of references, alpaca.jsonl, alpaca_test.csv, lamini.jsonl without inputs."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    parquet.write_table(
        pa.Table.from_pylist([row | {"question": f"And {row['question']}"} for row in PAIRS]), tmp_path / "pairs_test.parquet"
    )
    (tmp_path / "alpaca.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ALPACA_ROWS))
    lines = ["instruction,input,output", *(f"Now say {i}.,{'' if i % 2 else i},number {i}" for i in range(20))]
    (tmp_path / "alpaca_test.csv").write_text("\n".join(lines))
    lamini = [{"instruction": row["instruction"], "response": row["output"]} for row in ALPACA_ROWS]
    (tmp_path / "lamini.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lamini))
    return tmp_path


def alpaca(folder, **changed) -> dict:
    """All that one writes."""
    written = {
        "name": "mine",
        "kind": "generation",
        "format": "alpaca",
        "train": f"{folder}/alpaca.jsonl",
        "test": f"{folder}/alpaca_test.csv",
    }
    return {name: value for name, value in (written | changed).items() if value is not None}


def test_pairs_of_prompt_and_completion_with_any_columns(texts):
    task, data, _ = load_completed(parse_task(text_task(texts)))
    assert (task.kind, task.labels, task.metric, task.generation.max_new_tokens) == ("generation", (), "token_f1", 6)
    first = data.pool[0]
    assert (first.id, dict(first.fields), first.label, first.references) == (
        "train/0",
        {"prompt": "Who is 0?"},
        None,
        ("Doctor 0", "Nurse 0"),
    )
    assert task.patterns["plain"].render(first.fields) == "Who is 0?\nAnswer:"
    assert data.tests[0].examples[3].references == ("Doctor 3", "Nurse 3")


def test_alpacas_files_need_no_columns_and_no_pattern(texts):
    task, data, _ = load_completed(parse_task(alpaca(texts)))
    (pattern,) = task.patterns.values()
    with_input, without = data.pool[0], data.pool[1]
    assert pattern.render(with_input.fields) == (  # PROMPT_DICT of stanford_alpaca's train.py
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay 0.\n\n### Input:\nin word 0\n\n### Response:"
    )
    assert pattern.render(without.fields) == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay 1.\n\n### Response:"
    )
    assert pattern.render_labelled(without.fields, without.references[0]).endswith("### Response: number 1")
    assert pattern.render(data.tests[0].examples[1].fields).endswith("### Instruction:\nNow say 1.\n\n### Response:")
    assert task.generation.max_new_tokens == 256


def test_what_a_format_stands_for_can_be_said_otherwise(texts):
    given = alpaca(
        texts, train=f"{texts}/lamini.jsonl", references="response", metric="rouge1", test={"in_domain": f"{texts}/lamini.jsonl"}
    )
    with pytest.raises(ValidationError, match="is also the training pool"):
        parse_task(given)
    (texts / "lamini_test.jsonl").write_text((texts / "lamini.jsonl").read_text().replace("Say", "Tell"))
    task, data, _ = load_completed(parse_task(given | {"test": f"{texts}/lamini_test.jsonl", "patterns": {"short": "{instruction}"}}))
    assert list(task.patterns) == ["alpaca", "short"] and task.metric == "rouge1"
    assert data.pool[2].fields == {"instruction": "Say 2.", "input": ""} and data.pool[2].references == ("number 2",)


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [("pairs.jsonl", '["Doctor 4", "Nurse 4"]', "[]", "pairs.jsonl, line 5, column 'answers': the references [] must be texts"),
     ("pairs.jsonl", '["Doctor 4", "Nurse 4"]', '["a", " "]', "line 5, column 'answers': the references ['a', ' '] must be texts"),
     ("pairs.jsonl", '["Doctor 4", "Nurse 4"]', "4", "line 5, column 'answers': the references 4 must be texts"),
     ("pairs.jsonl", '"Who is 4?"', '""', "pairs.jsonl, line 5: column 'question' holds no text"),
     ("pairs.jsonl", '"answers"', '"answer"', "pairs.jsonl, line 1: there is no column 'answers'")],
)  # fmt: skip
def test_a_wrong_row_of_texts_is_named_with_its_file(texts, file, old, new, said):
    replace_text(texts / file, old, new)
    with pytest.raises(UserError) as raised:
        load_completed(parse_task(text_task(texts)))
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_rows_without_a_reference_are_left_out_where_one_says_so(texts):
    replace_text(texts / "alpaca.jsonl", '"output": "number 4"', '"output": " "')
    with pytest.raises(UserError, match="alpaca.jsonl, line 5, column 'output': the references .* must be texts"):
        load_completed(parse_task(alpaca(texts)))
    _, data, _ = load_completed(parse_task(alpaca(texts, drop_empty=True)))
    assert [example.id for example in data.pool] == [f"train/{i}" for i in range(30) if i != 4]


@pytest.fixture
def text_spec(spec_of):
    def make(content: dict, method: str = "pattern", **fields) -> TrialSpec:
        definition = parse_task(content)
        data = TableTask(definition).resolve_data()
        completed = complete(definition, data)
        usual = {"task": "mine", "definition": completed, "data": data, "n_shots": 4, "n_dev": 2, "n_test": 3, "epochs": 1}
        generation = GenerationSpec(max_new_tokens=3)
        return spec_of(method, **usual | {"pattern": next(iter(completed.patterns)), "generation": generation} | fields)

    return make


def test_instruction_tuning_raises_the_response_alone(texts, text_spec):
    spec = TrialSpec.model_validate_json(text_spec(alpaca(texts)).model_dump_json())  # as a worker or a record has it
    setting = prepare_trial(spec)
    encoded = encode_prompts(spec, setting)
    tokenizer = setting.decoding.tokenizer
    for shot, suffix, completion in zip(setting.draw.shots, encoded.sets["shots"].suffixes, encoded.sets["shots"].completions, strict=True):
        assert tokenizer.decode(completion) == f" {shot.references[0]}</s>"
        assert tokenizer.decode([*encoded.prefix, *suffix]).endswith("### Response:")
    record = run_trial(spec, CPU).record
    assert record.finished, record.message
    assert record.metrics["last"]["mine"].metric == "rougeL" and record.spec == spec


def test_the_digest_of_a_task_of_texts_is_of_what_counts(texts, text_spec):
    base = text_spec(text_task(texts)).digest
    assert text_spec(text_task(texts, patterns={"plain": "{prompt}\nAnswer:", "other": "{prompt}"}, label="unused")).digest == base
    other = [{"metric": "rouge1"}, {"patterns": {"plain": "{prompt}"}}, {"references": "question"}]
    assert len({text_spec(text_task(texts, **changed)).digest for changed in other} | {base}) == len(other) + 1
