from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pytest
from support.synthetic import HEURISTICS, prediction_rows, set_metrics

import analysis
from analysis.frames.columns import COLUMNS
from analysis.frames.predictions import open_predictions
from llmft.errors import Cause, UserError
from llmft.records.record import Finding
from llmft.records.record_files import RecordError


def test_declared_columns_come_first_with_their_types(full_store):
    frame = analysis.load(full_store.root)
    names = [column.name for column in COLUMNS]
    assert list(frame.columns[: len(names)]) == names
    assert {column.name: str(frame[column.name].dtype) for column in COLUMNS} == {column.name: column.dtype for column in COLUMNS}
    assert set(map(str, frame.dtypes.iloc[len(names) :])) == {"float64"}


def test_types_do_not_depend_on_the_content(store):
    store.add(failed=Cause.LOST)
    frame = analysis.load(store.root)
    assert [str(dtype) for dtype in frame.dtypes] == [column.dtype for column in COLUMNS]


def test_one_row_for_each_selection(store):
    store.add(0, accuracy=0.6, out_accuracy=0.5)
    store.add(0, "in_context")
    frame = analysis.load(store.root).set_index(["method", "selection"])
    assert list(frame.loc["fine_tuning"].index) == ["last", "best_dev"]
    assert list(frame.loc["in_context"].index) == ["none"]
    row = frame.loc[("fine_tuning", "best_dev")]
    assert (row["in_domain_set"], row["out_of_domain_set"]) == ("rte", "hans")
    assert row["in_domain_accuracy"] == row["rte_accuracy"] == 0.6
    assert row["gap"] == pytest.approx(0.1)
    assert row["in_domain_majority"] == 0.527
    assert row["hans_heuristic_lexical_overlap_accuracy"] == pytest.approx(0.4)
    assert row["n_shots"] == 16 and row["learning_rate"] == 1e-5 and row["wall_s"] == 10
    assert frame.loc[("fine_tuning", "last"), "rte_accuracy"] == pytest.approx(0.58)


def test_the_headline_sets_are_the_first_of_their_domain(store):
    sets = {"paws": set_metrics(0.4, "out"), "rte": set_metrics(0.7), "hans": set_metrics(0.5, "out"), "mnli": set_metrics(0.6)}
    store.add(sets=sets)
    row = analysis.load(store.root).iloc[0]
    assert (row["in_domain_set"], row["out_of_domain_set"]) == ("rte", "paws")
    assert json.loads(row["sets"])["mnli"] == {"domain": "in", "n": 277, "groups": {"label": ["entailment", "not_entailment"]}}


def test_a_set_named_like_a_headline_column_does_not_disturb_it(store):
    store.add(sets={"first": set_metrics(0.7), "in_domain": set_metrics(0.2), "out_of_domain": set_metrics(0.5, "out")})
    row = analysis.load(store.root).set_index("selection").loc["best_dev"]
    assert (row["in_domain_set"], row["in_domain_accuracy"], row["out_of_domain_accuracy"]) == ("first", 0.7, 0.5)


def test_missing_sets_are_missing(store):
    store.add(out_accuracy=None)
    frame = analysis.load(store.root)
    assert frame["out_of_domain_accuracy"].isna().all() and frame["gap"].isna().all() and frame["in_domain_accuracy"].notna().all()


def test_findings_go_with_their_selection(store):
    of_last = Finding(code="constant_prediction", severity="warning", message="m", set="hans", selection="last")
    of_trial = Finding(code="no_improvement", severity="note", message="m")
    store.add(findings=[of_last, of_trial, of_trial])
    frame = analysis.load(store.root).set_index("selection")
    assert frame.loc["last", "findings"] == "constant_prediction@hans;no_improvement"
    assert frame.loc["best_dev", "findings"] == "no_improvement"
    assert frame["n_warnings"].to_dict() == {"last": 1, "best_dev": 0}
    assert json.loads(frame.loc["last", "finding_details"])[0]["set"] == "hans"


def test_a_teacher_is_told_round_by_round(store):
    taught = {"model": "toy", "dev_score": 0.75, "zero_shot_dev_score": 0.5}
    rounds = [{"dev_score": 0.75, "n_asked": 40, "n_trusted": 40}, {"dev_score": 0.8, "n_asked": 40, "n_trusted": 30}]
    for seed, teacher in enumerate([taught, taught | {"rounds": rounds[:1]}, taught | {"rounds": rounds}, None]):
        record = store.add(seed, "context_distillation", selections=("last",))
        path = store.folder(record) / "record.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"teacher": teacher}))  # the first as it was before there were rounds
    frame = analysis.load(store.root).set_index("data_seed").sort_index()
    columns = frame[["teacher_dev_score", "teacher_last_dev_score", "teacher_trusted_share"]]
    assert columns.iloc[:3].fillna(-1).values.tolist() == [[0.75, -1, -1], [0.75, 0.75, 1.0], [0.75, 0.8, 0.75]]
    assert columns.iloc[3].isna().all()


