from __future__ import annotations

import importlib

import pytest
import torch
from support.small_models import CPU, OPT_350M, save_model
from transformers import AutoModelForCausalLM

from llmft.config.spec import TrainSpec
from llmft.errors import UserError
from llmft.evaluation.evaluator import Evaluator
from llmft.methods._base import Method, SearchRange
from llmft.methods._registry import METHODS, build_method, complete_settings, method_class
from llmft.models.adapted import AdaptedModel
from llmft.models.info import resolve_model
from llmft.models.loading import LoadedModel, borrow_model, checksum
from llmft.seeds import derive
from llmft.training.checkpoints import TrainingResult
from llmft.training.loop import train
from llmft.trial.distillation import run_teacher
from llmft.trial.preparation import encode_prompts, encode_teacher_prompts, prepare_trial
from llmft.trial.run import run_trial

TRAINED = [name for name in METHODS if method_class(name).trains]
each_method = pytest.mark.parametrize("name", METHODS)
each_trained = pytest.mark.parametrize("name", TRAINED)


def prepared(name: str, settings: dict, model: LoadedModel, seed: int = 0, n_labels: int = 2) -> Method:
    method = build_method(name, settings)
    method.prepare(model, n_labels, torch.Generator().manual_seed(seed))
    return method


def borrowed(ref, copied: bool = True, name: str = "pattern"):
    """The base as the method `name` has it."""
    return borrow_model(ref, "fp32", torch.device("cpu"), copied=copied, base_weights=method_class(name).base_weights)


def weights(network) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


@each_method
def test_it_says_what_it_is_and_where_it_comes_from(name):
    module = importlib.import_module(f"llmft.methods.{name}")
    assert len(module.__doc__.strip()) > 80
    assert any(character.isdigit() for character in module.METHOD.paper), "the paper's year"
    assert module.METHOD.paper.split(" (")[0].split()[0] in module.__doc__ or name == "zero_shot"


@each_method
def test_what_is_searched_exists_and_its_default_lies_in_the_range(name):
    cls = method_class(name)
    known = {**complete_settings(name, {}), **TrainSpec(**cls.train_defaults).model_dump()}
    for setting, searched in cls.search.items():
        assert isinstance(searched, SearchRange) and setting in known
        assert known[setting] in searched.choices if searched.choices else searched.low <= known[setting] <= searched.high
    assert bool(cls.search) == cls.trains


@each_method
def test_it_overrides_hooks_alone(name):
    """What the trial asks a method for; whatever else a method file holds is its own."""
    hooks = {"recipe", "prepare", "prepend_prompt", "scores", "loss", "finalize", "export"}
    assert {key for key, value in vars(Method).items() if callable(value) and not key.startswith("_")} - {"Settings"} == hooks
    declared = set(Method.__annotations__) | {"Settings"}
    assert declared <= set(dir(method_class(name)))


@each_method
def test_no_setting_has_the_name_of_a_training_field(name):
    assert not method_class(name).Settings.model_fields.keys() & TrainSpec.model_fields.keys()  # a search names either


@pytest.mark.parametrize("name", [name for name in METHODS if "classification" in method_class(name).kinds])
def test_a_new_head_is_declared_and_has_no_words(spec_of, name):
    spec = spec_of(name, n_shots=0 if name == "zero_shot" else 8)
    setting = prepare_trial(spec)
    with borrowed(spec.model) as model:
        method = prepared(name, spec.settings, model)
        predictions = Evaluator(AdaptedModel(method, model), encode_prompts(spec, setting), setting.words, CPU).predict("toy")
    assert (predictions.free is None) == method_class(name).has_own_head


@each_method
def test_twice_the_same_trial_is_twice_the_same_answer(spec_of, name):
    first, second = (run_trial(spec_of(name, n_shots=0 if name == "zero_shot" else 8), CPU) for _ in range(2))
    assert first.record.finished, first.record.message
    assert first.predictions == second.predictions
    assert first.record.metrics == second.record.metrics and first.record.curve == second.record.curve


def test_the_order_seed_changes_the_order_of_the_demonstrations_alone(spec_of):
    shown = [run_trial(spec_of("in_context", order_seed=seed), CPU).record.draws for seed in (0, 1)]
    assert shown[0].shots == shown[1].shots and sorted(shown[0].demonstrations) == sorted(shown[1].demonstrations)
    assert shown[0].demonstrations != shown[1].demonstrations


