"""Every recipe is parsed, documented line by line, and trains for two steps on a tiny corpus."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, load_from_disk
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
)
from verbs import (
    RECIPES,
    SCRIPTS,
    TINY_RUN,
    TINY_SHAPE,
    VERB_OF,
    argument_classes,
    load_script,
    run_verb,
    write_corpus,
)

from modeling_flashlite import FlashLiteConfig, FlashLiteForConditionalGeneration
from modeling_flashlite.cli import parse_args
from modeling_flashlite.data.tasks import TaskData, get_task
from modeling_flashlite.data.tokenization import train_tokenizer
from modeling_flashlite.ecq_config_flashlite import EcqConfig
from modeling_flashlite.training.checks import shape_changes
from modeling_flashlite.training.conversion import to_encoder_decoder
from modeling_flashlite.training.launch import ArchitectureArgs, DataArgs, ModelArgs, TrainArgs, load_model
from modeling_flashlite.training.teacher_cache import check_teacher_columns
from modeling_flashlite.training.trainers import prompts_of

# peft 0.21 itself asks for an attribute that transformers 5.23 renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
OURS = [name for name in RECIPES if VERB_OF[name]]


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A corpus, and one trained model of each kind, made by the train verb itself."""
    folder = tmp_path_factory.mktemp("recipes")
    dataset = write_corpus(folder)
    for kind, recipe in (("causal", "train_tiny"), ("seq2seq", "train_translation")):
        layers = ["--encoder_layers=2"] if kind == "seq2seq" else []
        run_verb(recipe, dataset, folder / kind, [*TINY_SHAPE, *layers, "--vocab_size=300"])
    return folder, dataset


@pytest.mark.parametrize("name", OURS)
def test_recipe_trains_for_two_steps(name, ground, capsys):
    folder, dataset = ground
    keys = yaml.safe_load(RECIPES[name].read_text())
    causal = keys["task"] in ("text-generation", "classification") or keys.get("model") == "runs/smol"
    base = folder / ("causal" if causal else "seq2seq")
    overrides = ["--num_train_epochs=1"]
    if name.startswith("train"):
        overrides += [*TINY_SHAPE, "--vocab_size=300"] + (["--encoder_layers=2"] if "encoder_layers" in keys else [])
        overrides += ["--segment_length=16"] if "segment_length" in keys else []
        overrides += [f"--model={base}"] if "model" in keys else []
    elif name.startswith("distill"):
        overrides += [f"--teacher={base}", f"--teacher_cache={folder / name}_cache", "--k=4"]
        overrides += ["--keep_layers=1"] if "keep_layers" in keys else [] if "model" in keys else TINY_SHAPE
        overrides += [f"--model={base}"] if "model" in keys else []
        overrides += ["--keep_encoder_layers=1"] if "keep_encoder_layers" in keys else []
    elif name.startswith("adapt"):
        crossed = folder / "crossed"
        to_encoder_decoder(AutoModelForCausalLM.from_pretrained(base)).save_pretrained(crossed)
        AutoTokenizer.from_pretrained(base).save_pretrained(crossed)
        overrides += [f"--teacher={base}", f"--model={crossed}", f"--teacher_cache={folder / name}_cache"]
    else:
        overrides += [f"--model={base}", "--lora_r=2", "--load_best_model_at_end=false"]
    metrics = run_verb(name, dataset, folder / name, overrides)
    assert metrics["train_loss"] > 0 and metrics["eval_loss"] > 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["train_loss"] == metrics["train_loss"] and Path(printed["loss_curve"]).is_file()
    if name == "lora_tiny":
        assert (Path(printed["merged"]) / "model.safetensors").is_file()
    if "predict_with_generate" in keys:
        assert f"eval_{keys['metric_for_best_model']}" in metrics
    if name == "lora_classification":
        merged = AutoModelForSequenceClassification.from_pretrained(printed["merged"])
        assert merged.config.id2label == {0: "even", 1: "odd"}
    if name == "distill_tiny":
        from datasets import load_from_disk

        check_teacher_columns(load_from_disk(folder / f"{name}_cache"), AutoTokenizer.from_pretrained(base))


