import json

import pytest
from support.fakes import fake_data, fake_model

from llmft.errors import UserError
from llmft.tasks._registry import load_task
from sweeps.execution.prefetch import Needs
from sweeps.planning.expand import build_cells
from sweeps.planning.loader import find_plan, load_plan, parse_plan, shipped_plans
from sweeps.planning.yaml_file import read_yaml
from sweeps.search.optuna_search import Search


def error_of(path):
    with pytest.raises(UserError) as caught:
        plan, where = load_plan(str(path))
        build_cells(plan, where, fake_model, fake_data)
    text = str(caught.value)
    assert "\n" not in text and "plan.yaml" in text
    return text


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("train:", "trian:", ["unknown key 'trian'", "Did you mean 'train'"]),
        ("round_size: 2", "rounds: 2", ["unknown key 'search.rounds'", "round_size"]),
        ("in_context: {", "in_context: {pattren: minimal, ", ["methods.in_context.pattren", "'pattern'"]),
        ("{choices: [2, 4]}", "{choices: [2, 4], hgih: 3}", ["methods.lora.search.r.hgih", "'high'"]),
        ("lora: {", "lora: {learning_rate: 1e-3, ", ["'methods.lora.learning_rate'. learning_rate belongs under 'methods.lora.train'."]),
        ("lora: {", "lora: {alpha: 2, ", ["unknown key 'methods.lora.alpha'. alpha belongs under 'methods.lora.settings'."]),
        ("n_dev: 4", "n_dev: 4\nbatch_size: 4", ["unknown key 'batch_size'. batch_size belongs under 'train'."]),
        ("n_dev: 4", "n_dev: 4\nmax_new_tokens: 4", ["unknown key 'max_new_tokens'. max_new_tokens belongs under 'generation'."]),
        ("name: small", "name: a/b", ["name", "pattern"]),
        ("models: [fake]", "models: [{name: fake, gpu: 1}]", ["unknown key 'models.0.gpu'", "'gpus'"]),
        ("models: [fake]", "models: [{name: fake, gpus: 2.5}]", ["models.0: gpus: 2.5 is neither", "use 2 or 3"]),
        ("models: [fake]", "models: [fake, {name: fake, gpus: 1}]", ["models names a value twice"]),
        ("models: [fake]", "models: [{name: fake, gpus: -1}]", ["models.0.gpus", "got -1"]),
        ("models: [fake]", "models: [{name: fake, workers: 0}]", ["models.0.workers", "got 0"]),
        ("models: [fake]", "models: [{name: fake, workers: 2, gpus: 4}]", ["workers: 2 contradicts gpus: 4", "remove workers"]),
        ("models: [fake]", "models: [{name: fake, workers: 2, gpus: 0.5}]", ["contradicts gpus: 0.5", "set gpus to 2"]),
        ("models: [fake]", "models: [{name: fake, parallel: fsdp}]", ["parallel: fsdp needs several processes", "gpus"]),
        ("models: [fake]", "models: [{name: fake, gpus: 1, parallel: ddp}]", ["parallel: ddp needs several processes"]),
        ("models: [fake]", "models: [{name: fake, gpus: 2, parallel: zero}]", ["models.0.parallel", "'ddp' or 'fsdp'"]),
        ("n_dev: 4", "n_dev: 4\ndevice_memory: 0", ["device_memory", "got 0"]),
        ("seeds: [100, 101]", "seeds: [2, 101]", ["search.seeds and report.seeds share [2]"]),
        ("seeds: [0, 1, 2]", "seeds: [0, 1, 1]", ["report.seeds", "twice"]),
        ("tasks: [toy]", "tasks: [toi]", ["unknown task 'toi'", "'toy'"]),
        ("lora:", "lara:", ["unknown method 'lara'", "'lora'"]),
        ("lora: {", "lora: {settings: {ranks: 3}, ", ["methods.lora", "ranks"]),
        ("r: {choices", "rr: {choices", ["methods.lora.search: unknown hyper-parameter 'rr'"]),
        ("{choices: [2, 4]}", "{choices: [2, four]}", ["methods.lora.search", "'four'"]),
        ("{choices: [2, 4]}", "{low: 2, high: 4}", ["methods.lora.search", "r"]),
        ("{choices: [2, 4]}", "{low: 4, high: 2}", ["methods.lora.search.r", "low must be a number below high"]),
        ("{choices: [2, 4]}", "{}", ["either low and high, or choices"]),
        ("lora: {", "lora: {settings: {r: 3}, ", ["methods.lora: r has a fixed value and a search range"]),
        ("{choices: [2, 4]}", "{choices: [2, 4, 2]}", ["methods.lora.search.r", "choices names a value twice"]),
        ("{choices: [2, 4]}", "{low: 2, high: 4, integer: true, levels: 3}", ["search.r: levels is not supported any more", "choices: ["]),
        ("{choices: [2, 4]}", "{choices: [2, 4], when: {alpha: 8}}", ["search.r: when is not supported any more", "two method entries"]),
        ("round_size: 2", "round_size: 2, sampler: cmaes", ["search.sampler: cmaes is not supported any more; use gp"]),
        ("round_size: 2", "round_size: 2, sampler: gird", ["search.sampler", "'gird'"]),
        ("round_size: 2", "round_size: 2, sampler: grid, n_trials: 3", ["stands here twice"]),
        ("n_trials: 4", "n_trials: 3, sampler: grid", ["methods.lora.search", "grid has 4 points; set n_trials to at least 4"]),
        ("round_size: 2", "prune: {rule: median, epochs: 3}", ["unknown key 'search.prune.epochs'", "min_epochs"]),
        ("round_size: 2", "prune: {min_epochs: 3}", ["search.prune.rule: is missing"]),
        ("search: {n_trials: 4", "generation: {}\n# search: {n_trials: 4", ["methods.lora.search gives ranges", "add search: {n_trials"]),
        ("lora: {", "lora: {teacher: fake, ", ["methods.lora.teacher: the method 'lora' learns from no teacher; remove the key"]),
        ("tasks: [toy]", "tasks: []", ["tasks: is empty; name at least one"]),
        ("tasks: [toy]", "tasks: toy", ["tasks: must be a list, as in [toy]"]),
        ("round_size: 2", "prune: {rule: hyperband}", ["search.prune.rule", "'median' or 'asha'"]),
        ("epochs: 2", "epoch: 2", ["train: unknown key 'epoch'", "'epochs'"]),
        ("epochs: 2", "r: 2", ["train: unknown key 'r'. r belongs under 'methods.lora.settings'."]),
        ("lora: {search", "lora: {settings: {learning_rate: 1e-3}, search", ["methods.lora", "learning_rate belongs under 'train'."]),
        ("lora: {search", "lora: {train: {alpha: 2}, search", ["lora.train", "alpha belongs under 'methods.lora.settings'."]),
        ("epochs: 2", "epochs: 0", ["train: epochs", "got 0"]),
        ("zero_shot:", "zero_shot: {n_shots: [2]}", ["uses no shots"]),
        ("zero_shot:", "zero_shot: {train: {epochs: 3}}", ["trains nothing"]),
        ("n_shots: [2, 4]", "n_shots: [0, 4]", ["at least 1"]),
        ("n_dev: 4", "n_dev: 0", ["n_dev above 0"]),
        ("n_dev: 4", "n_dev: 4\ndemonstrations: [a, b]", ["demonstrations names 2 examples; set n_shots to that (got 4)"]),
        ("n_dev: 4", "n_dev: 4\ndraw: random\nshots_unit: per_class", ["draw 'balanced'"]),
        ("n_dev: 4", "n_dev: 4\ntest_sets: [toy, hans]", ["test_sets: unknown test set 'hans'", "toy_hans"]),
        ("n_dev: 4", "n_dev: 4\ntest_sets: [rte]", ["test_sets: none is of the task 'toy'", "'rte'"]),
        ("seeds: [0, 1, 2]", "seeds: [0, 1, 2], vary: [data, draw]", ["report.vary.1", "'init'"]),
        ("tasks: [toy]", "tasks: [3]", ["tasks.0", "the name of a task, or a mapping"]),
        ("n_dev: 4", "n_dev: 4.5", ["n_dev", "4.5"]),
        (
            "zero_shot:",
            "zero_shot:\n  again: {method: zero_shot}",
            ["methods.again and methods.zero_shot describe the same trials"],
        ),
        ("n_test: 8", "n_test: 8\nn_test: 9", ["plan.yaml:15", "'n_test' stands here twice"]),
        ("n_test: 8", "n_test: [8", ["not readable as YAML"]),
    ],
)
def test_a_mistake_is_one_line_with_file_and_key(plan_file, old, new, said):
    text = error_of(plan_file((old, new)))
    for part in said:
        assert part in text


