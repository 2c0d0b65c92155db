"""Is a converted model its parent? Logits of both on several short texts, in float32 and against float64.

python scripts/studies/parity.py --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

from dataclasses import asdict, dataclass, field
from pydoc_data.topics import topics

from modeling_flashlite.cli import finish, start
from modeling_flashlite.measure.parity import logit_parity
from modeling_flashlite.measure.results import write_results
from modeling_flashlite.training.conversion import parent_of, transplant
from modeling_flashlite.training.source import open_source


@dataclass
class StudyArgs:
    model: str = field(metadata={"help": "folder, Hub id or .gguf file of a model to convert"})
    texts: int = field(default=8, metadata={"help": "texts, from places spread over Python's language topics"})
    tokens: int = field(default=48, metadata={"help": "tokens of a text"})
    output: str = field(default="runs/results/parity.json", metadata={"help": "results file"})
    note: str | None = field(default=None, metadata={"help": "about the checkpoint, for the results file"})


def main(args: StudyArgs) -> dict:
    source = open_source(args.model)
    model, tokenizer = transplant(source), source.tokenizer()
    parent = parent_of(model, source.config)
    text, rows = "\n\n".join(topics.values()), []
    for index in range(args.texts):
        part = text[index * len(text) // args.texts :][: 16 * args.tokens]
        ids = tokenizer(part, return_tensors="pt", verbose=False)["input_ids"][:, : args.tokens]
        rows.append(logit_parity(model.float(), parent.float(), ids))
    metrics = {name: max(row[name] for row in rows) for name in rows[0] if name != "same_choice"}
    metrics["same_choice"] = sum(row["same_choice"] for row in rows) / len(rows)
    write_results(
        args.output,
        metrics,
        task="parity of a converted model",
        dataset="python topics",
        model=args.model,
        config=asdict(args),
        rows=rows,
        dtype="float32",
    )
    return finish({"output": args.output, **metrics})


if __name__ == "__main__":
    start(main, (StudyArgs,), __doc__)
