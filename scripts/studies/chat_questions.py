"""Ask chat models 50 short questions with checkable answers, and compare how many each gets right.

python scripts/studies/chat_questions.py --models dense=runs/smol-llama sparse=runs/smol coded=runs/smol-4bit

The questions, ours, stand in chat50.jsonl: facts (one of the answers must occur), arithmetic (likewise, as a whole
number), lists (so many different members of a set), and things that nobody can know (the answer must say so). Greedy
decoding in the model's own chat template; the first model is what the others are compared with.
"""

import json
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import modeling_flashlite  # noqa: F401  registers the architecture
from modeling_flashlite.checkpoint import load_language_model, read_tokenizer
from modeling_flashlite.cli import finish, start
from modeling_flashlite.measure.cost import model_size
from modeling_flashlite.measure.evaluation import generate_texts
from modeling_flashlite.measure.results import write_results

QUESTIONS = Path(__file__).with_name("chat50.jsonl")
# how an answer admits that it cannot be known
ADMISSIONS = (
    r"(do|does|did|could|can|was|am|is|are|were|have|has)(n't|n’t| not) (actually |really |currently |yet )?"
    r"(know|have|find|sure|aware|able|possible|exist|provide|answer|tell|predict|access|familiar|real|happened|"
    r"determine|recall|remember|been|any|a |the ability|specified|mentioned)|cannot|can't|unable|unknown|"
    r"no (information|record|such|way|evidence|data|known|official|publicly)|impossible|fictional|fictitious|"
    r"(not|never) (a real|exist|heard|been)|unfortunately|i'm sorry|i’m sorry|apologi[sz]e|more (information|context)|"
    r"difficult to predict|hard to (say|predict)"
)


@dataclass
class QuestionArgs:
    models: list[str] = field(metadata={"help": "name=folder; the first is the reference"})
    dtype: str = field(default="float32", metadata={"help": "of the models"})
    tokens: int = field(default=64, metadata={"help": "most tokens of an answer"})
    batch: int = field(default=25, metadata={"help": "questions at a time"})
    limit: int | None = field(default=None, metadata={"help": "ask only so many"})
    output: str = field(default="runs/results/chat50.json", metadata={"help": "results file"})


def occurs(wanted: str, text: str) -> bool:
    """Whether one of the words, `|` between them, stands in a text as a word of its own, perhaps in the plural."""
    return any(re.search(rf"(?<!\w){re.escape(word)}(s|es)?(?!\w)", text, re.IGNORECASE) for word in wanted.split("|"))


def is_right(question: dict, answer: str) -> bool:
    """Whether an answer fulfils the rule of its question."""
    if question["kind"] == "invented":
        return re.search(ADMISSIONS, answer, re.IGNORECASE) is not None
    if question["kind"] == "list":
        return sum(occurs(member, answer) for member in question["of"]) >= question["count"]
    return any(occurs(wanted, answer) for wanted in question["any"])


def ask(folder: str, dtype: str, questions: list[dict], tokens: int, batch: int) -> dict:
    """Answers of one model, and its score, whole and of each kind, in percent."""
    model, tokenizer = load_language_model(folder, dtype=dtype), read_tokenizer(folder)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question["question"]}], tokenize=False, add_generation_prompt=True
        )
        for question in questions
    ]
    begun = time.perf_counter()
    options = {"max_new_tokens": tokens, "do_sample": False}
    answers = generate_texts(model, tokenizer, prompts, batch_size=batch, templated=True, **options)
    right = [is_right(question, answer) for question, answer in zip(questions, answers, strict=True)]
    kinds = {question["kind"]: [] for question in questions}
    for question, good in zip(questions, right, strict=True):
        kinds[question["kind"]].append(good)
    return {
        "score": 100 * sum(right) / len(right),
        **{kind: 100 * sum(found) / len(found) for kind, found in kinds.items()},
        "seconds": round(time.perf_counter() - begun, 1),
        "size": model_size(model, folder),
        "answers": [
            {"question": question["question"], "answer": answer, "right": good}
            for question, answer, good in zip(questions, answers, right, strict=True)
        ],
    }


def main(args: QuestionArgs) -> dict:
    questions = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()][: args.limit]
    points = []
    for named in args.models:
        name, _, folder = named.partition("=")
        points.append({"model": name, **ask(folder, args.dtype, questions, args.tokens, args.batch)})
    first = points[0]["score"]
    scores = {point["model"]: point["score"] for point in points}
    retained = {f"{name} of {points[0]['model']}": value / first for name, value in scores.items() if first}
    options = {"task": "chat50", "config": asdict(args), "seed": 0, "dtype": args.dtype, "points": points}
    write_results(args.output, {**scores, **retained}, **options)
    return finish({"output": args.output, **scores})


if __name__ == "__main__":
    start(main, (QuestionArgs,), __doc__)
