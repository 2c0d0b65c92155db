"""Arguments and outputs of the models: none is ignored, both names of the cache work, config settings apply."""

import subprocess
import sys

import pytest
import torch
import transformers
from heads import FORMS, every_form
from torch.nn import functional as F
from transformers import DynamicCache, Trainer, TrainingArguments

from modeling_flashlite import (
    FlashLiteCache,
    FlashLiteForCausalLM,
    FlashLiteForConditionalGeneration,
    FlashLiteForQuestionAnswering,
    FlashLiteForSequenceClassification,
    FlashLiteForTokenClassification,
)
from modeling_flashlite.compat_flashlite import CACHE, NEWEST, OLDEST, check_version, named_module, private_operator

# made up, of other models, of older libraries, misspelled, or of the library and of no use here
UNREAD = [
    "made_up",
    "cache_params",
    "past_key_value",
    "past_key_valuess",
    "mems",
    "segment_memory",
    "head_mask",
    "cross_attn_head_mask",
    "token_type_ids",
    "cache_position",
    "input_mask",
    "positions",
    "label",
    "label_ids",
    "target",
    "decoder_labels",
    "is_causal",
    "output_router_logits",
    "cu_seq_lens_q",
    "max_length_k",
    "seq_idx",
]


@pytest.fixture
def make(tiny_config):
    def build(model_class, encoder, **overrides):
        config = tiny_config(is_encoder_decoder=encoder, **overrides)
        config.initializer_range = 0.2
        torch.manual_seed(0)
        return model_class(config).eval()

    return build


IDS = torch.arange(3, 21).view(2, 9)


@every_form
@pytest.mark.parametrize("name", UNREAD)
def test_an_argument_that_nobody_reads_is_refused(make, model_class, encoder, name):
    model = make(model_class, encoder)
    for part in (model, model.get_decoder(), *([model.get_encoder()] if encoder else [])):
        with pytest.raises(TypeError, match=rf"got an unexpected keyword argument '{name}'"):
            part(IDS, **{name: IDS})


@pytest.mark.parametrize(("model_class", "encoder"), FORMS[2:4])
def test_generate_refuses_what_forward_does_not_read(make, model_class, encoder):
    model = make(model_class, encoder)
    for name in ("made_up", "mems", "token_type_ids", "decoder_made_up"):
        with pytest.raises((TypeError, ValueError), match=name):
            model.generate(IDS, max_new_tokens=2, **{name: IDS})
    with pytest.raises(ValueError, match="memory"):
        model.generate(IDS, max_new_tokens=2, memory=model.new_memory())


@pytest.mark.parametrize(("model_class", "encoder"), [form for form in FORMS if not form[1]])
def test_encoder_arguments_are_refused_without_an_encoder(make, model_class, encoder):
    model = make(model_class, encoder)
    names = "decoder_input_ids", "decoder_attention_mask", "encoder_outputs", "decoder_inputs_embeds"
    names += ("decoder_position_ids",) if "ForCausalLM" not in model_class.__name__ else ()
    for name in names:
        with pytest.raises((TypeError, ValueError), match=name):
            model(IDS, **{name: IDS})


@every_form
def test_arguments_that_transformers_passes_are_accepted(make, model_class, encoder):
    """A Trainer's count, collators of packed rows, and every field of `TransformersKwargs` filled with nothing."""
    model = make(model_class, encoder)
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if encoder else {})
    truth = model(**inputs)[0]
    nothing = dict.fromkeys(transformers.utils.TransformersKwargs.__optional_keys__)
    torch.testing.assert_close(model(**inputs, **nothing)[0], truth)
    packed = {"cu_seq_lens_q": torch.tensor([0, 9]), "max_length_q": 9, "position_ids": torch.arange(9)[None]}
    torch.testing.assert_close(model(**inputs, num_items_in_batch=4, return_dict=True, **packed)[0], truth)
    assert isinstance(model(**inputs, return_dict=False), tuple)


