"""What the training scripts share: options, task, tokenizer, model, rows, and the training run."""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from datasets import Dataset, IterableDataset
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainingArguments,
)
from transformers.utils import logging

from ..checkpoint import BASE_CONFIG, load_merged, read_config, read_tokenizer
from ..cli import banner
from ..configuration_flashlite import FlashLiteConfig
from ..data.batching import PaddingCollator, row_end, segment_streams, tokenize_texts
from ..data.labels import class_id, classes_of, ids_by_name
from ..data.loading import column_names, load_data, pick_split
from ..data.preprocessing import preprocess
from ..data.tasks import TaskData, get_task, resolve_task, texts_of
from ..data.tokenization import end_tokens, run_tokenizer
from ..measure.plots import plot_losses
from .checks import Unset, check_folder, check_resume, shape_changes
from .teacher import check_separation
from .trainers import CarefulTrainer, last_checkpoint

__all__ = [
    "ArchitectureArgs",
    "DataArgs",
    "ModelArgs",
    "TrainArgs",
    "load_model",
    "load_rows",
    "load_task",
    "load_tokenizer",
    "make_trainer",
    "run",
]

logger = logging.get_logger(__name__)


@dataclass
class ModelArgs:
    """Which model and tokenizer."""

    model: str | None = field(default=None, metadata={"help": "weights to start from; a new model if unset"})
    tokenizer: str | None = field(default=None, metadata={"help": "its folder or Hub id; the model's own if unset"})
    vocab_size: int = field(default=8192, metadata={"help": "of a tokenizer trained here, where none is given"})
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit on the Hub"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run the code of the repository"})

    @property
    def hub(self) -> dict:
        """Keyword arguments of every `from_pretrained`."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


@dataclass
class ArchitectureArgs:
    """Shape of a new model. A loaded one keeps its shape; only dropout and fields without weights can be changed."""

    hidden_size: int = field(default=Unset(256), metadata={"help": "width of the layers"})
    num_hidden_layers: int = field(default=Unset(6), metadata={"help": "layers of each stack"})
    encoder_layers: int | None = field(default=None, metadata={"help": "layers of the encoder, where they differ"})
    num_attention_heads: int = field(default=Unset(8), metadata={"help": "query heads"})
    num_key_value_heads: int = field(default=Unset(2), metadata={"help": "key-value heads"})
    intermediate_size: int | None = field(default=None, metadata={"help": "width inside the feed-forward layers"})
    embedding_size: int | None = field(default=None, metadata={"help": "width of the embeddings, where it differs"})
    dropout_rate: float | None = field(
        default=None, metadata={"help": "share of activations dropped in training; 0, or the checkpoint's own"}
    )
    position_encoding: str | None = field(default=None, metadata={"help": "transformer_xl or rotary"})
    block_size: int | None = field(default=None, metadata={"help": "tokens of a block of the decoder's attention"})
    sub_block_size: int | None = field(default=None, metadata={"help": "tokens of a sub-block"})
    relevance_top_k: int | None = field(default=None, metadata={"help": "blocks read in full by relevance"})
    memory_blocks: int | None = field(default=None, metadata={"help": "blocks that attention and memory reach back"})


@dataclass
class DataArgs:
    """Which rows, for which task."""

    dataset: str = field(default="python", metadata={"help": "python, local files (train=a.jsonl.xz), or a Hub id"})
    task: str = field(default="text-generation", metadata={"help": "name of a task in tasks.py"})
    encoder_decoder: bool | None = field(
        default=None, metadata={"help": "model kind; the model's own, or the usual one of the task, if unset"}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "configuration of a Hub data set"})
    columns: str | None = field(default=None, metadata={"help": "role=column,role=column, e.g. source=en,target=de"})
    streaming: bool = field(default=False, metadata={"help": "read rows on demand; needs max_steps"})
    limit: int | None = field(default=None, metadata={"help": "rows of every split; all if unset"})
    eval_limit: int | None = field(default=None, metadata={"help": "examples of the validation split; all if unset"})
    max_source_length: int = field(default=512, metadata={"help": "tokens of an input, or of a packed row"})
    max_target_length: int = field(default=128, metadata={"help": "tokens of a target"})
    too_long: str = field(default="truncate", metadata={"help": "rows above the limits: truncate, drop or error"})
    prompt: str | None = field(
        default=None, metadata={"help": "input with {role} placeholders; the task's own, or its instruction, if unset"}
    )
    packed: bool = field(default=False, metadata={"help": "several conversations or answers in one row"})
    segment_length: int | None = field(
        default=None, metadata={"help": "tokens of a segment; turns segment recurrence on"}
    )
    document_column: str | None = field(
        default=None, metadata={"help": "text generation: consecutive rows with the same value are one document"}
    )
    end: str = field(
        default="eos",
        metadata={"help": "text generation: what closes a row; newline if rows are lines of one text"},
    )


@dataclass
class TrainArgs(Seq2SeqTrainingArguments):
    """The Trainer's arguments, and whether a run resumes."""

    output_dir: str = field(default="runs/train", metadata={"help": "checkpoints, model and loss curve"})
    resume: bool = field(default=False, metadata={"help": "continue from the newest complete checkpoint"})
    patience: int | None = field(
        default=None, metadata={"help": "stop after so many evaluations without a better one; never if unset"}
    )

    def __post_init__(self):
        # without an accelerator, the Trainer allows half precision only with use_cpu
        self.use_cpu = self.use_cpu or torch.accelerator.current_accelerator() is None
        super().__post_init__()
        check_resume(self.resume_from_checkpoint)
        if self.patience is not None and not (self.patience > 0 and self.load_best_model_at_end):
            raise ValueError(
                f"patience is {self.patience}, but must be positive, and needs load_best_model_at_end, which keeps "
                "the best checkpoint; set it too."
            )


