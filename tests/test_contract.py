"""The contract of a transformers model: loading, outputs and training, for every head."""

import inspect
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from checkpoints import checkpoint_layers
from heads import (
    AUTO,
    BATCH,
    FORMS,
    LENGTH,
    both_generators,
    continued,
    every_form,
    first_output,
    inputs_of,
    labels_of,
)
from transformers import (
    AutoModelForSeq2SeqLM,
)

from modeling_flashlite import (
    FlashLiteForCausalLM,
    FlashLiteForConditionalGeneration,
    FlashLiteForSequenceClassification,
    FlashLiteModel,
)

LIBRARY = tuple(map(int, transformers.__version__.split(".")[:2]))


@every_form
def test_every_head_saves_loads_and_ties(make, model_class, encoder, tmp_path):
    model = make(model_class, encoder)
    inputs = inputs_of(model)
    before = first_output(model, inputs)
    model.save_pretrained(tmp_path)
    loaded, info = AUTO[model_class].from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is model_class and not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(first_output(loaded.eval(), inputs), before, rtol=0, atol=0)
    tables = {model.get_decoder().embed_tokens.weight.data_ptr() for model in (loaded,)}
    tables |= {
        table.weight.data_ptr() for table in (loaded.get_input_embeddings(), loaded.get_output_embeddings()) if table
    }
    assert len(tables) == 1, "one table for encoder, decoder and head"


@every_form
def test_weights_made_on_no_device_equal_weights_made_at_once(make, model_class, encoder):
    def draw(build):
        torch.manual_seed(0)
        return build()

    config = make(model_class, encoder).config
    usual = draw(lambda: model_class(config)).state_dict()
    with torch.device("meta"):
        assert all(p.is_meta for p in model_class(config).parameters())
    from_nothing = model_class.from_pretrained(None, config=config, state_dict={}).state_dict()
    assert usual.keys() == from_nothing.keys()
    for name, value in from_nothing.items():
        assert not value.is_meta and torch.isfinite(value).all(), name
        torch.testing.assert_close(value.std(), usual[name].std(), rtol=0.3, atol=1e-3, msg=name)


@every_form
@pytest.mark.parametrize("tied", [True, False])
def test_vocabulary_grows_and_shrinks_everywhere(make, model_class, encoder, tied, tmp_path):
    model = make(model_class, encoder, tie_word_embeddings=tied)
    inputs = inputs_of(model)
    before = first_output(model, inputs)
    for size in (120, 97):
        model.resize_token_embeddings(size)
        assert model.config.vocab_size == size == model.get_input_embeddings().num_embeddings
        assert model.get_decoder().embed_tokens.num_embeddings == size
        for name in ("input_ids", "decoder_input_ids"):
            if name in inputs:
                first_output(model, inputs | {name: torch.full_like(inputs[name], size - 1)})
        model.save_pretrained(tmp_path)
        model = model_class.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(first_output(model, inputs), before)


@every_form
@torch.no_grad()
def test_tuple_and_dictionary_hold_the_same(make, model_class, encoder):
    model = make(model_class, encoder, attn_implementation="eager")
    inputs = inputs_of(model)
    inputs |= {} if model_class is FlashLiteModel else labels_of(model, inputs)
    asked = {"output_attentions": True, "output_hidden_states": True}
    as_dict, as_tuple = model(**inputs, **asked), model(**inputs, **asked, return_dict=False)
    assert len(as_dict) == len(as_tuple)
    names = list(as_dict)
    if model_class is not FlashLiteModel:
        assert names[0] == "loss" and "logits" in names[1]
    for left, right in zip(as_dict.to_tuple(), as_tuple, strict=True):
        if isinstance(left, torch.Tensor):
            torch.testing.assert_close(left, right, rtol=0, atol=0)