@pytest.mark.parametrize(("model_class", "encoder"), FORMS[:4])
def test_the_cache_has_two_names_on_every_version(make, model_class, encoder):
    model = make(model_class, encoder)
    column = "decoder_input_ids" if encoder else "input_ids"
    source = {"input_ids": IDS} if encoder else {}
    truth = model(**{**source, column: IDS})
    outputs = {}
    for name in ("cache", "past_key_values"):
        first = model(**{**source, column: IDS[:, :5]}, use_cache=True)
        cache = getattr(first, name)
        assert cache is first.cache is first.past_key_values and cache.get_seq_length() == 5
        outputs[name] = model(**{**source, column: IDS[:, 5:]}, **{name: cache})
        torch.testing.assert_close(outputs[name][0], truth[0][:, 5:], rtol=1e-4, atol=1e-5)
        assert outputs[name].cache is cache
    with pytest.raises(ValueError, match="Got both `cache` and `past_key_values`"):
        model(**{**source, column: IDS}, cache=cache, past_key_values=cache)
    assert model(**{**source, column: IDS}, use_cache=False).cache is None


@pytest.mark.skipif(CACHE != "cache", reason="5.24 deprecates the old name of the cache")
@pytest.mark.parametrize(("model_class", "encoder"), FORMS[:4])
def test_the_old_name_of_the_cache_warns_and_is_not_used_inside(make, model_class, encoder, recwarn):
    model = make(model_class, encoder)
    inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS} if encoder else {})}
    cache = model(**inputs, use_cache=True).cache
    if model.can_generate():
        model.generate(IDS, max_new_tokens=3, pad_token_id=0)
        model.generate(IDS, max_new_tokens=3, pad_token_id=0, num_beams=2)
    assert not [warning for warning in recwarn if "deprecated" in str(warning.message)]
    model(**inputs, past_key_values=cache)
    (warning,) = [warning for warning in recwarn if "deprecated" in str(warning.message)]
    assert "`past_key_values` is deprecated; use `cache` instead." in str(warning.message)


def test_a_memory_of_the_wrong_type_is_refused(make):
    model = make(FlashLiteForCausalLM, False)
    for wrong in (DynamicCache(), IDS):
        with pytest.raises(ValueError, match=r"new_memory"):
            model(IDS, memory=wrong)