def is_encoder_decoder(data: DataArgs, model: ModelArgs) -> bool:
    """Kind of model: as requested, else that of the initial model, else the usual one of the task."""
    if data.encoder_decoder is not None:
        return data.encoder_decoder
    if model.model:
        return bool(read_config(model.model, **model.hub).is_encoder_decoder)
    return data.task not in ("text-generation", "chat")


def load_splits(data: DataArgs):
    """The dataset with all its splits."""
    return load_data(
        data.dataset, name=data.dataset_name, streaming=data.streaming, limit=data.limit, columns=data.columns
    )


def load_task(data: DataArgs, model: ModelArgs, splits) -> TaskData:
    """The task, resolved for the training rows and the kind of model.

    Raises:
        ValueError: the columns do not fit the task (see `resolve_columns`), or there are fewer than two classes.
    """
    rows, encoder_decoder = pick_split(splits, "train"), is_encoder_decoder(data, model)
    task = resolve_task(
        get_task(data.task), rows, columns=data.columns, encoder_decoder=encoder_decoder, prompt=data.prompt
    )
    if task.classes is not None and len(task.classes) < 2:  # with a single output, transformers trains a regression
        raise ValueError(
            f"The labels of {data.dataset} are all {task.classes[0]!r}, but 2 classes are needed; check the rows."
        )
    return task


