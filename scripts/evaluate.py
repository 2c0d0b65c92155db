"""Evaluate a model on a task and write one results file: metrics with intervals, speed, memory, size.

python scripts/evaluate.py --model runs/de --task translation --dataset test=test.jsonl --columns source=en,target=de
python scripts/evaluate.py --model runs/de --task translation --dataset test=test.jsonl --metrics mine.py
python scripts/evaluate.py --model runs/lm --task text-generation --dataset test=wiki.test.txt --end newline
python scripts/evaluate.py --model runs/smol --task long-context --lengths 2048,4096,8192
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import set_seed

from modeling_flashlite.checkpoint import CheckpointArgs, load_for_task, read_tokenizer
from modeling_flashlite.cli import finish, start
from modeling_flashlite.data.batching import row_end
from modeling_flashlite.data.loading import load_data, pick_split, text_of
from modeling_flashlite.data.tasks import get_task, resolve_task
from modeling_flashlite.measure.cost import measure_generation, model_size, peak_memory_bytes
from modeling_flashlite.measure.evaluation import evaluate_task
from modeling_flashlite.measure.long_context import KINDS, evaluate_long_context, plot_depths
from modeling_flashlite.measure.own_metrics import load_metrics, score_predictions
from modeling_flashlite.measure.results import read_results, write_json, write_results

# characters of a text that serve as prompt when the speed of text generation is measured
PROMPT_CHARACTERS = 400


@dataclass
class DataArgs:
    task: str = field(metadata={"help": "name of a task in tasks.py, or long-context"})
    dataset: str | None = field(default=None, metadata={"help": "python, local files (test=a.jsonl.xz), or a Hub id"})
    dataset_name: str | None = field(default=None, metadata={"help": "configuration of a Hub data set"})
    split: str = field(default="test", metadata={"help": "split to evaluate on"})
    columns: str | None = field(default=None, metadata={"help": "role=column,role=column, e.g. source=en,target=de"})
    limit: int | None = field(default=None, metadata={"help": "rows to evaluate; all if unset"})
    prompt: str | None = field(
        default=None, metadata={"help": "input with {role} placeholders; the task's own, or its instruction, if unset"}
    )
    shots: int = field(default=0, metadata={"help": "examples, the first of the train split, before every prompt"})
    streaming: bool = field(default=False, metadata={"help": "read the data as it is needed"})
    label: str | None = field(default=None, metadata={"help": "name of the data set in tables; as given if unset"})


@dataclass
class EvalArgs:
    output: str | None = field(default=None, metadata={"help": "results file; in runs/results if unset"})
    predictions: str | None = field(default=None, metadata={"help": "file for the predictions, as JSON"})
    memory_blocks: int | None = field(default=None, metadata={"help": "of segment memory; the checkpoint's own"})
    batch_size: int = field(default=16, metadata={"help": "rows at a time"})
    max_source_length: int = field(default=512, metadata={"help": "tokens of an input"})
    num_beams: int | None = field(default=None, metadata={"help": "beams; the task's own if unset"})
    max_new_tokens: int | None = field(default=None, metadata={"help": "tokens of an answer; the task's own if unset"})
    segment_length: int = field(default=512, metadata={"help": "text generation: tokens read at once"})
    stride: int | None = field(default=None, metadata={"help": "text generation without memory: step of a window"})
    streams: int = field(default=1, metadata={"help": "text generation: parallel streams, or windows at a time"})
    no_memory: bool = field(default=False, metadata={"help": "text generation: read every segment by itself"})
    end: str = field(default="eos", metadata={"help": "text generation: what closes a row, eos or newline"})
    metrics: list[str] = field(default_factory=list, metadata={"help": "more metrics: .py files, or names on the Hub"})
    resamples: int = field(default=1000, metadata={"help": "of the bootstrap; 0 for no intervals"})
    speed_prompts: int = field(default=16, metadata={"help": "batch whose generation is timed; 0 for none"})
    speed_tokens: int = field(default=32, metadata={"help": "tokens generated when timed"})
    seed: int = field(default=0, metadata={"help": "for sampling"})
    lengths: str = field(default="1024,2048,4096", metadata={"help": "long-context: tokens of a text, comma between"})
    kinds: str = field(default=",".join(KINDS), metadata={"help": "long-context: what to look for, comma between"})
    depths: int = field(default=5, metadata={"help": "long-context: places of the answer, from beginning to end"})
    samples: int = field(default=2, metadata={"help": "long-context: texts of each kind, length and depth"})
    teacher_results: str | None = field(default=None, metadata={"help": "results file of its teacher, for the card"})
    float_results: str | None = field(default=None, metadata={"help": "results file of it before quantization"})


def on_task(model_args: CheckpointArgs, data_args: DataArgs, eval_args: EvalArgs) -> dict:
    """Metrics of a task, speed and size, as fields of the results file."""
    if data_args.dataset is None:
        raise ValueError(f"no data set is given for {data_args.task}; pass --dataset.")
    task = get_task(data_args.task)
    if eval_args.metrics and task.name == "text-generation":
        raise ValueError("text-generation makes no predictions to compare with --metrics; choose another task.")
    own_metrics = load_metrics(eval_args.metrics) if eval_args.metrics else None
    options = {"name": data_args.dataset_name, "streaming": data_args.streaming, "columns": data_args.columns}
    rows = pick_split(load_data(data_args.dataset, limit=data_args.limit, **options), data_args.split)
    tokenizer = read_tokenizer(model_args.model, **model_args.hub)
    model = load_for_task(model_args, task, eval_args.memory_blocks)
    data = resolve_task(task, rows, columns=data_args.columns, config=model.config, prompt=data_args.prompt)
    if data_args.shots:
        instruct = tokenizer.chat_template is not None
        examples = pick_split(load_data(data_args.dataset, **options), "train")  # the limit is that of the evaluation
        data = data.with_shots(examples, data_args.shots, instruct)
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
            "end": row_end(eval_args.end),
        },
        resamples=eval_args.resamples,
    )
    predictions = result.pop("predictions")
    if own_metrics is not None:
        result["metrics"] |= score_predictions(own_metrics, predictions)
    if eval_args.predictions:
        write_json(eval_args.predictions, predictions)
    prompts = [given["input"] for given in predictions]
    if task.name == "text-generation":
        texts = (text_of(row[data.columns["text"]]) for row in rows)
        prompts = [text[:PROMPT_CHARACTERS] for text in texts if text.strip()]
    result |= {"dataset": data_args.label or data_args.dataset, "split": data_args.split, "speed": []}
    if eval_args.speed_prompts and model.can_generate():
        options = {"new_tokens": eval_args.speed_tokens, "special_tokens": not data.templated}
        result["speed"] = measure_generation(model, tokenizer, prompts[: eval_args.speed_prompts], **options)
    result["size"] = model_size(model, model_args.model) | {"peak_memory_bytes": peak_memory_bytes(model.device)}
    result["dtype"] = str(model.dtype).removeprefix("torch.")
    compared = {"teacher": eval_args.teacher_results, "float": eval_args.float_results}
    return result | {name: read_results([path])[0]["metrics"] for name, path in compared.items() if path}


def on_long_context(model_args: CheckpointArgs, data_args: DataArgs, eval_args: EvalArgs) -> dict:
    """Retrieval from generated long texts, as fields of the results file."""
    model = load_for_task(model_args, get_task("text-generation"), eval_args.memory_blocks)
    result = evaluate_long_context(
        model,
        read_tokenizer(model_args.model, **model_args.hub),
        kinds=eval_args.kinds.split(","),
        lengths=[int(length) for length in eval_args.lengths.split(",")],
        depths=eval_args.depths,
        samples=eval_args.samples,
        seed=eval_args.seed,
    )
    return result | {"dtype": str(model.dtype).removeprefix("torch.")}


def main(model_args: CheckpointArgs, data_args: DataArgs, eval_args: EvalArgs) -> dict:
    set_seed(eval_args.seed)
    long = data_args.task == "long-context"
    result = (on_long_context if long else on_task)(model_args, data_args, eval_args)
    metrics = result.pop("metrics")
    output = Path(eval_args.output or f"runs/results/{Path(model_args.model).name}-{data_args.task}.json")
    config = {**asdict(model_args), **asdict(data_args), **asdict(eval_args)}
    named = {"task": data_args.task, "model": model_args.model, "config": config, "seed": eval_args.seed}
    write_results(output, metrics, **named, **result)
    if long:
        plot_depths(result["rows"], output.with_suffix(".svg"))
    return finish({"output": str(output), **metrics})


if __name__ == "__main__":
    start(main, (CheckpointArgs, DataArgs, EvalArgs), __doc__)