@each_method
def test_the_base_model_stays_untouched(spec_of, name):
    spec = spec_of(name)
    with borrowed(spec.model, copied=False, name=name) as base:
        before, modules = checksum(base.network), [name for name, _ in base.network.named_modules()]
        assert run_trial(spec, CPU).record.finished
        assert run_trial(spec.model_copy(update={"train": TrainSpec(learning_rate=1e30, epochs=1)}), CPU).record is not None
    with borrowed(spec.model, copied=False, name=name) as again:
        assert again.network is base.network
        assert checksum(again.network) == before
        assert [name for name, _ in again.network.named_modules()] == modules
        assert not any(parameter.requires_grad for parameter in again.network.parameters())


@each_trained
def test_frozen_weights_stay_bit_identical_and_the_others_move(spec_of, name):
    spec = spec_of(name, selections=("last",), weight_decay=0.1)
    setting = prepare_trial(spec)
    teaching = run_teacher(spec, setting, encode_prompts(spec, setting), encode_teacher_prompts(spec, setting), CPU)
    encoded = encode_prompts(spec, setting, teaching.texts)  # with what a teacher has said
    with borrowed(spec.model, name=name) as model:
        method = setting.method
        method.prepare(model, 2, torch.Generator().manual_seed(derive(0, "init")))
        frozen = {name for name, parameter in model.network.named_parameters() if not parameter.requires_grad}
        before = weights(model.network)
        adapted = AdaptedModel(method, model)
        evaluator = Evaluator(adapted, encoded, setting.words, CPU, setting.decoding)
        train(spec, setting.recipe, adapted, evaluator, {test.name: test.domain for test in setting.tests}, TrainingResult())
        after = weights(model.network)
    unmoved = {name for name in before if torch.equal(before[name], after[name])}
    assert frozen <= unmoved
    assert len(unmoved - frozen) < 0.2 * (len(before) - len(frozen))
    assert before.keys() == after.keys()


def test_the_record_holds_the_count(spec_of):
    record = run_trial(spec_of("lora", {"r": 2}), CPU).record
    assert record.cost.n_trainable_parameters == 2 * 2 * 2 * (32 + 32)  # layers, matrices, rank, in + out
    assert record.cost.stored_bytes == 4 * record.cost.n_trainable_parameters


def test_the_vanilla_head_reads_the_last_real_token(spec_of):
    spec = spec_of("vanilla", {"head": "linear"}, n_test=6)
    setting = prepare_trial(spec)
    with borrowed(spec.model) as model, torch.no_grad():
        method = prepared("vanilla", spec.settings, model)
        encoded = encode_prompts(spec, setting)
        predictions = Evaluator(AdaptedModel(method, model), encoded, setting.words, CPU).predict("toy")
        head = model.network.classifier.weight
        for row, suffix in zip(predictions.log_probabilities, encoded.sets["toy"].suffixes, strict=True):
            last = model.network.base_model(torch.tensor([[*encoded.prefix, *suffix]])).last_hidden_state[0, -1]
            torch.testing.assert_close(torch.tensor(row), (head @ last).log_softmax(0), atol=1e-5, rtol=0)
    assert predictions.free is None


def test_the_vanilla_head_is_as_wide_as_the_output_embedding_reads(tmp_path, tokenizer, spec_of):
    ref = resolve_model(save_model(tmp_path / "opt-350m", "opt", tokenizer, **OPT_350M))
    with borrowed(ref) as model:
        prepared("vanilla", {"head": "linear"}, model)
        assert (model.width, model.network.config.hidden_size) == (16, 32)
        assert model.network.classifier.weight.shape == (2, 16)
    record = run_trial(spec_of("vanilla", model=ref, epochs=1, n_test=2), CPU).record
    assert record.finished, record.message


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama", "gpt_neox"])
def test_lora_begins_as_the_identity_and_can_be_merged(tmp_path, tokenizer, architecture):
    from peft.tuners.tuners_utils import BaseTunerLayer

    ref = resolve_model(save_model(tmp_path / architecture, architecture, tokenizer))
    ids = torch.tensor([[5, 30, 90, 200, 7]])
    with borrowed(ref) as model, torch.no_grad():
        before = model.network(ids).logits
        prepared("lora", {"r": 4, "alpha": 16}, model)
        assert torch.equal(model.network(ids).logits, before)
        for name, parameter in model.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
        adapted = model.network(ids).logits
        assert (adapted - before).abs().max() > 0.05
        layers = [module for module in model.network.modules() if isinstance(module, BaseTunerLayer)]
        for layer in layers:
            layer.merge()
        assert len(layers) >= 2 and all(layer.merged for layer in layers)
        torch.testing.assert_close(model.network(ids).logits, adapted, atol=1e-5, rtol=1e-5)