def load_tokenizer(
    model: ModelArgs, task: TaskData, output_dir: str, splits, resume: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer, or train one on the data set's texts and save it in the run's folder.

    A run that resumes keeps the one in its folder; any other run trains it anew unless it was made of the same.
    """
    if source := model.tokenizer or model.model:
        return read_tokenizer(source, **model.hub)
    rows, columns = pick_split(splits, "train"), task.columns.values()
    return run_tokenizer(
        Path(output_dir) / "tokenizer",
        lambda: ("\n".join(texts_of(row[column])) for row in rows for column in columns),
        keep=resume,
        vocab_size=model.vocab_size,
        add_eos_token=task.encoder_decoder,
        total=len(rows) * len(columns) if isinstance(rows, Dataset) else None,
    )


def label_tables(classes: list[str]) -> dict:
    """The two config fields that name the classes."""
    return {"id2label": dict(enumerate(classes)), "label2id": {name: number for number, name in enumerate(classes)}}


def head_changes(config, classes: list[str]) -> dict:
    """Config changes so that a checkpoint's head has `classes`; none if it has learned all of them already.

    A trained head keeps its order of the classes; rows are matched by name.
    """
    known = classes_of(config)
    ids = ids_by_name(known)
    if all(class_id(name, ids) is not None for name in classes):
        return label_tables(known)  # stated explicitly, since the base of an adapter may have other classes
    trained = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    changes = label_tables(classes)
    if trained and len(known) != len(classes):
        changes["ignore_mismatched_sizes"] = True  # the head is initialized anew
    return changes


def load_model(
    model: ModelArgs, shape: ArchitectureArgs, tokenizer: PreTrainedTokenizerBase, task: TaskData
) -> PreTrainedModel:
    """Load the initial model, or make a new one for the tokenizer, with the head of the task.

    A decoder-only model that answers in a chat template gets the end-of-turn token in its generation settings.

    Raises:
        ValueError: the requested kind or shape differs from that of the weights, see [`shape_changes`].
    """
    auto = getattr(transformers, task.auto_class)
    if model.model:
        config = read_config(model.model, **model.hub)
        if bool(config.is_encoder_decoder) != task.encoder_decoder:
            raise ValueError(
                f"encoder_decoder is {task.encoder_decoder}, but {model.model} has {config.is_encoder_decoder}; "
                f"leave it out."
            )
        changed = shape_changes(shape, config, model.model)
        if task.classes is not None:
            changed |= head_changes(config, task.classes)
        loaded = load_merged(auto, model.model, changed, **model.hub)
    else:
        loaded = auto.from_config(new_config(shape, tokenizer, task))
    if task.task.generates and task.task.name != "text-generation" and not task.encoder_decoder:
        stop_at_turns(loaded, tokenizer)
    return loaded


def new_config(shape: ArchitectureArgs, tokenizer: PreTrainedTokenizerBase, task: TaskData) -> FlashLiteConfig:
    """Configuration of a new model for a tokenizer."""
    fields = {name: value for name, value in asdict(shape).items() if value is not None}
    encoder_layers = fields.pop("encoder_layers", None)
    if encoder_layers is not None and not task.encoder_decoder:
        said = f"encoder_layers is {encoder_layers}, but the model has no encoder"
        if "encoder_layers" in getattr(shape, "given", ()):
            raise ValueError(f"{said}; leave it out, or set encoder_decoder.")
        logger.warning(f"{said}: it is left out.")  # a recipe's, whose encoder_decoder the command line overrides
        encoder_layers = None
    # the embedding of a pad token is not trained: where the end of sequence pads, a model that masks needs none
    closes = tokenizer.pad_token_id == tokenizer.eos_token_id and not task.encoder_decoder
    return FlashLiteConfig(
        vocab_size=len(tokenizer),
        pad_token_id=None if closes else tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        is_encoder_decoder=task.encoder_decoder,
        encoder=None if encoder_layers is None else {"num_hidden_layers": encoder_layers},
        **fields,
        **(label_tables(task.classes) if task.classes is not None else {}),
    )


def stop_at_turns(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the end-of-turn token of the chat template to `generation_config.json`, so that every tool stops there."""
    model.generation_config.eos_token_id = end_tokens(tokenizer, model.generation_config)


def load_rows(
    task: TaskData, data: DataArgs, args: Seq2SeqTrainingArguments, tokenizer: PreTrainedTokenizerBase, splits
) -> tuple:
    """Training and validation examples; validation is `None` where the dataset has no such split.

    Raises:
        ValueError: the rows do not fit the task or the limits, or segments are asked for a task other than text
            generation.
    """
    if data.segment_length and task.task.name != "text-generation":
        raise ValueError(
            f"segment_length is {data.segment_length}, but {task.task.name} has no segments; leave it out, or train "
            "for text-generation."
        )
    if data.packed and args.predict_with_generate:
        raise ValueError("packed is set, but an evaluation that generates needs one answer in a row; leave out one.")
    names = ["train"] + [name for name in ("validation", "valid", "val", "dev") if name in splits][:1]
    prepared = []
    with args.main_process_first(desc="prepare the data"):
        for name in names:
            rows, training = pick_split(splits, name), name == "train"
            if data.segment_length:
                examples = _segments(task, data, data.segment_length, args, tokenizer, rows, training)
            else:
                examples = preprocess(
                    task,
                    rows,
                    tokenizer,
                    max_source_length=data.max_source_length,
                    max_target_length=data.max_target_length,
                    too_long=data.too_long,
                    packed=data.packed,
                    **_joining(task, data),
                )
            if isinstance(examples, IterableDataset) and training:
                examples = examples.shuffle(seed=args.seed, buffer_size=10_000)
            if data.eval_limit and not training and not data.segment_length:
                examples = _first(examples, data.eval_limit)
            prepared.append(examples)
    return prepared[0], prepared[1] if len(prepared) > 1 else None


def _joining(task: TaskData, data: DataArgs) -> dict:
    """How rows are joined; for a task that joins none, what a recipe for another task says of it is left out."""
    options = {"document_column": data.document_column, "end": data.end}
    if task.task.name == "text-generation" and not task.encoder_decoder:
        return options
    recipe = [
        name
        for name, value in options.items()
        if value != getattr(DataArgs, name) and name not in getattr(data, "given", (name,))
    ]
    if recipe:
        logger.warning(f"{' and '.join(recipe)} of the recipe is for text generation and is left out.")
    return {name: value for name, value in options.items() if name not in recipe}


def _segments(task: TaskData, data: DataArgs, length: int, args, tokenizer, rows, training: bool) -> Dataset:
    documents = tokenize_texts(rows, tokenizer, task.columns["text"], end=row_end(data.end))
    if data.document_column:
        documents = documents.add_column(data.document_column, rows[data.document_column])
    batch = args.train_batch_size * args.gradient_accumulation_steps if training else args.eval_batch_size
    return segment_streams(
        documents,
        length,
        batch * args.world_size,
        document_column=data.document_column,
        pad_token_id=tokenizer.pad_token_id,
    )


def _first(examples, count: int):
    if isinstance(examples, IterableDataset):
        return examples.take(count)
    return examples.select(range(min(count, len(examples))))


def make_trainer(
    trainer_class: type[CarefulTrainer], model, args, tokenizer, rows: tuple, **options
) -> CarefulTrainer:
    """A trainer of `model` on the `rows` of [`load_rows`]; `options` are further arguments of its class.

    Raises:
        ValueError: the vocabulary exceeds the model's, or the rows are packed and the model attends across documents.
    """
    if "position_ids" in column_names(rows[0]):
        check_separation(model)
    known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if known is not None and len(tokenizer) > known:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, but the model has embeddings for {known} only; use the "
            f"model's own tokenizer."
        )
    if args.patience is not None:
        options["callbacks"] = [*options.get("callbacks", ()), EarlyStoppingCallback(args.patience)]
    return trainer_class(
        model=model,
        args=args,
        train_dataset=rows[0],
        eval_dataset=rows[1],
        data_collator=PaddingCollator(tokenizer, model=model),
        processing_class=tokenizer,
        **options,
    )


