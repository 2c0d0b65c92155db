"""Evaluate a model on a task and write one results file: metrics with intervals, speed, memory, size.

python scripts/evaluate.py --model runs/de --task translation --dataset test=test.jsonl --columns source=en,target=de
python scripts/evaluate.py --model runs/de --task translation --dataset test=test.jsonl --metrics mine.py
python scripts/evaluate.py --model runs/lm --task text-generation --dataset test=wiki.test.txt --end newline
python scripts/evaluate.py --model runs/smol --task long-context --lengths 2048,4096,8192
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel, set_seed

import modeling_flashlite  # noqa: F401  registers the Auto classes
from modeling_flashlite.checkpoint import CheckpointArgs, read_config, read_tokenizer
from modeling_flashlite.cli import finish, start
from modeling_flashlite.data.loading import load_data, pick_split
from modeling_flashlite.data.tasks import Task, TaskData, get_task, resolve_task, text_of
from modeling_flashlite.measure.cost import measure_generation, model_size, peak_memory_bytes
from modeling_flashlite.measure.evaluation import evaluate_task
from modeling_flashlite.measure.long_context import KINDS, evaluate_long_context, plot_depths
from modeling_flashlite.measure.own_metrics import load_metrics, score_predictions
from modeling_flashlite.measure.results import read_results, write_json, write_results

# the start of a text that is continued when the speed of text generation is measured
PROMPT_CHARACTERS = 400


@dataclass
class DataArgs:
    task: str = field(metadata={"help": "name of a task in tasks.py, or long-context"})
    dataset: str | None = field(
        default=None, metadata={"help": "python, local files (test=a.jsonl.xz), or a Hub id; long-context needs none"}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "configuration of a Hub data set"})
    split: str = field(default="test", metadata={"help": "split to evaluate on"})
    columns: str | None = field(default=None, metadata={"help": "role=column,role=column, e.g. source=en,target=de"})
    limit: int | None = field(default=None, metadata={"help": "rows to evaluate; all if unset"})
    streaming: bool = field(default=False, metadata={"help": "read the data as it is needed"})
    label: str | None = field(default=None, metadata={"help": "name of the data set in tables; as given if unset"})


@dataclass
class EvalArgs:
    output: str | None = field(
        default=None, metadata={"help": "results file; runs/results/<model>-<task>.json if unset"}
    )
    predictions: str | None = field(default=None, metadata={"help": "file for the predictions, as JSON"})
    memory_blocks: int | None = field(
        default=None, metadata={"help": "blocks of segment memory; the checkpoint's own"}
    )
    batch_size: int = field(default=16, metadata={"help": "rows at a time"})
    max_source_length: int = field(default=512, metadata={"help": "tokens of an input"})
    num_beams: int | None = field(default=None, metadata={"help": "beams; the task's own if unset"})
    max_new_tokens: int | None = field(default=None, metadata={"help": "tokens of an answer; the task's own if unset"})
    segment_length: int = field(default=512, metadata={"help": "text generation: tokens read at once"})
    stride: int | None = field(
        default=None, metadata={"help": "text generation without memory: tokens between windows"}
    )
    streams: int = field(default=1, metadata={"help": "text generation: parallel streams, or windows at a time"})
    no_memory: bool = field(default=False, metadata={"help": "text generation: read every segment by itself"})
    end: str = field(default="eos", metadata={"help": "text generation: what closes a row, eos or newline"})
    metrics: list[str] = field(
        default_factory=list, metadata={"help": "further metrics of `evaluate`: .py files, or names on the Hub"}
    )
    resamples: int = field(default=1000, metadata={"help": "of the bootstrap; 0 for no intervals"})
    speed_prompts: int = field(default=16, metadata={"help": "batch whose generation is timed; 0 for none"})
    speed_tokens: int = field(default=32, metadata={"help": "tokens generated when timed"})
    seed: int = field(default=0, metadata={"help": "for sampling"})
    lengths: str = field(default="1024,2048,4096", metadata={"help": "long-context: tokens of a text, comma between"})
    kinds: str = field(default=",".join(KINDS), metadata={"help": "long-context: what to look for, comma between"})
    depths: int = field(default=5, metadata={"help": "long-context: places of the answer, from beginning to end"})
    samples: int = field(default=2, metadata={"help": "long-context: texts of each kind, length and depth"})
    teacher_results: str | None = field(
        default=None, metadata={"help": "results file of its teacher, for the model card"}
    )
    float_results: str | None = field(default=None, metadata={"help": "results file of it before quantization"})


def load_model(args: CheckpointArgs, task: Task, memory_blocks: int | None = None) -> PreTrainedModel:
    """Load the model with the head of the task; for generation, the class follows the checkpoint's kind."""
    config = read_config(args.model, **args.hub)
    if memory_blocks is not None:
        config.get_text_config(decoder=True).memory_blocks = memory_blocks
    auto = getattr(transformers, task.auto_class_for(config.is_encoder_decoder))
    options = {"config": config, "dtype": args.dtype, "output_loading_info": True, **args.hub}
    model, info = auto.from_pretrained(args.model, **options)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{args.model} has no weights for {', '.join(missing[:3])}, {len(missing)} in all: it was not trained for"
            f" {task.name}; name the task that it was trained for, or train it for this one."
        )
    return model.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def main(model_args: CheckpointArgs, data_args: DataArgs, eval_args: EvalArgs) -> dict:
    set_seed(eval_args.seed)
    if data_args.task == "long-context":
        return long_context(model_args, eval_args)
    if data_args.dataset is None:
        raise ValueError(f"no data set is given for {data_args.task}; pass --dataset.")
    task = get_task(data_args.task)
    if eval_args.metrics and task.name == "text-generation":
        raise ValueError("text-generation makes no predictions to compare with --metrics; choose another task.")
    own_metrics = load_metrics(eval_args.metrics) if eval_args.metrics else None
    splits = load_data(
        data_args.dataset,
        name=data_args.dataset_name,
        streaming=data_args.streaming,
        limit=data_args.limit,
        columns=data_args.columns,
    )
    rows = pick_split(splits, data_args.split)
    tokenizer = read_tokenizer(model_args.model, **model_args.hub)
    model = load_model(model_args, task, eval_args.memory_blocks)
    data = resolve_task(task, rows, columns=data_args.columns, config=model.config)
    chosen = {"num_beams": eval_args.num_beams, "max_new_tokens": eval_args.max_new_tokens}
    result = evaluate_task(
        data,
        model,
        tokenizer,
        rows,
        batch_size=eval_args.batch_size,
        max_source_length=eval_args.max_source_length,
        generation={name: value for name, value in chosen.items() if value is not None},
        likelihood={
            "segment_length": eval_args.segment_length,
            "stride": eval_args.stride,
            "batch_size": eval_args.streams,
            "memory": False if eval_args.no_memory else None,
            "end": "\n" if eval_args.end == "newline" else None,
        },
        resamples=eval_args.resamples,
    )
    predictions = result.pop("predictions")
    metrics = result.pop("metrics")
    if own_metrics is not None:
        metrics |= score_predictions(own_metrics, predictions)
    if eval_args.predictions:
        write_json(eval_args.predictions, predictions)
    if task.name == "text-generation":
        texts = (text_of(row[data.columns["text"]]) for row in rows)
        prompts = [text[:PROMPT_CHARACTERS] for text in texts if text.strip()]
    else:
        prompts = [given["input"] for given in predictions]
    output = eval_args.output or f"runs/results/{Path(model_args.model).name}-{task.name}.json"
    compared = {"teacher": eval_args.teacher_results, "float": eval_args.float_results}
    compared = {name: read_results([path])[0]["metrics"] for name, path in compared.items() if path}
    write_results(
        output,
        metrics,
        task=task.name,
        dataset=data_args.label or data_args.dataset,
        split=data_args.split,
        model=model_args.model,
        config={**asdict(model_args), **asdict(data_args), **asdict(eval_args)},
        seed=eval_args.seed,
        speed=measure_speed(model, tokenizer, data, prompts, eval_args),
        size={**model_size(model, model_args.model), "peak_memory_bytes": peak_memory_bytes(model.device)},
        dtype=str(model.dtype).removeprefix("torch."),
        **compared,
        **result,
    )
    return finish({"output": output, **metrics})


