"""Tasks: their columns, prompts, generation settings and metrics."""

import itertools
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..spelling import did_you_mean
from .conversations import apply_template, messages_of
from .labels import classes_of, label_names
from .loading import column_names, require_columns, text_of

# decoder alone, encoder-decoder
LANGUAGE_MODELS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")


@dataclass(frozen=True)
class Task:
    """A task, declared once for training, distillation, fine-tuning, evaluation and serving.

    Args:
        name (`str`): what it is called on the command line.
        columns (`dict[str, tuple[str, ...]]`): for each role in a row, the usual column names, preferred ones first.
        target (`str`): the role that the model learns to produce.
        prompt (`str`): template of the model's input, with `{role}` placeholders for the other roles.
        metrics (`tuple[str, ...]`): groups of metrics in `metrics.py`; the first number of the first group is the
            headline.
        auto_class (`str`): the transformers class that loads a model for it.
        generation (`dict`): defaults for `generate`.
    """

    name: str
    columns: Mapping[str, tuple[str, ...]]
    target: str
    prompt: str
    metrics: tuple[str, ...]
    auto_class: str = "AutoModelForSeq2SeqLM"
    generation: Mapping[str, int | float | bool] = field(default_factory=dict)
    instruction: str | None = None

    @property
    def generates(self) -> bool:
        """Whether the answer is generated text, which both kinds of language models can produce."""
        return self.auto_class in LANGUAGE_MODELS

    def auto_class_for(self, encoder_decoder: bool) -> str:
        """The transformers class that loads a model of that kind for this task."""
        return LANGUAGE_MODELS[encoder_decoder] if self.generates else self.auto_class


_ANSWERS = ("answers", "answer", "target")
TASKS = {
    task.name: task
    for task in (
        Task(
            name="translation",
            columns={"source": ("source", "src"), "target": ("target", "tgt")},
            target="target",
            prompt="{source}",
            metrics=("bleu", "chrf"),
            generation={"num_beams": 4, "max_new_tokens": 128},
            instruction="Translate from {source_column} to {target_column}.\n\n{source}",
        ),
        Task(
            name="text2text-generation",
            columns={"source": ("source", "question", "text"), "target": ("target", "answer", "summary")},
            target="target",
            prompt="{source}",
            metrics=("rouge", "bleu"),
            generation={"max_new_tokens": 128},
        ),
        Task(
            name="summarization",
            columns={
                "document": ("document", "article", "dialogue", "text", "source"),
                "summary": ("summaries", "summary", "highlights", "target"),
            },
            target="summary",
            prompt="{document}",
            metrics=("rouge",),
            generation={"num_beams": 4, "max_new_tokens": 128, "no_repeat_ngram_size": 3},
            instruction="Summarize in one or two sentences.\n\n{document}",
        ),
        Task(
            name="extractive-qa",
            columns={"question": ("question",), "context": ("context",), "answers": _ANSWERS},
            target="answers",
            prompt="{question}",
            metrics=("squad",),
            auto_class="AutoModelForQuestionAnswering",
        ),
        Task(
            name="abstractive-qa",
            columns={"question": ("question",), "context": ("context",), "answers": _ANSWERS},
            target="answers",
            prompt="question: {question} context: {context}",
            metrics=("squad", "rouge"),
            generation={"max_new_tokens": 48},
            instruction="{context}\n\nAnswer with a few words of this text: {question}",
        ),
        Task(
            name="chat",
            columns={"messages": ("messages", "conversations", "conversation")},
            target="messages",
            prompt="{messages}",
            metrics=("bleu", "rouge"),
            auto_class="AutoModelForCausalLM",
            generation={"max_new_tokens": 96},
        ),
        Task(
            name="text-generation",
            columns={"text": ("text", "content", "document")},
            target="text",
            prompt="{text}",
            metrics=("perplexity",),
            auto_class="AutoModelForCausalLM",
            generation={"max_new_tokens": 128, "do_sample": True, "top_p": 0.95},
        ),
        Task(
            name="classification",
            columns={"text": ("text", "sentence", "review"), "label": ("label", "labels")},
            target="label",
            prompt="{text}",
            metrics=("classification",),
            auto_class="AutoModelForSequenceClassification",
        ),
    )
}


def get_task(name: str) -> Task:
    """Return the task of that name, or raise a `ValueError` that lists them."""
    if name not in TASKS:
        raise ValueError(f"Task {name!r} does not exist; choose one of {', '.join(TASKS)}{did_you_mean(name, TASKS)}.")
    return TASKS[name]