def test_lora_adds_alpha_over_r_times_the_product(small_opt):
    with borrowed(small_opt) as model, torch.no_grad():
        prepared("lora", {"r": 4, "alpha": 12, "targets": ["v_proj"]}, model)
        layer = model.network.model.decoder.layers[0].self_attn.v_proj
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert a.shape == (4, 32) and b.shape == (32, 4)
        b.normal_(generator=torch.Generator().manual_seed(1))
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
        expected = layer.base_layer(x) + 12 / 4 * x @ a.T @ b.T
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_loras_targets_can_be_chosen(small_opt):
    with borrowed(small_opt) as model:
        prepared("lora", {"targets": ["fc2"]}, model)
        trained = [name for name, parameter in model.network.named_parameters() if parameter.requires_grad]
    assert len(trained) == 4 and all(".fc2." in name for name in trained)


def test_loras_target_that_is_no_layer_is_a_mistake_of_the_users(spec_of):
    record = run_trial(spec_of("lora", {"targets": ["q_prj"]}), CPU).record
    assert record.cause == "user_error"
    assert "q_prj" in record.message and "q_proj" in record.message


def test_the_two_losses_by_hand():
    from llmft.methods.pattern import label_word_loss

    scores, gold = torch.log(torch.tensor([[0.2, 0.1], [0.3, 0.3], [0.05, 0.15]])), torch.tensor([0, 1, 1])
    full = -(torch.tensor([0.2, 0.3, 0.15]).log()).mean()
    restricted = -(torch.tensor([2 / 3, 1 / 2, 3 / 4]).log()).mean()
    assert label_word_loss("full_vocabulary", scores, gold) == pytest.approx(float(full))
    assert label_word_loss("restricted", scores, gold) == pytest.approx(float(restricted))


def test_the_loss_setting_reaches_the_training(spec_of):
    first = [
        run_trial(spec_of("pattern", {"loss": loss}, epochs=1), CPU).record.curve[0].train_loss
        for loss in ("full_vocabulary", "restricted")
    ]
    assert first[0] > first[1] > 0  # the mass on all other words counts only in the first


@each_method
def test_an_unknown_setting_is_answered_with_the_nearest(name):
    fields = list(method_class(name).Settings.model_fields)
    wrong = fields[-1] + "s" if fields else "anything"
    with pytest.raises(UserError) as raised:
        build_method(name, {wrong: 1})
    message = str(raised.value)
    assert message.startswith(f"method '{name}': unknown key '{wrong}'") and "\n" not in message
    assert all(field in message for field in fields)
    assert not fields or f"Did you mean '{fields[-1]}'?" in message


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [("vanilla", {"head": "mlp"}, "'fully_connected' or 'linear' (got 'mlp')"), ("lora", {"r": "8"}, "(got '8')"),
     ("lora", {"r": 0}, "(got 0)"), ("lora", {"lora_dropout": 1.5}, "(got 1.5)"), ("pattern", {"loss": None}, "(got None)")],
)  # fmt: skip
def test_a_wrong_setting_is_answered_with_what_is_allowed(name, settings, said):
    with pytest.raises(UserError) as raised:
        build_method(name, settings)
    assert said in str(raised.value)


def test_an_unknown_method_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'in_context'"):
        build_method("incontext", {})


def test_settings_survive_a_round_trip():
    for name in METHODS:
        assert complete_settings(name, complete_settings(name, {})) == complete_settings(name, {})


def test_a_trained_method_without_shots_is_refused(spec_of):
    for name in TRAINED:
        if name == "multi_task":  # which has others to train on
            continue
        record = run_trial(spec_of(name, n_shots=0), CPU).record
        assert record.cause == "user_error" and "zero_shot" in record.message


def test_the_saved_folder_is_not_written_to(spec_of):
    spec = spec_of("pattern")
    before = checksum(AutoModelForCausalLM.from_pretrained(spec.model.path))
    run_trial(spec, CPU)
    assert checksum(AutoModelForCausalLM.from_pretrained(spec.model.path)) == before


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_says_what_it_is(name):
    """In one line each, which `llmft methods NAME` shows."""
    fields = method_class(name).Settings.model_fields
    assert not [field for field, info in fields.items() if not info.description or "\n" in info.description]
