"""What a trial and a sweep leave behind, and how it is read and written: records, manifests, files, storage."""

from llmft.records.manifest import MANIFEST_FILE, Manifest, PlannedCell, SearchChoice, read_manifest
from llmft.records.record import (
    Change,
    Cost,
    CurvePoint,
    Draws,
    Evaluation,
    Finding,
    Measure,
    Mixed,
    SetMetrics,
    Teacher,
    TeacherRound,
    TrialRecord,
    VirtualToken,
)
from llmft.records.record_files import (
    EVALUATION_FILE,
    PREDICTIONS_FILE,
    RECORD_FILE,
    WEIGHTS_FILE,
    RecordError,
    read_evaluation,
    read_record,
    read_records,
    write_record,
)
from llmft.records.storage import StoragePath, UrlPath, may_pass, open_folder, read_many, reason, write_atomically

__all__ = [
    "Change", "Cost", "CurvePoint", "Draws", "EVALUATION_FILE", "Evaluation", "Finding", "MANIFEST_FILE", "Manifest", "Measure",
    "Mixed", "PREDICTIONS_FILE", "PlannedCell", "RECORD_FILE", "RecordError", "SearchChoice", "SetMetrics", "StoragePath", "Teacher",
    "TeacherRound", "TrialRecord", "UrlPath", "VirtualToken", "WEIGHTS_FILE", "may_pass", "open_folder", "read_evaluation",
    "read_manifest", "read_many", "read_record", "read_records", "reason", "write_atomically", "write_record",
]  # fmt: skip