def test_a_cache_under_checkpointing_is_refused_in_training_and_right_without_gradients(make):
    model = make(FlashLiteForCausalLM, False)
    whole = model(IDS).logits
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    model.train()
    with torch.no_grad():
        cache = FlashLiteCache(model.config)
        parts = [model(IDS[:, a:b], past_key_values=cache).logits for a, b in ((0, 4), (4, 5), (5, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="checkpointing"):
        model(IDS, past_key_values=cache)


@every_form
@torch.no_grad()
def test_the_config_may_ask_for_states_attentions_and_tuples(make, model_class, encoder, tmp_path):
    make(model_class, encoder).save_pretrained(tmp_path)
    prefix = "decoder_" if encoder else ""

    def load(**wishes):
        return model_class.from_pretrained(tmp_path, **wishes).eval()

    plain = load()(IDS)
    assert f"{prefix}hidden_states" not in plain and f"{prefix}attentions" not in plain
    assert len(load(output_hidden_states=True)(IDS)[f"{prefix}hidden_states"]) == 3
    assert "encoder_hidden_states" not in plain or encoder
    eager = load(output_attentions=True, attn_implementation="eager")(IDS)
    assert len(eager[f"{prefix}attentions"]) == 2 and (not encoder or len(eager.cross_attentions) == 2)
    set_later = load()
    set_later.config.output_hidden_states = True
    assert len(set_later(IDS)[f"{prefix}hidden_states"]) == 3
    assert f"{prefix}hidden_states" not in set_later(IDS, output_hidden_states=False)
    as_tuple = load(return_dict=False)(IDS)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[0], plain[0])


def mean_loss(logits, labels, *arguments, **others):
    """A hook of others, which knows nothing of accumulated batches."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100)


def plain_sum(logits, labels, vocab_size, num_items_in_batch=None, **others):
    """A hook of others that does."""
    total = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum")
    return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def rows_for(model_class, problem):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(8):
        ids = torch.randint(3, 97, (7,), generator=generator)
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if model_class is FlashLiteForQuestionAnswering:
            row |= {"start_positions": ids[0] % 5, "end_positions": ids[1] % 5}
        elif model_class is FlashLiteForSequenceClassification:
            row["labels"] = {"regression": ids[0] / 97, "multi": (ids[:3] % 2).float()}.get(problem, ids[0] % 3)
        else:
            bound = 97 if "CausalLM" in model_class.__name__ or "Conditional" in model_class.__name__ else 3
            row["labels"] = (ids % bound).masked_fill(torch.arange(7) > index % 5 + 1, -100)  # of uneven numbers
        rows.append(row)
    return rows


CASES = [(model_class, encoder, None, None) for model_class, encoder in FORMS[2:]]
CASES += [(FlashLiteForSequenceClassification, False, problem, None) for problem in ("regression", "multi")]
CASES += [(FlashLiteForTokenClassification, True, None, mean_loss), (FlashLiteForCausalLM, False, None, mean_loss)]
CASES += [
    (FlashLiteForCausalLM, False, None, plain_sum),
    (FlashLiteForConditionalGeneration, True, None, mean_loss),
    (FlashLiteForSequenceClassification, True, None, mean_loss),
]


@pytest.mark.parametrize(("model_class", "encoder", "problem", "hook"), CASES)
def test_accumulated_batches_learn_as_one_batch(make, model_class, encoder, problem, hook, tmp_path):
    results = []
    for size, accumulation in ((8, 1), (2, 4)):
        labels = {"regression": 1}.get(problem, 3)
        model = make(model_class, encoder, num_labels=labels)
        if hook is not None:
            model.loss_function = hook
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            logging_steps=1,
            learning_rate=0.1,
            optim="sgd",
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows_for(model_class, problem))
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        results.append((torch.tensor(losses), {name: p.detach() for name, p in model.named_parameters()}))
    (losses, weights), (accumulated, others) = results
    torch.testing.assert_close(accumulated, losses, rtol=1e-4, atol=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_versions_that_are_too_old_or_unknown_are_named(caplog):
    with pytest.raises(ImportError, match=f"transformers 5.15.1 is installed, but Flash-Lite needs {OLDEST}"):
        check_version("5.15.1")
    with pytest.raises(ImportError, match="pip install"):
        check_version("4.57.0.dev0")
    transformers.utils.logging.enable_propagation()
    try:
        for version in (OLDEST, NEWEST, "5.16", "5.20.2", "5.24.3"):
            check_version(version)
        assert not caplog.records
        check_version("5.25.0.dev0")
    finally:
        transformers.utils.logging.disable_propagation()
    assert len(caplog.records) == 1 and "5.25.0.dev0 is newer than" in caplog.text
    assert CACHE in ("cache", "past_key_values")


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("model.layers.1", "model.layers.1 model.layers.1.mlp"),
        (r"model\.layers\.1\.", "model.layers.1.mlp"),
        (r"model\.layers\..*", "model.layers.1 model.layers.1.mlp model.layers.11.mlp"),
        ("mlp", "model.layers.1.mlp model.layers.11.mlp"),
        ("lm_head|model.layers.1", "model.layers.1 model.layers.1.mlp lm_head"),
        ("lm", ""),
    ],
)
def test_patterns_of_modules_end_where_names_do(pattern, named):
    names = ["model.layers.1", "model.layers.1.mlp", "model.layers.11.mlp", "lm_head", "lm_head_proj"]
    assert [name for name in names if named_module(name, [pattern])] == named.split()
    assert not any(named_module(name, None) for name in names)


@pytest.mark.parametrize("version", ["4.40.0", "99.0.0"])
def test_importing_says_it_in_one_sentence(version):
    code = f"import transformers; transformers.__version__ = {version!r}\nimport modeling_flashlite"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if version.startswith("4"):
        assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith(
            "ImportError: transformers 4.40"
        )
    else:
        assert done.returncode == 0 and done.stderr.count("is newer than") == 1


def test_a_private_operator_that_is_gone_is_named(caplog):
    transformers.utils.logging.enable_propagation()
    try:
        assert private_operator("aten", "_scaled_dot_product_flash_attention_for_cpu") is not None
        assert not caplog.records
        assert private_operator("aten", "_no_such_operator") is None
    finally:
        transformers.utils.logging.disable_propagation()
    assert len(caplog.records) == 1 and "no operator aten._no_such_operator" in caplog.text