@pytest.mark.parametrize("name", OURS)
def test_recipe_keys_exist_and_are_documented(name):
    lines = RECIPES[name].read_text().splitlines()
    assert lines[0].startswith(f"# {name}.yaml · ")
    keys = set(yaml.safe_load(RECIPES[name].read_text()))
    script = load_script(VERB_OF[name])
    known = {key for cls in argument_classes(script) for key in cls.__dataclass_fields__}
    assert keys <= known
    # a number that says nothing by itself needs a word; the Trainer's own names are known
    own = {key for cls in argument_classes(script) if cls is not TrainArgs for key in cls.__dataclass_fields__}
    documented = sum("#" in line for line in lines[1:])
    assert documented >= len(lines[1:]) / 4
    assert own & keys


def test_resume_continues_and_streaming_trains(ground):
    folder, dataset = ground
    overrides = [*TINY_SHAPE, f"--tokenizer={folder / 'causal'}", "--save_strategy=steps", "--save_steps=1"]
    output = folder / "resumed"
    first = run_verb("train_tiny", dataset, output, [*overrides, "--streaming=true"])
    assert first["resumed_from"] is None
    again = run_verb("train_tiny", dataset, output, [*overrides, "--streaming=true", "--resume=true", "--max_steps=3"])
    assert again["resumed_from"].endswith("checkpoint-2")


def test_defaults_need_no_recipe():
    model, shape, data, args = parse_args((ModelArgs, ArchitectureArgs, DataArgs, TrainArgs), ["--output_dir=x"])
    assert (model.model, shape.hidden_size, data.dataset, args.resume) == (None, 256, "python", False)


@pytest.mark.parametrize("base", [None, "causal", "seq2seq"])
@pytest.mark.parametrize("task, metric", [("classification", "accuracy"), ("extractive-qa", "f1")])
def test_head_follows_the_task_from_training_to_evaluation(task, metric, base, ground, tmp_path):
    folder, dataset = ground
    columns = {"classification": "text=sentence,label=label", "extractive-qa": "question=question,answers=answers"}
    argv = [f"--task={task}", f"--columns={columns[task]}", "--max_source_length=48"]
    start = [*TINY_SHAPE, "--vocab_size=300"] if base is None else [f"--model={folder / base}"]
    metrics = run_verb("train_tiny", dataset, tmp_path / "run", [*argv, *start])
    assert metrics["eval_loss"] > 0
    script = load_script("evaluate")
    given = [f"--model={tmp_path / 'run'}", f"--dataset={dataset}", "--split=validation", "--resamples=0", *argv]
    found = script.main(*parse_args(argument_classes(script), [*given, f"--output={tmp_path / 'x.json'}"]))
    assert 0 <= found[metric] <= 100


def test_tasks_without_text_are_not_distilled(ground):
    folder, dataset = ground
    with pytest.raises(SystemExit, match="classification generates no text"):
        run_verb("distill_tiny", dataset, folder / "none", [f"--teacher={folder / 'causal'}", "--task=classification"])


def test_dropout_of_a_loaded_model_changes_only_when_asked(tmp_path, tiny_config):
    FlashLiteForConditionalGeneration(tiny_config(dropout_rate=0.3, is_encoder_decoder=True)).save_pretrained(tmp_path)
    for asked, expected in ((None, 0.3), (0.0, 0.0)):
        shape, task = ArchitectureArgs(dropout_rate=asked), TaskData(get_task("translation"), {}, True)
        model = load_model(ModelArgs(model=str(tmp_path)), shape, None, task)
        assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {expected}


def test_missing_teacher_or_model_is_one_sentence(ground):
    _, dataset = ground
    script = load_script("distill")
    with pytest.raises(SystemExit, match="--teacher"):
        script.main(*parse_args(argument_classes(script), [f"--dataset={dataset}", "--output_dir=x"]))
    script = load_script("finetune")
    with pytest.raises(SystemExit, match="--model"):
        script.main(*parse_args(argument_classes(script), [f"--dataset={dataset}", "--output_dir=x"]))


