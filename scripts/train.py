"""Train a model from scratch or from a checkpoint, on text or on pairs, with or without segment recurrence.

python scripts/train.py --config scripts/recipes/train_tiny.yaml --max_steps 50
accelerate launch scripts/train.py --config scripts/recipes/train_segments.yaml --learning_rate 2e-4 --resume
"""

from modeling_flashlite.cli import finish, start
from modeling_flashlite.training.checks import task_measures
from modeling_flashlite.training.launch import (
    ArchitectureArgs,
    DataArgs,
    ModelArgs,
    TrainArgs,
    load_model,
    load_rows,
    load_splits,
    load_task,
    load_tokenizer,
    make_trainer,
    run,
)
from modeling_flashlite.training.trainers import CarefulTrainer, SegmentTrainer


def main(model_args: ModelArgs, shape: ArchitectureArgs, data: DataArgs, args: TrainArgs) -> dict:
    splits = load_splits(data)
    task = load_task(data, model_args, splits)
    with args.main_process_first(desc="prepare the tokenizer"):
        tokenizer = load_tokenizer(model_args, task, args.output_dir, splits, args.resume)
    model = load_model(model_args, shape, tokenizer, task)
    measures = task_measures(task.task, args, model, tokenizer, data.max_target_length)
    rows = load_rows(task.for_model(model.config), data, args, tokenizer, splits)
    kind = SegmentTrainer if data.segment_length else CarefulTrainer
    trainer = make_trainer(kind, model, args, tokenizer, rows, **measures)
    return finish(run(trainer, "train"))


if __name__ == "__main__":
    start(main, (ModelArgs, ArchitectureArgs, DataArgs, TrainArgs), __doc__)
