from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

import analysis
from llmft.errors import Cause
from llmft.record import Finding

EVIL = "<script>alert(1)</script>&\"'$x^{$"


class Text(HTMLParser):
    """The elements of a page, and its text outside scripts and styles."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text, self.attributes = [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        if self.tags[-1:] not in (["script"], ["style"]):
            self.text += data


def manifest(store, **content) -> None:
    digests = sorted(path.name for path in (store.root / "trials").iterdir())
    (store.root / "sweep.json").write_text(
        json.dumps({"plan_name": "RTE and HANS", "report": digests, "search": [], **content})
    )


CHOICES = [
    {
        "cell": {"model": "opt-125m", "task": "rte", "method": name, "n_shots": n},
        "params": {"learning_rate": 3e-5, "epochs": 20}, "dev_score": 0.64, "n_search_trials": 16,
    }
    for name in ("fine_tuning", "lora", "bitfit")
    for n in (16, 128)
]  # fmt: skip


def test_the_report_holds_everything(full_store):
    manifest(full_store, choices=CHOICES)
    (full_store.root / "plan.yaml").write_text("task: rte  # <the plan>")
    path = analysis.write_report(full_store.root)
    assert path == full_store.root / "report" / "report.html"
    page = Text(path.read_text())
    for text in ("RTE and HANS", "In domain (rte)", "majority class", "lexical overlap", "loss became NaN at step 12", "learning_rate = 3e-05",
                 "packages.torch", "2.9.0", "constant prediction on hans", "64.0", "zero_shot", "task: rte  # <the plan>"):  # fmt: skip
        assert text in page.text, text
    assert page.tags.count("svg") > 9 and "table" in page.tags
    assert sorted(str(each.relative_to(path.parent)) for each in path.parent.rglob("*.*")) == [
        "figures/scatter.svg", "report.html", "tables/comparison.csv", "tables/comparison.md", "tables/groups.csv",
    ]  # fmt: skip
    assert (
        len(analysis.load(full_store.root)) == len(list(full_store.root.glob("trials/*"))) * 2 - 14
    )  # the report is no record


def test_the_report_is_self_contained_and_reproducible(full_store, tmp_path):
    first = analysis.write_report(full_store.root, tmp_path / "a")
    second = analysis.write_report(full_store.root, tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    page = Text(first.read_text())
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "action") and value]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "@import" not in first.read_text() and not re.search(r"url\((?!#)", first.read_text())


def test_everything_from_records_is_escaped(store):
    finding = Finding(code=f"code{EVIL}", severity="warning", message=EVIL, set="rte")
    for seed in range(2):
        store.add(seed, model=EVIL, pattern=EVIL, verbalizer=EVIL, findings=[finding], provenance={EVIL: EVIL})
    store.add(2, model=EVIL, failed=Cause.CRASHED, message=EVIL)
    manifest(store, plan_name=EVIL, choices=[{"cell": {"model": EVIL, EVIL: 1}, "params": {EVIL: EVIL}, "n_search_trials": 1}])
    page = analysis.write_report(store.root).read_text()
    assert "<script>alert" not in page and page.count("<script>") == 1
    assert Text(page).tags.count("script") == 1
    assert EVIL in Text(page).text
    ElementTree.fromstring(analysis.scatter(analysis.load(store.root)))


def test_the_figure_is_deterministic_and_names_its_parts(full_store):
    frame = analysis.load(full_store.root)
    svg = analysis.scatter(frame)
    assert svg == analysis.scatter(analysis.load(full_store.root)) and svg.startswith("<svg")
    root = ElementTree.fromstring(svg)
    texts = {"".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"fine_tuning", "lora", "16 shots", "128 shots", "majority class", "opt-125m on rte"} <= texts
    assert "date" not in svg.lower()
    n_points = len(analysis.select(frame).dropna(subset=["in_domain_accuracy"]))
    assert svg.count("<use ") >= n_points


@pytest.mark.parametrize("case", ["one_seed", "all_failed", "no_out_of_domain", "search_only", "unreadable", "no_result"])
def test_thin_results_give_a_report(store, case):
    record = store.add(
        failed=Cause.LOST if case == "all_failed" else None,
        out_accuracy=None if case == "no_out_of_domain" else 0.5,
        **{"sets": {}, "selections": ()} if case == "no_result" else {},
    )
    if case == "search_only":
        manifest(store, report=[], search=[record.digest])
    if case == "unreadable":
        (store.folder(record) / "record.json").write_text("{")
    text = Text(analysis.write_report(store.root).read_text()).text
    expected = {
        "one_seed": "no method beats the majority class",
        "all_failed": "1 trial left no number",
        "no_out_of_domain": "No trial has both",
        "search_only": "No report trials to compare yet",
        "unreadable": "1 unreadable",
        "no_result": "there is no result",
    }
    assert expected[case] in text
    assert "nan" not in re.sub(r"[a-z]+nan|nan[a-z]+", "", text.lower())


def answer(store) -> analysis.Answer:
    (only,) = analysis.headline(analysis.compare(analysis.load(store.root)))
    return only


def test_the_headline_is_sure_only_when_the_intervals_part(store):
    for seed in range(6):
        wobble = 0.01 * (seed % 3)
        store.add(seed, "fine_tuning", 0.70 + wobble, 0.56 + 5 * wobble)
        store.add(seed, "lora", 0.60 + wobble, 0.55 + 5 * wobble)
    only = answer(store)
    assert only.in_domain_sure and "fine_tuning is best at 16 shots: 71.0 % (70.1 to 71.9), ahead of lora" in only.in_domain
    assert (
        not only.out_of_domain_sure
        and "one cannot tell" in only.out_of_domain
        and "the intervals overlap" in only.out_of_domain
    )


def test_the_headline_does_not_judge_by_one_seed(store):
    store.add(0, "fine_tuning", 0.9, 0.9), store.add(0, "lora", 0.6, 0.6)
    assert not answer(store).in_domain_sure and "a single seed has no interval" in answer(store).in_domain


def test_the_headline_says_when_nothing_beats_the_majority(store):
    for seed in range(3):
        store.add(seed, accuracy=0.47, out_accuracy=0.5 + 0.001 * seed)
    only = answer(store)
    assert "no method beats the majority class (52.7 %)" in only.in_domain
    assert not only.out_of_domain_sure


def test_the_headline_is_not_sure_of_a_suspicious_number(store):
    finding = Finding(code="constant_prediction", severity="warning", message="m", set="hans")
    for seed in range(6):
        store.add(seed, "fine_tuning", 0.7 + 0.001 * seed, 0.8, findings=[finding])
        store.add(seed, "lora", 0.6, 0.6 + 0.001 * seed)
    only = answer(store)
    assert only.in_domain_sure
    assert not only.out_of_domain_sure
    assert "warning: constant prediction on hans in 6 of 6 trials." in only.out_of_domain


def test_the_headline_compares_at_the_same_shots(store):
    for seed in range(3):
        store.add(seed, "fine_tuning", 0.6 + 0.001 * seed), store.add(seed, "in_context", 0.65 + 0.001 * seed)
        store.add(seed, "fine_tuning", 0.9 + 0.001 * seed, n_shots=1024)
    assert "in_context is best at 16 shots" in answer(store).in_domain


chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(chromium is None, reason="no Chromium on PATH to open the report with")
def test_a_browser_opens_the_report_and_sorts_the_table(full_store, tmp_path):
    path = analysis.write_report(full_store.root)
    probe = """<script>
    addEventListener("load", () => {
      const table = document.querySelector("table.sortable"), column = 5;
      const read = () => [...table.tBodies[0].rows].map(row => Number(row.cells[column].dataset.order));
      const click = () => table.tHead.rows[0].cells[column].querySelector("button").click();
      click(); const up = read(); click(); const down = read();
      document.body.dataset.probe = JSON.stringify({up, down, wide: document.documentElement.scrollWidth - innerWidth});
    });</script>"""
    page = tmp_path / "probe.html"
    page.write_text(path.read_text().replace("</body>", probe + "</body>"))
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
               "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--window-size=700,900",
               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    probed = json.loads(dict(Text(done.stdout).attributes)["data-probe"])
    assert (
        probed["up"] == sorted(probed["up"])
        and probed["down"] == sorted(probed["up"], reverse=True)
        and len(probed["up"]) == 10
    )
    assert probed["wide"] <= 0  # a narrow window scrolls the table, not the page