def test_curves_of_runs_are_drawn(ground, tmp_path):
    folder, _ = ground
    script = load_script("plot")
    argv = [f"--runs=a={folder / 'causal'},a={folder / 'causal'},b={folder / 'seq2seq'}", f"--output={tmp_path}/x.svg"]
    assert set(script.main(*parse_args([script.PlotArgs], argv))) == {"output", "a", "b"}
    with pytest.raises(SystemExit, match="logged no 'lss'"):
        script.main(*parse_args([script.PlotArgs], [*argv, "--key=lss"]))
    compared = {"runs": [{"choice": "c", "curve": [{"step": n, "loss": 3 / n} for n in (1, 2)]}] * 2}
    for content in (compared, {"curves": {"c": [[[1, 3.0], [2, 1.5]]]}}):
        (tmp_path / "compared.json").write_text(json.dumps(content))
        argv = [f"--runs={tmp_path}/compared.json", f"--output={tmp_path}/y.svg"]
        assert script.main(*parse_args([script.PlotArgs], argv))["c"] == 1.5
    with pytest.raises(SystemExit, match="no curves of 'kd'"):
        (tmp_path / "compared.json").write_text(json.dumps(compared))
        script.main(*parse_args([script.PlotArgs], [*argv, "--key=kd"]))


TEXT_RUN = ["--task=text-generation", "--max_source_length=32"]


def refused(verb, *overrides):
    """What a verb says without a recipe; it must not have trained."""
    script = load_script(verb)
    with pytest.raises((ValueError, SystemExit)) as error:
        script.main(*parse_args(argument_classes(script), [*TINY_RUN, *overrides]))
    return str(error.value)


def test_options_that_would_be_ignored_are_refused(ground, tmp_path, capsys):
    folder, dataset = ground
    base = [f"--dataset={dataset}", f"--output_dir={tmp_path / 'x'}"]
    model, teacher = f"--model={folder / 'causal'}", f"--teacher={folder / 'causal'}"
    assert "hidden_size is 64, but" in refused("train", *base, model, "--hidden_size=64")
    assert "num_hidden_layers is 9" in refused("distill", *base, teacher, "--keep_layers=1", "--num_hidden_layers=9")
    assert "leave out one" in refused("distill", *base, teacher, model, "--keep_layers=1")
    assert "encoder_decoder is True" in refused("train", *base, model, "--encoder_decoder=true")
    assert "have no single answer" in refused("train", *base, model, "--predict_with_generate=true")
    measured = refused("train", *base, model, "--metric_for_best_model=rougeL")
    assert "'rougeL', but an evaluation measures loss; predict_with_generate adds" in measured
    assert "nothing to merge" in refused("finetune", *base, model, "--lora_r=0", "--merge=true")
    assert not (tmp_path / "x" / "model.safetensors").exists()
    with pytest.raises(SystemExit):
        parse_args((TrainArgs,), ["--resume_from_checkpoint=/nonexistent"])
    assert "resume_from_checkpoint is /nonexistent, which has no trainer_state.json" in capsys.readouterr().err


def test_settings_without_weights_can_change(ground, tmp_path, caplog):
    folder, dataset = ground
    overrides = [f"--model={folder / 'causal'}", "--relevance_top_k=1", "--memory_blocks=3", "--dropout_rate=0.3"]
    run_verb("train_tiny", dataset, tmp_path / "a", overrides)
    config = FlashLiteConfig.from_pretrained(tmp_path / "a")
    assert (config.relevance_top_k, config.memory_blocks, config.dropout_rate) == (1, 3, 0.3)
    overrides = [f"--teacher={folder / 'causal'}", "--keep_layers=1", "--dropout_rate=0.2", "--k=4"]
    run_verb("distill_tiny", dataset, tmp_path / "b", overrides)
    config = FlashLiteConfig.from_pretrained(tmp_path / "b")
    assert (config.num_hidden_layers, config.hidden_size, config.dropout_rate) == (1, 32, 0.2)


def test_a_run_continues_from_the_checkpoint_that_is_named(ground, tmp_path):
    _, dataset = ground
    base = [*TINY_SHAPE, "--vocab_size=300", "--save_strategy=steps", "--save_steps=1"]
    run_verb("train_tiny", dataset, tmp_path / "a", base)
    first = tmp_path / "a" / "checkpoint-1"
    again = run_verb("train_tiny", dataset, tmp_path / "a", [*base, f"--resume_from_checkpoint={first}"])
    assert again["resumed_from"] == str(first)


def test_generated_text_is_measured_in_training(ground, tmp_path):
    _, dataset = ground
    overrides = [*TINY_SHAPE, "--vocab_size=300", "--predict_with_generate=true", "--metric_for_best_model=bleu"]
    overrides += ["--load_best_model_at_end=true", "--eval_strategy=steps", "--save_strategy=steps", "--eval_steps=1"]
    overrides += ["--save_steps=1", "--patience=1", "--max_steps=6", "--learning_rate=0"]  # nothing gets better
    metrics = run_verb("train_translation", dataset, tmp_path / "a", overrides)
    assert 0 <= metrics["eval_bleu"] <= 100 and 0 <= metrics["eval_chrf"] <= 100
    assert json.loads((tmp_path / "a" / "trainer_state.json").read_text())["global_step"] == 2
    with pytest.raises(SystemExit):
        parse_args((TrainArgs,), ["--patience=2"])