def test_a_failure_is_a_row(store):
    store.add(failed=Cause.OUT_OF_MEMORY, message="needs 90 GB")
    frame = analysis.load(store.root)
    row = frame.iloc[0]
    assert len(frame) == 1
    assert (row["status"], row["cause"], row["message"], row["selection"]) == ("failed", "out_of_memory", "needs 90 GB", "none")
    assert np.isnan(row["in_domain_accuracy"]) and row["method"] == "fine_tuning"


def test_a_finished_trial_without_numbers_is_a_row(store):
    store.add(sets={}, selections=())
    assert analysis.load(store.root)[["status", "selection"]].to_numpy().tolist() == [["finished", "none"]]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"schema_version": 1, "dig', "not a readable record"),
        (b"\xff\xfe", "not a readable record"),
        (b"[]", "not a readable record"),
        (b'{"schema_version": 99}', "newer"),
        (b'{"schema_version": "one"}', ""),
    ],
)
def test_an_unreadable_record_is_a_row_that_says_why(store, content, expected):
    good, bad = store.add(0), store.add(1)
    (store.folder(bad) / "record.json").write_bytes(content)
    frame = analysis.load(store.root).set_index("digest")
    assert frame.loc[bad.digest, "status"] == "unreadable" and expected in frame.loc[bad.digest, "message"]
    assert (frame.loc[[good.digest], "status"] == "finished").all()


def test_a_metric_that_is_not_a_number_does_not_lose_the_trial(store):
    store.add(sets={"rte": set_metrics(0.5, mcc=float("nan"))})
    frame = analysis.load(store.root)
    assert len(frame) and (frame["in_domain_mcc"].isna()).all()


def test_half_written_trials_do_not_count(store):
    store.add()
    (store.root / "trials" / "abcdef").mkdir()
    (store.root / "trials" / "abcdef" / ".record.json.12.tmp").write_text("{")
    assert analysis.load(store.root)["digest"].nunique() == 1


def test_a_folder_without_results_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no trial records"):
        analysis.load(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        analysis.load(tmp_path / "nowhere")


def test_stages_come_from_the_manifest(store):
    report, search, other = (store.add(seed).digest for seed in range(3))
    assert set(analysis.load(store.root)["stage"]) == {"report"}
    (store.root / "sweep.json").write_text(json.dumps({"plan_name": "p", "report": [report], "search": [search], "choices": []}))
    stages = analysis.load(store.root).groupby("digest")["stage"].first().to_dict()
    assert stages == {report: "report", search: "search", other: "other"}


@pytest.mark.parametrize("content", [b"{", b'{"report": 3}', b"[]", b""])
def test_a_damaged_manifest_is_one_clear_line(store, content):
    store.add()
    (store.root / "sweep.json").write_bytes(content)
    with pytest.raises(UserError, match=r"sweep\.json: not a readable manifest .*Run the plan again") as error:
        analysis.load(store.root)
    assert "\n" not in str(error.value)


def test_predictions_are_read_lazily_and_know_their_trial(store):
    first, second = (store.add(seed, predictions=prediction_rows()) for seed in range(2))
    of_one = open_predictions(store.root, first.digest)
    table = of_one.to_table(columns=["id", "digest"], filter=pc.field("set") == "hans").to_pandas()
    assert len(table) == 20 and set(table["digest"]) == {first.digest}
    assert set(open_predictions(store.root).to_table().to_pandas()["digest"]) == {first.digest, second.digest}
    row = of_one.head(1).to_pylist()[0]
    assert np.exp(row["label_log_probabilities"]).sum() == pytest.approx(1)


def test_truncated_predictions_are_an_error_that_names_the_file(store):
    record = store.add(predictions=prediction_rows())
    path = store.folder(record) / "predictions.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RecordError, match=r"predictions\.parquet: truncated or changed"):
        open_predictions(store.root, record.digest)
    path.unlink()
    with pytest.raises(RecordError, match=r"predictions\.parquet: No such file"):
        open_predictions(store.root, record.digest)


def test_predictions_of_no_trial(store):
    failed = store.add(failed=Cause.CRASHED)
    with pytest.raises(UserError, match="no trial 'beef'"):
        open_predictions(store.root, "beef")
    with pytest.raises(UserError, match="failed trials leave none"):
        open_predictions(store.root, failed.digest)


def test_the_frame_survives_csv(full_store, tmp_path):
    frame = analysis.load(full_store.root)
    frame.to_csv(tmp_path / "frame.csv", index=False)
    read = pd.read_csv(tmp_path / "frame.csv")
    assert read["hans_heuristic_subsequence_accuracy"].notna().sum() == frame["hans_heuristic_subsequence_accuracy"].notna().sum() > 0
    assert all(f"hans_heuristic_{name}_accuracy" in read for name in HEURISTICS)