@every_form
@torch.no_grad()
def test_attentions_and_hidden_states_have_the_columns_of_the_input(make, model_class, encoder):
    model = make(model_class, encoder, attn_implementation="eager")
    inputs = inputs_of(model)
    plain, full = model(**inputs), model(**inputs, output_attentions=True, output_hidden_states=True)
    source, target = LENGTH, LENGTH - 2 if encoder else LENGTH
    shapes = {"attentions": (BATCH, 4, target, target), "hidden_states": (BATCH, target, 32)}
    if encoder:
        shapes = {f"decoder_{name}": shape for name, shape in shapes.items()}
        shapes |= {"cross_attentions": (BATCH, 4, target, source), "encoder_attentions": (BATCH, 4, source, source)}
        shapes |= {"encoder_hidden_states": (BATCH, source, 32)}
    assert set(full) - set(plain) == set(shapes)
    for name, shape in shapes.items():
        assert len(full[name]) == (3 if name.endswith("hidden_states") else 2)
        assert all(tuple(part.shape) == shape for part in full[name]), name
    mass = (
        full.decoder_attentions[1].sum(-1) + full.cross_attentions[1].sum(-1)
        if encoder
        else full.attentions[1].sum(-1)
    )
    real = inputs["decoder_attention_mask" if encoder else "attention_mask"].bool()[:, None].expand(mass.shape)
    torch.testing.assert_close(mass, real.float())
    if LIBRARY < (5, 23):
        return  # all states or none
    chosen = model(**inputs, output_hidden_states=[0, -1])
    states = chosen.decoder_hidden_states if encoder else chosen.hidden_states
    assert [state is None for state in states] == [False, True, False]


def test_returned_attentions_carry_gradients(make):
    model = make(FlashLiteForConditionalGeneration, True, attn_implementation="eager")
    out = model(**inputs_of(model), output_attentions=True)
    parts = [out.decoder_attentions[0], out.cross_attentions[0], out.encoder_attentions[0]]
    for part in parts:
        part.retain_grad()
    out.logits.sum().backward()
    assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in parts)


@pytest.mark.parametrize(("model_class", "encoder"), [form for form in FORMS if form[0] is not FlashLiteModel])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(make, model_class, encoder, reentrant):
    model = make(model_class, encoder).train()
    inputs = inputs_of(model)
    inputs |= labels_of(model, inputs)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_layers(model, {"use_reentrant": reentrant})
        model.zero_grad()
        model(**inputs).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None, f"{name} has no gradient"
        torch.testing.assert_close(grads[1][name], grad, msg=name)


@every_form
@pytest.mark.parametrize("encoding", ["rotary", "transformer_xl"])
def test_eager_equals_sdpa_and_can_be_switched(make, model_class, encoder, encoding):
    model = make(model_class, encoder, position_encoding=encoding).double()
    inputs = inputs_of(model)
    assert model.config._attn_implementation == "sdpa"
    fast = first_output(model, inputs)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(first_output(model, inputs), fast)
    with pytest.raises(ValueError, match="foo"):
        model.set_attn_implementation("foo")


@both_generators
def test_rows_of_a_batch_are_independent(make, model_class, encoder):
    """Also at padding: every output of a row is the row's own."""
    model = make(model_class, encoder).double()
    inputs = inputs_of(model)
    together = model(**inputs, output_hidden_states=True)
    states = "decoder_hidden_states" if encoder else "hidden_states"
    for row in range(BATCH):
        alone = model(**{name: value[row : row + 1] for name, value in inputs.items()}, output_hidden_states=True)
        torch.testing.assert_close(together.logits[row : row + 1], alone.logits)
        for left, right in zip(together[states], alone[states], strict=True):
            torch.testing.assert_close(left[row : row + 1], right)


def test_left_padding_changes_nothing(make):
    model = make(FlashLiteForCausalLM, False)
    ids = torch.randint(3, 97, (2, 13))
    pad = torch.zeros(2, 32, dtype=torch.long)
    padded = {"input_ids": torch.cat([pad, ids], 1), "attention_mask": torch.cat([pad, torch.ones_like(ids)], 1)}
    torch.testing.assert_close(model(**padded).logits[:, 32:], model(ids).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        continued(model, False, padded)[:, 45:], continued(model, False, {"input_ids": ids})[:, 13:], rtol=0, atol=0
    )


@pytest.mark.parametrize("side", ["input", "decoder"])
def test_masks_with_holes_and_empty_rows_stay_finite(make, side):
    model = make(FlashLiteForConditionalGeneration, True)
    inputs = inputs_of(model)
    name = "attention_mask" if side == "input" else "decoder_attention_mask"
    inputs[name] = torch.randint(0, 2, inputs[name].shape)
    inputs[name][1] = 0
    assert torch.isfinite(model(**inputs).logits).all()


@both_generators
def test_loss_is_made_of_the_returned_logits(make, model_class, encoder):
    model = make(model_class, encoder)
    inputs = inputs_of(model)
    labels = labels_of(model, inputs)["labels"]
    labels[:, :2] = -100
    out = model(**inputs, labels=labels)
    logits, targets = (out.logits, labels) if encoder else (out.logits[:, :-1], labels[:, 1:])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(out.loss, expected)
    assert torch.autograd.grad(out.loss, out.logits)[0].abs().sum() > 0
    halved = model(**inputs, labels=labels, num_items_in_batch=2 * int((targets != -100).sum())).loss
    torch.testing.assert_close(halved, expected / 2)