def test_a_chat_model_stops_at_the_end_of_a_turn(ground, tmp_path):
    _, dataset = ground
    overrides = [*TINY_SHAPE, "--vocab_size=300", "--encoder_decoder=false"]
    run_verb("train_chat", dataset, tmp_path / "a", overrides)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    kept = GenerationConfig.from_pretrained(tmp_path / "a")
    assert kept.eos_token_id == [tokenizer.eos_token_id, end]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "say 1"}], add_generation_prompt=True)
    ids = torch.tensor([prompt["input_ids"]])

    def only_ends(ids, scores):  # what follows is the end of a turn, or of a text
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([end]), 0.0)

    written = model.generate(ids, max_new_tokens=8, logits_processor=LogitsProcessorList([only_ends]))
    assert written[0, ids.shape[1] :].tolist() == [end]
    run_verb("lora_tiny", dataset, tmp_path / "b", [f"--model={tmp_path / 'a'}", "--task=chat", "--lora_r=2"])
    for place in (tmp_path / "b", tmp_path / "b" / "merged"):
        assert GenerationConfig.from_pretrained(place).eos_token_id == kept.eos_token_id


def test_adapters_merge_into_a_coded_base(ground, tmp_path):
    folder, dataset = ground
    coded = AutoModelForCausalLM.from_pretrained(folder / "causal", quantization_config=EcqConfig(target_bits=4.5))
    coded.save_pretrained(tmp_path / "coded")
    AutoTokenizer.from_pretrained(folder / "causal").save_pretrained(tmp_path / "coded")
    metrics = run_verb("lora_tiny", dataset, tmp_path / "a", [f"--model={tmp_path / 'coded'}", "--lora_r=2"])
    merged = AutoModelForCausalLM.from_pretrained(metrics["merged"])
    assert merged.is_quantized and merged.config.quantization_config.target_bits == 4.5
    ids = torch.arange(3, 20)[None]
    assert torch.isfinite(merged(ids).logits).all()


def test_adapters_of_a_classifier_keep_its_classes(ground, tmp_path):
    folder, _ = ground
    names = ["c", "a", "b"]
    rows = [{"text": f"number {i}", "label": i % 3} for i in range(12)]
    data = Dataset.from_list(rows).cast_column("label", ClassLabel(names=names))
    data.to_parquet(tmp_path / "train.parquet")
    overrides = [f"--model={folder / 'causal'}", "--lora_r=2", "--columns=text=text"]
    run_verb("lora_classification", f"train={tmp_path}/train.parquet", tmp_path / "adapter", overrides)
    script = load_script("evaluate")
    argv = [f"--model={tmp_path / 'adapter'}", "--task=classification", f"--dataset=test={tmp_path}/train.parquet"]
    argv += [f"--output={tmp_path / 'out.json'}", "--resamples=0", f"--predictions={tmp_path / 'found.json'}"]
    metrics = script.main(*parse_args(argument_classes(script), argv))
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["references"] for row in found] == [row["label"] for row in rows]
    right = sum(row["prediction"] == row["references"] for row in found)
    assert metrics["accuracy"] == pytest.approx(100 * right / len(rows))
    assert "labels" not in json.loads((tmp_path / "out.json").read_text())["details"]


def test_recipes_of_a_float_model_train_a_llama(ground, tmp_path):
    folder, dataset = ground
    tokenizer = AutoTokenizer.from_pretrained(folder / "causal")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids)).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    script = load_script("quantize")
    argv = [f"--config={RECIPES['qat_lm']}", f"--dataset={dataset}", *TINY_RUN]
    argv += [f"--model={tmp_path / 'llama'}", f"--output_dir={tmp_path / 'q'}", "--target_bits=4.5"]
    argv += ["--calibration_batches=2", "--warmup_steps=0"]
    metrics = script.main(*parse_args(argument_classes(script), argv))
    assert metrics["bits_per_weight"] > 0 and AutoModelForCausalLM.from_pretrained(tmp_path / "q").is_quantized
    config = LlamaConfig.from_pretrained(tmp_path / "llama")
    assert shape_changes(ArchitectureArgs(dropout_rate=0.0), config, "it") == {"attention_dropout": 0.0}
    with pytest.raises(ValueError, match="llama models have no dropout in their residual branches"):
        shape_changes(ArchitectureArgs(dropout_rate=0.1), config, "it")
    changes = shape_changes(ArchitectureArgs(dropout_rate=0.1), GPT2Config(), "it")
    assert changes == {"resid_pdrop": 0.1, "embd_pdrop": 0.1}