def run(trainer: CarefulTrainer, name: str) -> dict:
    """Train, save, evaluate and plot; returns the final metrics.

    `--resume` continues from the newest complete checkpoint, or starts anew if there is none;
    `--resume_from_checkpoint` continues from the given one. The generation settings of the base, which may have a new
    end token, are saved beside adapters.
    """
    args = trainer.args
    check_folder(args.output_dir, adapters=hasattr(trainer.model, "peft_config"))
    if trainer.is_world_process_zero():
        sys.stderr.write(banner(name, trainer.model, args) + "\n")
    checkpoint = args.resume_from_checkpoint or (last_checkpoint(args.output_dir) if args.resume else None)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if hasattr(trainer.model, "peft_config") and trainer.is_world_process_zero():
        if trainer.model.can_generate():
            trainer.model.generation_config.save_pretrained(args.output_dir)
        else:
            trainer.model.config.to_json_file(Path(args.output_dir) / BASE_CONFIG)
    metrics = {**result.metrics, "output_dir": args.output_dir, "resumed_from": checkpoint}
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    if trainer.is_world_process_zero():
        trainer.save_state()
        curve = plot_losses(trainer.state.log_history, Path(args.output_dir) / "loss.svg")
        metrics |= {"loss_curve": None if curve is None else str(curve)}
    if args.push_to_hub:
        trainer.push_to_hub()
    return metrics