def test_files_that_are_no_plans(tmp_path):
    for name, content, said in [
        ("a.yaml", b"", "a.yaml: holds nothing in place of keys with values"),
        ("b.yaml", b"- x", "b.yaml: holds a list in place of keys with values"),
        ("c.yaml", b"\xff\xfe\x00", "UTF-8"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=said):
            load_plan(str(tmp_path / name))
    with pytest.raises(UserError, match="no such file"):
        load_plan(str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match="Did you mean 'quickstart'"):
        load_plan("quickstrat")


def test_numbers_are_read_as_people_mean_them(tmp_path):
    (tmp_path / "a.yaml").write_text("a: 1e-3\nb: 2E5\nc: 1.5e-4\nd: 12\ne: 2024-01-01\nf: e5\n")
    assert read_yaml(tmp_path / "a.yaml") == {"a": 1e-3, "b": 2e5, "c": 1.5e-4, "d": 12, "e": "2024-01-01", "f": "e5"}


@pytest.mark.parametrize("name", shipped_plans())
def test_shipped_plans_describe_trials(name):
    plan, where = load_plan(name)
    cells = build_cells(plan, where, fake_model, fake_data)
    assert plan.name == name and where == f"{name}.yaml" and find_plan(name).is_file()
    assert {cell.base.method for cell in cells} >= {"zero_shot", "in_context"}


def test_a_teacher_is_a_model_like_any_other(plan_file):
    def cells(entry: str):
        plan, where = load_plan(str(plan_file(("zero_shot:", f"context_distillation: {entry}"))))
        hub = lambda name, revision: fake_model(name, revision).model_copy(update={"path": None})  # noqa: E731
        return [cell for cell in build_cells(plan, where, hub, fake_data) if cell.base.teacher]

    for text, revision in (("large", "main"), ("{name: large, revision: v2}", "v2")):
        with_teacher = cells(f"{{teacher: {text}}}")
        assert {cell.base.method for cell in with_teacher} == {"context_distillation"}
        assert all(cell.search_base.teacher == cell.base.teacher for cell in with_teacher)
        assert [(model.name, model.revision) for model in Needs.of(with_teacher).models] == [("fake", "main"), ("large", revision)]
    assert cells("{teacher: fake}") == [] == cells(""), "the model itself"
    error = error_of(plan_file(("zero_shot:", "context_distillation: {teacher: {name: large, revisoin: v2}}")))
    assert "methods.context_distillation.teacher.revisoin" in error and "'revision'" in error


def test_overrides_stand_in_for_the_plans_own(plan_file):
    plan, _ = load_plan(str(plan_file()), models=("a", "b"), data_dir="/data")
    assert [entry.name for entry in plan.models] == ["a", "b"] and plan.data_dir == "/data"


def test_a_plan_written_out_is_the_same_plan(plan_file):
    plan, _ = load_plan(str(plan_file()))
    assert parse_plan(plan.model_dump(mode="json"), "copy") == plan


def test_later_sources_of_a_hyper_parameter_win(small_cells):
    def lora(*changes):
        return next(cell for cell in small_cells(*changes)[1] if cell.entry == "lora")

    from llmft.methods._registry import method_class

    default = method_class("lora").train_defaults["learning_rate"]
    assert lora().base.train.learning_rate == default
    assert lora().base.train.epochs == 2
    fixed = lora(("epochs: 2", "epochs: 2, learning_rate: 0.5"))
    assert fixed.base.train.learning_rate == 0.5 and set(fixed.ranges) == {"r"}  # what the plan fixes is not searched
    entry = lora(("epochs: 2", "epochs: 2, learning_rate: 0.5"), ("lora: {", "lora: {train: {learning_rate: 0.25, epochs: 3}, "))
    assert (entry.base.train.learning_rate, entry.base.train.epochs) == (0.25, 3)
    assert set(lora(("{choices: [2, 4]}", "null")).ranges) == {"learning_rate"}
    assert lora(("search: {n_trials: 4, seeds: [100, 101], round_size: 2}", "search: null")).search is None


def test_what_controls_a_training_is_fixed_searched_and_checked_as_any_other_field(small_cells, plan_file):
    lora = "lora: {search: {r: {choices: [2, 4]}}}"
    searched = "{layer_decay: {low: 0.4, high: 1}, patience: {choices: [null, 3]}, untie_embeddings: {choices: [false, true]}}"
    cell = small_cells((lora, f"pattern: {{search: {searched}}}"))[1][-1]
    assert set(cell.ranges) == {"layer_decay", "patience", "untie_embeddings", "learning_rate"}
    search = Search(cell.space, cell.search, cell.key, cell.defaults)
    assert cell.defaults | {"learning_rate": 0} == {"layer_decay": 1.0, "patience": None, "untie_embeddings": False, "learning_rate": 0}
    specs = [cell.search_spec(point, 100) for point in search.ask(0)]
    for point, spec in zip(search.ask(0), specs, strict=True):
        found = spec.train.layer_decay, spec.train.patience, spec.settings["untie_embeddings"]
        assert found == (point["layer_decay"], point["patience"], point["untie_embeddings"])
    plain, *others = (
        small_cells((lora, f"pattern: {entry}"), ("search: {n_trials: 4, seeds: [100, 101], round_size: 2}", "search: null"))[1][-1]
        for entry in ("", "{train: {patience: 2}}", "{train: {layer_decay: 0.5}}", "{settings: {untie_embeddings: true}}")
    )
    assert len({plain.key, *(other.key for other in others)}) == 4
    for old, new, said in (
        ("epochs: 2", "epochs: 2, layer_decay: 1.5", "layer_decay: must be less than or equal to 1 (got 1.5)"),
        ("epochs: 2", "epochs: 2, patience: 0", "patience: must be greater than or equal to 1 (got 0)"),
        ("r: {choices: [2, 4]}", "layer_decay: {low: 0, high: 1}", "greater than 0 (got 0"),
        ("lora: {", "lora: {patience: 2, ", "patience belongs under 'methods.lora.train'."),
    ):
        assert said in error_of(plan_file((old, new)))
    no_dev = [("n_dev: 4", "n_dev: 0\nselections: [last]"), ("search: {n_trials: 4, seeds: [100, 101], round_size: 2}", "search: null"),
              (lora, "lora: {train: {patience: 2}}")]  # fmt: skip
    assert "methods.lora: train.patience needs dev examples: set n_dev above 0" in error_of(plan_file(*no_dev))
    small_cells(*no_dev[:2], (lora, ""), ("epochs: 2", "epochs: 2, patience: 3"))  # nothing of this plan is trained


def test_cells_hold_what_their_method_needs_and_nothing_else(small_cells):
    _, cells = small_cells()
    by_entry = {cell.entry: cell for cell in cells}
    assert [(cell.entry, cell.base.n_shots) for cell in cells] == [
        ("zero_shot", 0),
        ("in_context", 2),
        ("lora", 2),
        ("lora", 4),
    ]
    assert by_entry["zero_shot"].report_seeds == (0,) and by_entry["in_context"].report_seeds == (0, 1, 2)
    assert by_entry["in_context"].search is None and by_entry["in_context"].base.train.epochs == 40  # the plan's training is not its own
    search = by_entry["lora"].search_spec({"learning_rate": 1e-3, "r": 2}, 100)
    assert search.test_sets == () and search.selections == ("best_dev",) and search.data_seed == search.init_seed == 100
    assert search.settings["r"] == 2 and search.train.learning_rate == 1e-3


def test_one_method_may_stand_twice(small_cells):
    _, cells = small_cells(("in_context: {n_shots: [2]}", "lora_16: {method: lora, settings: {r: 16}}"))
    assert {(cell.entry, cell.base.method, cell.base.settings.get("r")) for cell in cells} >= {
        ("lora_16", "lora", 16),
        ("lora", "lora", 8),
    }


def test_a_plan_that_an_earlier_version_wrote_out_is_read(plan_file):
    plan, _ = load_plan(str(plan_file()))
    content = plan.model_dump(mode="json")
    content["methods"]["lora"]["search"]["r"] |= {"levels": None, "when": {}}
    assert parse_plan(content, "results/plan.yaml") == plan


def test_a_plan_with_everything_about_the_search_written_out_is_the_same_plan(plan_file):
    plan, _ = load_plan(
        str(
            plan_file(
                ("{choices: [2, 4]}", "{low: 2, high: 8, integer: true}"),
                ("round_size: 2", "round_size: 2, sampler: grid, prune: {rule: asha, min_epochs: 1}"),
            )
        )
    )
    assert parse_plan(plan.model_dump(mode="json"), "copy") == plan and plan.search.prune.reduction_factor == 3


@pytest.mark.parametrize("name", shipped_plans())
def test_shipped_plans_go_together_with_the_data(name, task_data):
    plan, where = load_plan(name, data_dir=task_data)
    cells = build_cells(plan, where, fake_model)
    for cell in cells:
        task = load_task(cell.base.task, cell.base.definition)
        assert cell.base.pattern in task.patterns
        assert cell.base.test_sets is None or {task.in_domain, task.out_of_domain[0]} <= set(cell.base.test_sets)
    assert {cell.base.task for cell in cells} == set(plan.task_names)


def test_the_papers_settings():
    plan, where = load_plan("paper")
    cells = build_cells(plan, where, fake_model, fake_data)
    for cell in cells:
        train = cell.base.train
        assert (train.learning_rate, train.epochs, train.batch_size, train.warmup_ratio) == (1e-5, 40, 32, 0.1) and not cell.search
        assert cell.base.separator == r"\n\n" and cell.base.test_sets == tuple(
            name
            for name in ("rte", "mnli", "qqp", "hans", "paws_qqp")
            if name in load_task(cell.base.task).out_of_domain + (cell.base.task,)
        )
    assert {cell.base.n_shots for cell in cells if cell.entry == "pattern"} == {16, 32, 64, 128}
    ten = [cell.report_spec({}, seed) for cell in cells if cell.entry == "pattern" for seed in cell.report_seeds]
    assert len(ten) == 10 * 7 * 3 * 4 and {(spec.init_seed, spec.dropout_seed) for spec in ten} == {(0, 0)}
    assert {(spec.data_seed, spec.order_seed) for spec in ten} == {(seed, seed) for seed in range(10)}


def test_only_the_seeds_that_vary_differ(small_cells):
    def seeds_of(entry: str, vary: str) -> list[tuple[int, ...]]:
        _, cells = small_cells(("seeds: [0, 1, 2]", f"seeds: [3, 1, 2], vary: {vary}"))
        cell = next(cell for cell in cells if cell.entry == entry)
        specs = [cell.report_spec({}, seed) for seed in cell.report_seeds]
        return [(spec.data_seed, spec.order_seed, spec.init_seed, spec.dropout_seed) for spec in specs]

    assert seeds_of("lora", "[data, order, init, dropout]") == [(3, 3, 3, 3), (1, 1, 1, 1), (2, 2, 2, 2)]
    assert seeds_of("lora", "[data]") == [(3, 3, 3, 3), (1, 3, 3, 3), (2, 3, 3, 3)]
    assert seeds_of("lora", "[init, dropout]") == [(3, 3, 3, 3), (3, 3, 1, 1), (3, 3, 2, 2)]
    assert seeds_of("in_context", "[order]") == [(3, 3, 3, 3), (3, 1, 3, 3), (3, 2, 3, 3)]
    assert seeds_of("in_context", "[init]") == [(3, 3, 3, 3)]  # the same answer again and again is no spread
    assert seeds_of("zero_shot", "[data]") == [(3, 3, 3, 3)]


def test_what_stands_in_the_prompt_reaches_the_trials(small_cells):
    plan, cells = small_cells(
        ("n_dev: 4", "n_dev: 4\ninstruction: 'Judge:'\nseparator: ' ## '\ndraw: random"), ("zero_shot:", "zero_shot: {instruction: ''}")
    )
    by_entry = {cell.entry: cell.base for cell in cells}
    assert by_entry["zero_shot"].instruction == "" and by_entry["lora"].instruction == "Judge:"
    assert {base.separator for base in by_entry.values()} == {" ## "}
    assert {entry: base.draw for entry, base in by_entry.items()} == {"zero_shot": "balanced", "in_context": "random", "lora": "random"}
    assert parse_plan(plan.model_dump(mode="json"), "copy") == plan


def test_fixed_demonstrations_come_from_the_plan_or_a_file(small_cells, plan_file, tmp_path):
    ids = ["toy_train/5", "toy_train/2"]
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    for written in (str(ids), "ids.json"):
        _, cells = small_cells(("n_shots: [2, 4]", f"n_shots: [2]\ndemonstrations: {written}"))
        assert {cell.entry: list(cell.base.demonstrations) for cell in cells} == {"zero_shot": [], "in_context": ids, "lora": ids}
    for content, said in (
        ("3", "must hold a list of ids"),
        ("[3]", "must hold a list of ids"),
        ("{", "is no JSON"),
        (None, "cannot be read"),
    ):
        (tmp_path / "ids.json").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "ids.json").write_text(content)
        assert said in error_of(plan_file(("n_shots: [2, 4]", "n_shots: [2]\ndemonstrations: ids.json")))


def test_words_are_words(tmp_path):
    (tmp_path / "a.yaml").write_text("a: [Yes, no, On, off, y]\nb: [true, False]\n")
    assert read_yaml(tmp_path / "a.yaml") == {"a": ["Yes", "no", "On", "off", "y"], "b": [True, False]}
