from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from llmft.data.table_files import located_rows, read_rows
from llmft.errors import UserError

ROWS = [{"text": 'say "it", twice', "label": "0"}, {"text": "l'été\tchaud 中\nand more", "label": "1"}]


def written(tmp_path, name: str, content: str | bytes):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


CSV = 'text,label\n"say ""it"", twice",0\n"l\'été\tchaud 中\nand more",1\n'


@pytest.mark.parametrize(
    "content",
    [CSV, "\ufeff" + CSV, CSV.replace(",0\n", ",0\r\n").replace(",1\n", ",1\r\n").replace("label\n", "label\r\n"), CSV + "\n", CSV[:-1]],
    ids=["plain", "byte order mark", "CRLF", "an empty line", "no last line end"],
)
def test_csv_however_it_was_saved(tmp_path, content):
    assert read_rows(written(tmp_path, "a.csv", content)) == ROWS


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_as_a_list_or_in_lines(tmp_path, name):
    rows = [{"text": "a", "label": 1, "more": [1, None]}, {"text": "b", "label": True}]
    lines = "".join(json.dumps(row) + "\r\n" for row in rows)
    assert read_rows(written(tmp_path, name, "\ufeff" + lines)) == rows
    if name == "a.json":
        assert read_rows(written(tmp_path, name, json.dumps(rows, indent=1))) == rows


def test_parquet_keeps_its_types(tmp_path):
    rows = [{"text": "a", "label": 1.0}, {"text": "b", "label": 0.0}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == rows


def test_numbers_in_text_files_stay_text(tmp_path):
    assert read_rows(written(tmp_path, "a.csv", "text,label\n1984,01\n,1.0\n")) == [
        {"text": "1984", "label": "01"}, {"text": "", "label": "1.0"}
    ]  # fmt: skip


def test_quotes_are_characters_in_txt_and_without_a_header(tmp_path):
    line = 'a\t"It" is\n'
    assert read_rows(written(tmp_path, "a.txt", "id\ttext\n" + line)) == [{"id": "a", "text": '"It" is'}]
    assert read_rows(written(tmp_path, "a.tsv", line), ("id", "text")) == [{"id": "a", "text": '"It" is'}]


def test_a_cell_may_hold_a_document(tmp_path):
    text = "word " * 60_000
    assert read_rows(written(tmp_path, "a.csv", f"text\n{text}\n")) == [{"text": text}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("a.csv", "a,b\n1,2\n1,2,3\n", "a.csv, line 3: cannot be read (3 cells where there are 2 columns)"),
     ("a.csv", "a,b\n1\n", "line 2: cannot be read (1 cells where there are 2 columns)"),
     ("a.csv", 'a\n"open\n', "a.csv, line 2: cannot be read (unexpected end of data)"),
     ("a.csv", "", "it is empty"),
     ("a.csv", "a,b,a\n1,2,3\n", "the header names the column 'a' twice"),
     ("a.csv", "a\nb\nétat\n".encode("latin-1"), "a.csv, line 3: is not in UTF-8 (byte 0xe9)"),
     ("a.jsonl", '{"a": 1}\n{"a": \n', "a.jsonl, line 2: cannot be read"),
     ("a.jsonl", '{"a": 1}\n[1]\n', "a.jsonl, line 2: is no object with named values (got list)"),
     ("a.json", '[{"a": 1}, 3]', "a.json, row 2: is no object with named values (got int)"),
     ("a.json", "[", "cannot be read"),
     ("a.xlsx", "x", "is no kind of file that holds rows. Kinds: .csv")],
)  # fmt: skip
def test_a_file_that_is_not_what_it_should_be(tmp_path, name, content, said):
    with pytest.raises(UserError) as raised:
        read_rows(written(tmp_path, name, content))
    assert said in str(raised.value) and str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [("a.csv", 'a,b\r\n1,"two\r\nlines"\r\n\r\n3,4\r\n', ["line 2", "line 5"]), ("a.tsv", "a\tb\n1\t2\n3\t4\n", ["line 2", "line 3"]),
     ("a.jsonl", '{"a": 1}\n\n{"a": 2}\n', ["line 1", "line 3"]), ("a.json", '[{"a": 1},\n{"a": 2}]', ["row 1", "row 2"])],
)  # fmt: skip
def test_a_row_knows_its_line_in_an_editor(tmp_path, name, content, places):
    assert [place for place, _ in located_rows(written(tmp_path, name, content))] == places


def test_a_file_that_is_not_there(tmp_path):
    for name in ("a.csv", "a.json"):
        with pytest.raises(UserError, match="No such file"):
            read_rows(tmp_path / name)