def resolve_columns(
    task: Task, dataset: Dataset | IterableDataset, columns: str | Mapping[str, str] | None = None
) -> dict[str, str]:
    """Map each role of a task to a column.

    Args:
        task (`Task`): names the roles.
        dataset (`Dataset` or `IterableDataset`): has the columns.
        columns (`str` or `dict`, *optional*): `source=en,target=de` or the same as a dict; each other role maps to the
            first of its usual names that exists.

    Returns:
        `dict` from role to column.

    Raises:
        `ValueError`: unknown role, missing column (with the columns there are), or a malformed description.
    """
    if isinstance(columns, str):
        pairs = [pair.partition("=") for pair in columns.split(",") if pair]
        if any(not equals for _, equals, _ in pairs):
            raise ValueError(
                f"columns is {columns!r}, but must read role=column,role=column, e.g. source=en,target=de."
            )
        columns = {role.strip(): column.strip() for role, _, column in pairs}
    columns = dict(columns or {})
    for role in columns:
        if role not in task.columns:
            raise ValueError(
                f"{role!r} is not a role of {task.name}; its roles are {', '.join(task.columns)}: "
                f"write e.g. {next(iter(task.columns))}={columns[role]}."
            )
    available = column_names(dataset)
    for role, usual in task.columns.items():
        columns.setdefault(role, next((name for name in usual if name in available), usual[0]))
        require_columns(dataset, [columns[role]], f"Say which column is the {role}, e.g. --columns {role}=NAME.")
    return columns


@dataclass(frozen=True)
class TaskData:
    """A task resolved for one data set and one kind of model: made once by [`resolve_task`], then passed on.

    Args:
        task (`Task`): what to learn or measure.
        columns (`dict[str, str]`): the column of each role.
        encoder_decoder (`bool`): kind of the model.
        classes (`list[str]`, *optional*): class names in the order of their ids; `None` for tasks without classes.
        prompt (`str`, *optional*): in place of the task's own prompt or instruction.
        shots (`tuple`, *optional*): (prompt, answer) pairs that stand before every prompt.
    """

    task: Task
    columns: Mapping[str, str]
    encoder_decoder: bool
    classes: list[str] | None = None
    prompt: str | None = None
    shots: tuple[tuple[str, str], ...] = ()

    @property
    def templated(self) -> bool:
        """Whether prompts already contain their special tokens: in a chat, and for decoder-only models."""
        return self.task.name == "chat" or not self.encoder_decoder

    @property
    def auto_class(self) -> str:
        """The transformers class that loads the model."""
        return self.task.auto_class_for(self.encoder_decoder)

    def for_model(self, config: PreTrainedConfig) -> "TaskData":
        """The same task for a loaded model: its kind, and its order of the classes."""
        classes = None if self.classes is None else classes_of(config)
        return replace(self, encoder_decoder=bool(config.is_encoder_decoder), classes=classes)

    def prompt_of(self, row: Mapping, instruct: bool) -> str:
        """Input for a row by the prompt given, else by the task's own; `instruct` prefers its instruction."""
        template = self.prompt or (instruct and self.task.instruction) or self.task.prompt
        parts = {f"{role}_column": column for role, column in self.columns.items()}
        parts |= {role: text_of(row[column]) for role, column in self.columns.items() if role != self.task.target}
        return template.format(**parts)

    def with_shots(self, rows: Iterable[Mapping], count: int, instruct: bool) -> "TaskData":
        """The same task with the first `count` rows that have an answer as examples before every prompt.

        Raises:
            `ValueError`: the task or the kind of model takes no examples, or there are fewer rows.
        """
        if self.encoder_decoder or not self.task.generates or self.task.name in ("chat", "text-generation"):
            raise ValueError(
                f"shots is {count}, but {self.task.name} by this kind of model takes no examples; leave it out."
            )
        answered = ((row, references_of(row[self.columns[self.task.target]])) for row in rows)
        pairs = ((self.prompt_of(row, instruct), found[0]) for row, found in answered if found)
        shots = tuple(itertools.islice(pairs, count))
        if len(shots) < count:
            raise ValueError(f"shots is {count}, but only {len(shots)} rows have an answer; ask for fewer.")
        return replace(self, shots=shots)


