from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from support.synthetic import Store, fill, prediction_rows

import analysis
from analysis.figures.results import scatter
from analysis.report.build import FIGURES
from analysis.tables.details import command_table
from llmft.errors import Cause
from llmft.records.record import Finding

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
    (store.root / "sweep.json").write_text(json.dumps({"plan_name": "RTE and HANS", "report": digests, "search": [], **content}))


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
    for text in ("RTE and HANS", "In domain (rte)", "majority class", "Lexical overlap", "loss became NaN at step 12",
                 "learning_rate = 3e-05",
                 "packages.torch", "2.9.0", "constant prediction on hans", "64.0", "zero_shot", "task: rte  # <the plan>",
                 "llmft trial --task rte --method bitfit", "Behind the best", "hans, by label"):  # fmt: skip
        assert text in page.text, text
    assert page.tags.count("svg") > 9 and "table" in page.tags
    tables = (
        "budget.csv",
        "comparison.csv",
        "comparison.md",
        "comparison.tex",
        "comparison_narrow.tex",
        "contrasts.csv",
        "costs.csv",
        "examples.csv",
        "groups.csv",
        "seed_variance.csv",
    )
    assert sorted(str(each.relative_to(path.parent)) for each in path.parent.rglob("*.*")) == sorted(
        [*(f"figures/{name}.svg" for name in FIGURES), "report.html", *(f"tables/{name}" for name in tables)]
    )
    assert path.stat().st_size < 5_000_000
    assert len(analysis.load(full_store.root)) == len(list(full_store.root.glob("trials/*"))) * 2 - 14  # the report is no record


def test_each_cell_names_its_first_trial_and_the_command_for_it(store):
    digests = {(name, seed): store.add(seed, name).digest for name in ("lora", "fine_tuning") for seed in (1, 0)}
    table = command_table(analysis.load(store.root))
    rows = {row["method"]: row for row in (dict(zip(table.headers, cells, strict=True)) for cells in table.rows)}
    assert {name: row["digest of the first"] for name, row in rows.items()} == {name: digests[name, 0] for name in rows}
    assert rows["lora"]["its command"].startswith("llmft trial --task rte --method lora")
    assert rows["fine_tuning"]["its command"] == "–"  # no method of this llmft


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
    ElementTree.fromstring(scatter(analysis.load(store.root)))


def test_the_figure_is_deterministic_and_names_its_parts(full_store):
    frame = analysis.load(full_store.root)
    svg = scatter(frame)
    assert svg == scatter(analysis.load(full_store.root)) and svg.startswith("<svg")
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
        "one_seed": "no method is shown to beat the majority class (52.7",
        "all_failed": "1 trial left no number",
        "no_out_of_domain": "No trial has both",
        "search_only": "No report trials to compare yet",
        "unreadable": "1 unreadable",
        "no_result": "there is no result",
    }
    assert expected[case] in text
    assert "nan" not in re.sub(r"[a-z]+nan|nan[a-z]+", "", text.lower())


def test_seeds_that_vary_apart_are_told_apart(store):
    for data_seed in range(4):
        for init_seed in range(3):
            seeds = {"data_seed": data_seed, "order_seed": data_seed, "init_seed": init_seed, "dropout_seed": init_seed}
            store.add(0, "lora", 0.6, 0.5 + 0.03 * data_seed + 0.001 * init_seed, seeds=seeds)
    table = analysis.seed_variance(analysis.load(store.root)).set_index("component")
    assert set(table.index) == {"data+order", "init+dropout", "residual"}
    assert table["variance"].to_dict() == pytest.approx(
        {"data+order": np.var([0, 0.03, 0.06, 0.09], ddof=1), "init+dropout": 1e-6, "residual": 0}, abs=1e-9
    )
    text = Text(analysis.write_report(store.root).read_text()).text
    assert "Where the spread comes from" in text and "data, order" in text


chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