def long_context(model_args: CheckpointArgs, eval_args: EvalArgs) -> dict:
    """Retrieval from texts made on the spot: a results file, and beside it a plot over length and depth."""
    tokenizer = read_tokenizer(model_args.model, **model_args.hub)
    model = load_model(model_args, get_task("text-generation"), eval_args.memory_blocks)
    output = Path(eval_args.output or f"runs/results/{Path(model_args.model).name}-long-context.json")
    result = evaluate_long_context(
        model,
        tokenizer,
        kinds=eval_args.kinds.split(","),
        lengths=[int(length) for length in eval_args.lengths.split(",")],
        depths=eval_args.depths,
        samples=eval_args.samples,
        seed=eval_args.seed,
    )
    metrics = result.pop("metrics")
    write_results(
        output,
        metrics,
        task="long-context",
        model=model_args.model,
        config={**asdict(model_args), **asdict(eval_args)},
        seed=eval_args.seed,
        dtype=str(model.dtype).removeprefix("torch."),
        **result,
    )
    plot_depths(result["rows"], output.with_suffix(".svg"))
    return finish({"output": str(output), **metrics})


def measure_speed(model: PreTrainedModel, tokenizer, data: TaskData, prompts: list, args: EvalArgs) -> list[dict]:
    """Rows of the results file's `speed`; none for models that do not generate."""
    if not args.speed_prompts or not model.can_generate():
        return []
    options = {"new_tokens": args.speed_tokens, "special_tokens": not data.templated}
    return measure_generation(model, tokenizer, prompts[: args.speed_prompts], **options)


if __name__ == "__main__":
    start(main, (CheckpointArgs, DataArgs, EvalArgs), __doc__)