def resolve_task(
    task: Task,
    dataset: Dataset | IterableDataset,
    *,
    columns: str | Mapping[str, str] | None = None,
    encoder_decoder: bool = True,
    config: PreTrainedConfig | None = None,
    prompt: str | None = None,
) -> TaskData:
    """Resolve a task for a data set.

    Args:
        task (`Task`): what to learn or measure.
        dataset (`Dataset` or `IterableDataset`): rows.
        columns (`str` or `dict`, *optional*): see [`resolve_columns`].
        encoder_decoder (`bool`, *optional*, defaults to `True`): kind of the model, where there is no `config`.
        config (`PreTrainedConfig`, *optional*): of a loaded model, which decides its kind and the order of the
            classes; without it the classes are those of the data set.
        prompt (`str`, *optional*): in place of the task's own, with `{role}` placeholders; `\\n` is a new line.

    Raises:
        `ValueError`: an unknown placeholder, or see [`resolve_columns`] and [`label_names`].
    """
    found = resolve_columns(task, dataset, columns)
    if config is not None:
        encoder_decoder = bool(config.is_encoder_decoder)
    prompt = None if prompt is None else _checked_prompt(task, prompt.replace("\\n", "\n"))
    if task.target != "label":
        return TaskData(task, found, encoder_decoder, prompt=prompt)
    classes = label_names(dataset, found["label"]) if config is None else classes_of(config)
    return TaskData(task, found, encoder_decoder, classes, prompt)


def _checked_prompt(task: Task, prompt: str) -> str:
    roles = [role for role in task.columns if role != task.target]
    if not task.generates or task.name in ("chat", "text-generation"):
        raise ValueError(f"prompt is {prompt!r}, but {task.name} has no prompt; leave it out.")
    try:
        used = {name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None}
    except ValueError as error:
        raise ValueError(f"prompt is {prompt!r}: {error}; write {{{{ for a brace.") from error
    known = {*roles, *(f"{role}_column" for role in task.columns)}
    if not used & set(roles) or not used <= known:
        raise ValueError(
            f"prompt is {prompt!r}, but must name {' and '.join(f'{{{role}}}' for role in roles)}, and nothing else."
        )
    return prompt


def references_of(value: Any) -> list[str]:
    """Accepted answers of a cell: a text or a number, a list of them, or of SQuAD's forms; none for an empty cell.

    SQuAD's forms are `{"text": [...]}`, as on the Hub, and `[{"text": ...}, ...]`, as in its own files.

    Raises:
        `ValueError`: the cell holds anything else.
    """

    def text_in(part):
        return part["text"] if isinstance(part, Mapping) and "text" in part else part

    found = text_in(value)
    answers = [text_in(part) for part in found] if isinstance(found, list | tuple) else [found]
    for answer in answers:
        if not isinstance(answer, str | int | float | None):
            raise ValueError(
                f"An answer is {answer!r}, but must be a text, or a mapping with a 'text'; convert or drop it."
            )
    return [text_of(answer) for answer in answers if answer is not None]


def texts_of(value: object) -> list[str]:
    """All texts in a cell: a string, a list, messages or SQuAD's answers; numbers have none."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return texts_of(next((value[key] for key in ("content", "value", "text") if key in value), None))
    if isinstance(value, Sequence):
        return [text for part in value for text in texts_of(part)]
    return []


def chat_turns(messages: list[dict]) -> list[tuple[list[dict], str]]:
    """Split a conversation into (history, reply) pairs, one for each turn in which the assistant says something."""
    return [
        (messages[:turn], message["content"])
        for turn, message in enumerate(messages)
        if message["role"] == "assistant" and turn and message["content"]
    ]


def prompts_and_references(
    data: TaskData, row: Mapping, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, list[str]]]:
    """Turn one row into (prompt, accepted answers) pairs, as text: one pair, or one per assistant turn of a chat.

    A decoder-only model gets the prompt, after the examples, inside the tokenizer's chat template if it has one, else
    with a newline after it; an encoder-decoder model gets the prompt as it is.
    """
    task, columns = data.task, data.columns
    if task.name == "chat":
        return [
            (apply_template(tokenizer, history, tokenize=False, add_generation_prompt=True), [reply])
            for history, reply in chat_turns(messages_of(row[columns["messages"]]))
        ]
    prompt = data.prompt_of(row, tokenizer.chat_template is not None and not data.encoder_decoder)
    references = references_of(row[columns[task.target]])
    if data.encoder_decoder:
        return [(prompt, references)]
    if tokenizer.chat_template is None:
        return [("".join(f"{asked}\n{answer}\n\n" for asked, answer in data.shots) + prompt + "\n", references)]
    turns = [*(text for shot in data.shots for text in shot), prompt]
    messages = [{"role": "assistant" if turn % 2 else "user", "content": text} for turn, text in enumerate(turns)]
    return [(apply_template(tokenizer, messages, tokenize=False, add_generation_prompt=True), references)]