def test_targets_aligned_by_the_trainer_replace_the_labels(make):
    model = make(FlashLiteForCausalLM, False)
    inputs = inputs_of(model)
    labels, aligned = torch.randint(3, 97, (2, BATCH, LENGTH))
    expected = torch.nn.functional.cross_entropy(model(**inputs).logits.flatten(0, 1), aligned.flatten())
    torch.testing.assert_close(model(**inputs, labels=labels, shift_labels=aligned).loss, expected)


@pytest.mark.parametrize("problem", ["regression", "single_label_classification", "multi_label_classification"])
def test_classification_problems(make, problem):
    labels = 1 if problem == "regression" else 3
    model = make(FlashLiteForSequenceClassification, True, num_labels=labels, problem_type=problem)
    target = torch.randint(0, labels, (BATCH,)) if problem.startswith("single") else torch.rand(BATCH, labels).round()
    inputs = inputs_of(model)
    out = model(inputs["input_ids"], inputs["attention_mask"], labels=target)
    assert out.logits.shape == (BATCH, labels) and torch.isfinite(out.loss)


# peft reads a property of the model that transformers has renamed
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@both_generators
def test_lora_trains_saves_and_merges(make, model_class, encoder, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = make(model_class, encoder)
    model.save_pretrained(tmp_path / "base")
    task = "SEQ_2_SEQ_LM" if encoder else "CAUSAL_LM"
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], task_type=task))
    inputs = inputs_of(model)
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], 0.5)
    for _ in range(2):
        optimizer.zero_grad()
        lora(**inputs, labels=labels_of(model, inputs)["labels"]).loss.backward()
        optimizer.step()
    lora.eval().save_pretrained(tmp_path / "adapter")
    trained = lora(**inputs).logits
    base = model_class.from_pretrained(tmp_path / "base").eval()
    assert not torch.allclose(base(**inputs).logits, trained)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(**inputs).logits, trained)
    torch.testing.assert_close(loaded.merge_and_unload()(**inputs).logits, trained, rtol=1e-4, atol=1e-5)


@every_form
def test_plans_name_what_exists(make, model_class, encoder):
    for encoding in ("rotary", "transformer_xl"):
        model = make(model_class, encoder, position_encoding=encoding)
        names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
        names = {".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names}
        assert model.tp_plan and set(model.tp_plan) <= names
        assert model._fsdp_plan and set(model._fsdp_plan) <= names
        if LIBRARY >= (5, 23):  # before, the library cut the table by itself
            assert {name for name in model.tp_plan if name.endswith("embed_tokens")}
        if model.get_output_embeddings() is not None:
            assert "lm_head" in model.tp_plan
    layers = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) & layers


@pytest.mark.parametrize("model_class", AUTO)
def test_first_argument_is_the_main_input(model_class):
    arguments = list(inspect.signature(model_class.forward).parameters)
    assert arguments[1] == model_class.main_input_name == "input_ids"


def test_checkpoints_bring_their_code(make, tmp_path):
    """Every head loads where the package cannot be imported, computes the same, and gives its body to other heads."""
    for index, (model_class, encoder) in enumerate(FORMS):
        model = make(model_class, encoder)
        folder = tmp_path / str(index) / "model"  # one name: the code is then imported once
        model.save_pretrained(folder)
        fitting = {auto.__name__ for auto in AUTO.values() if encoder or auto is not AutoModelForSeq2SeqLM}
        assert set(model.config.auto_map) == {"AutoConfig", *fitting}
        torch.save((AUTO[model_class].__name__, inputs_of(model)), folder / "inputs.pt")
        torch.save(first_output(model, torch.load(folder / "inputs.pt")[1]), folder / "expected.pt")
    program = """
        import sys, pathlib, torch, transformers
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "modeling_flashlite":
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Absent())
        for folder in sorted(pathlib.Path(sys.argv[1]).glob("*/model")):
            auto, inputs = torch.load(folder / "inputs.pt")
            table = None
            for name in transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True).auto_map:
                if name != "AutoConfig":
                    other = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
                    weight = other.get_input_embeddings().weight
                    assert table is None or torch.equal(table, weight), (auto, name)
                    table = weight
            model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
            with torch.no_grad():
                torch.testing.assert_close(model(**inputs)[0], torch.load(folder / "expected.pt"))
        print("same")
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.stdout.strip().endswith("same"), run.stderr