PROBE = """<script>
const errors = [];
addEventListener("error", event => errors.push(String(event.message)));
addEventListener("securitypolicyviolation", event => errors.push(event.violatedDirective));
addEventListener("load", () => {
  const table = document.querySelector("table.comparison"), column = 5;
  const shown = () => [...table.tBodies[0].rows].filter(row => !row.hidden);
  const read = () => shown().map(row => Number(row.cells[column].dataset.order));
  const click = table => table.tHead.rows[0].cells[column].querySelector("button").click();
  click(table); const up = read(); click(table); const down = read();
  const input = document.querySelector("#comparison .filter input");
  input.value = "LORA 16"; input.dispatchEvent(new Event("input"));
  const filtered = shown().map(row => row.cells[0].textContent), note = document.querySelector("#comparison output").textContent;
  input.value = ""; input.dispatchEvent(new Event("input"));
  const figures = [...document.querySelectorAll("figure")].map(each => {
    const box = each.querySelector("svg").getBoundingClientRect();
    return [each.id, box.width > 100 && box.height > 20, each.checkVisibility()];
  });
  const cut = [...document.querySelectorAll("figure svg text")].filter(text => {
    const inner = text.getBoundingClientRect(), outer = text.ownerSVGElement.getBoundingClientRect();
    return inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.top < outer.top - 1 || inner.bottom > outer.bottom + 1;
  }).map(text => text.textContent);
  const rank = document.querySelector("table.groups"), behind = 3;
  rank.tHead.rows[0].cells[behind].querySelector("button").click();
  const ranked = [...rank.tBodies[0].rows].map(row => row.cells[behind].textContent);
  const colour = getComputedStyle(document.body).backgroundColor;
  document.body.dataset.probe = JSON.stringify({up, down, filtered, note, all: shown().length, figures, cut, ranked, colour, errors,
    wide: document.documentElement.scrollWidth - innerWidth});
});</script>"""


@pytest.fixture(scope="module")
def probed_page(tmp_path_factory):
    """A report with a script in it that uses it, as a file."""
    folder = tmp_path_factory.mktemp("probed")
    path = analysis.write_report(fill(Store(folder / "results")).root)
    page = folder / "probe.html"
    page.write_text(path.read_text().replace("</head>", PROBE + "</head>"))
    return page


@pytest.mark.skipif(chromium is None, reason="no Chromium on PATH to open the report with")
@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (500, "dark")])
def test_a_browser_opens_the_report_sorts_and_filters(probed_page, tmp_path, width, scheme):
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
               "--disable-component-update", "--disable-sync", "--enable-logging=stderr", f"--window-size={width},900",
               f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom", probed_page.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    probed = json.loads(dict(Text(done.stdout).attributes)["data-probe"])
    assert probed["errors"] == []
    assert probed["up"] == sorted(probed["up"]) and probed["down"] == sorted(probed["up"], reverse=True) and len(probed["up"]) == 10
    assert probed["filtered"] == ["lora"] and probed["note"] == "1 of 10 rows" and probed["all"] == 10
    assert [name for name, *_ in probed["figures"]] == [f"figure-{name}" for name in FIGURES]
    assert all(size and visible for _, size, visible in probed["figures"])
    assert probed["cut"] == []  # texts of a figure that do not fit into it
    numbers = [float(text.split(" ")[0].replace("−", "-")) for text in probed["ranked"] if text != "–"]
    assert numbers == sorted(numbers) and probed["ranked"][-1] == "–"
    assert probed["colour"] == ("rgb(22, 24, 27)" if scheme == "dark" else "rgb(253, 253, 251)")
    assert probed["wide"] <= 0  # a narrow window scrolls the table, not the page


@pytest.mark.long
def test_two_thousand_trials_fit_into_five_megabytes(store):
    random = np.random.default_rng(0)
    for model in ("opt-125m", "opt-1.3b"):
        for i in range(20):
            for n_shots in (2, 16, 32, 64, 128):
                for seed in range(10):
                    inside, outside = random.uniform(0.5, 0.7, 2)
                    store.add(seed, f"method_{i}", inside, outside, n_shots=n_shots, model=model, predictions=prediction_rows())
    path = analysis.write_report(store.root)
    assert path.stat().st_size < 5_000_000