def test_a_cache_of_other_answers_is_made_anew_or_refused(ground, tmp_path):
    folder, dataset = ground
    base = [f"--teacher={folder / 'causal'}", *TINY_SHAPE]

    def cached(*overrides, output="a"):
        run_verb("distill_tiny", dataset, tmp_path / output, [*base, "--annotate_only=true", *overrides])
        place = next((word.partition("=")[2] for word in overrides if "teacher_cache" in word), None)
        rows = load_from_disk(place or tmp_path / output / "teacher_cache")
        return json.loads(rows[0]["teacher_info"]), len(rows)

    first, rows = cached("--k=4")
    written = (tmp_path / "a" / "teacher_cache" / "state.json").stat().st_mtime_ns
    assert cached("--k=4") == (first, rows)
    assert (tmp_path / "a" / "teacher_cache" / "state.json").stat().st_mtime_ns == written  # read, not made
    assert cached("--k=5")[0]["k"] == 5 and cached("--mode=topk", "--k=4")[0]["mode"] == "topk"
    other, fewer = cached("--k=4", "--limit=4")
    assert fewer < rows and other["data"] != first["data"] and other["weights"] == first["weights"]
    named = f"--teacher_cache={tmp_path / 'named'}"
    cached(named, "--k=4")
    for change in ("--k=5", "--limit=4", "--temperature=3"):
        with pytest.raises(ValueError, match="named has .* instead of"):
            cached(named, *dict.fromkeys(["--k=4", change]))
    assert not list(tmp_path.rglob("*.incomplete"))


def test_a_teacher_of_another_vocabulary_is_refused(ground, tmp_path):
    folder, dataset = ground
    train_tokenizer(["another text entirely " * 9], 300).save_pretrained(tmp_path / "tokenizer")
    overrides = [f"--teacher={folder / 'causal'}", f"--tokenizer={tmp_path / 'tokenizer'}", *TINY_SHAPE]
    with pytest.raises(ValueError, match="and they differ"):
        run_verb("distill_tiny", dataset, tmp_path / "x", overrides)


def test_a_classifier_keeps_the_order_that_it_has_learned(ground, tmp_path):
    _, dataset = ground
    overrides = [*TINY_SHAPE, "--vocab_size=300", "--task=classification", "--columns=text=sentence"]
    run_verb("train_classification", dataset, tmp_path / "a", overrides)
    table = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a").config.id2label
    assert table == {0: "even", 1: "odd"}
    for order, after in (("odd,even", table), ("odd,even,none", dict(enumerate(("odd", "even", "none"))))):
        names = order.split(",")
        rows = [{"text": f"number {i}", "label": names[i % len(names)]} for i in range(12)]
        parts = {
            name: Dataset.from_list(rows).cast_column("label", ClassLabel(names=names)) for name in ("train", "dev")
        }
        for name, part in parts.items():
            part.to_parquet(tmp_path / f"{name}.parquet")
        again = f"train={tmp_path}/train.parquet,validation={tmp_path}/dev.parquet"
        run_verb("train_classification", again, tmp_path / "b", [f"--model={tmp_path / 'a'}", "--columns=text=text"])
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "b")
        assert model.config.id2label == after and model.score.out_features == len(after)


@pytest.mark.parametrize("path", sorted((SCRIPTS / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_configurations_are_understood(path):
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig) and config.num_processes > 1


def test_prompts_of_a_decoder_stand_before_its_labels():
    ids = torch.tensor([[5, 6, 7, 8, 0], [1, 2, 3, 4, 9]])
    labels = torch.tensor([[-100, 6, 7, -100, -100], [-100, -100, -100, 4, 9]])
    prompts, mask = prompts_of(ids, labels, 0)
    assert prompts.tolist() == [[0, 0, 5], [1, 2, 3]] and mask.tolist() == [[0, 0, 1], [1, 1, 1]]
