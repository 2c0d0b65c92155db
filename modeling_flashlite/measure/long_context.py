"""Retrieval from generated long texts: pass keys, one needle among several, variables, common words.

The kinds follow RULER (https://huggingface.co/papers/2404.06654): a text of a given length hides, at a given depth,
the answer to a question at its end. An answer's score is the share of the expected words that it contains. No chat
template is used, so that all causal models are treated alike: the prompt ends in the middle of the answer's sentence.
A text is read once, and each question continues from its cache.
"""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..compat_flashlite import CACHE
from .plots import can_draw, new_axes

__all__ = ["KINDS", "Example", "evaluate_long_context", "make_examples", "plot_depths", "score"]

# most tokens of an answer
_ROOM = 40
_NEEDLES, _CHAIN, _COMMON = 8, 4, 4
_FILLER = (
    ("An old", "A young", "A quiet", "The tall", "The last", "A tired", "The other", "A careful"),
    ("captain", "gardener", "teacher", "merchant", "painter", "farmer", "sailor", "doctor", "clerk", "miller"),
    ("walked to", "looked at", "thought about", "came from", "spoke of", "waited near", "returned to", "passed"),
    ("the harbour", "the garden", "the bridge", "the market", "the river", "the old mill", "the hill", "the road"),
    ("in the morning", "before the rain", "at noon", "in the evening", "after dinner", "that winter", "on Sunday"),
)
_CITIES = (
    "Paris London Berlin Madrid Rome Vienna Lisbon Dublin Oslo Prague Athens Cairo Tokyo Delhi Lima Boston Chicago "
    "Denver Dallas Seattle Toronto Sydney Geneva Milan Naples Hamburg"
)
_WORDS = (
    "apple river table window garden silver bottle castle winter summer candle mirror pencil basket forest island "
    "ladder market needle orange paper rabbit saddle ticket valley wagon yellow bridge carpet dragon engine feather "
    "guitar hammer insect jacket kettle lemon magnet nephew ocean parrot quilt ribbon spider tunnel uncle violin "
    "wallet zebra anchor button cotton donkey elbow finger goblet helmet ivory jungle kitten lantern meadow"
)


@dataclass(frozen=True)
class Example:
    """A prompt, the words that its answer should contain, and their depth in the text."""

    prompt: str
    answers: tuple[str, ...]
    depth: float


# a question with the expected words and the depth of the first of them
_Question = tuple[str, tuple[str, ...], float]
# hidden sentences with their depths, and the questions about them
_Hidden = tuple[list[tuple[float, str]], list[_Question]]


def _sentence(rng: random.Random) -> str:
    return " ".join(rng.choice(part) for part in _FILLER) + "."


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10_000, 100_000))


def _place(filler: list[str], needles: Sequence[tuple[float, str]]) -> str:
    """The filler's sentences with each needle at its depth between 0 (the beginning) and 1 (the end)."""
    sentences = list(filler)
    for depth, needle in sorted(needles, reverse=True):
        sentences.insert(round(depth * len(filler)), needle)
    return " ".join(sentences)


def _passkey(rng: random.Random, depth: float) -> _Hidden:
    key = _number(rng)
    needles = [(depth, f"The pass key is {key}. Remember it: {key} is the pass key.")]
    return needles, [("What is the pass key? The pass key is", (key,), depth)]


def _needle(rng: random.Random, depth: float) -> _Hidden:
    cities = rng.sample(_CITIES.split(), _NEEDLES)
    numbers = [_number(rng) for _ in cities]
    # the first is at `depth`, the others at even distances from it; there is a question for each
    depths = [depth, *((depth + step / _NEEDLES) % 1 for step in range(1, _NEEDLES))]
    needles = [(at, f"The magic number of {city} is {number}.") for at, city, number in zip(depths, cities, numbers)]
    questions: list[_Question] = [
        (f"What is the magic number of {city}? The magic number of {city} is", (number,), at)
        for at, city, number in zip(depths, cities, numbers)
    ]
    return needles, questions


def _variables(rng: random.Random, depth: float) -> _Hidden:
    names = [f"X{number}" for number in rng.sample(range(100, 1000), 2 * _CHAIN)]
    needles, values = [], (_number(rng), _number(rng))
    for chain, value in zip((names[:_CHAIN], names[_CHAIN:]), values):
        # the first assignment is at `depth`, the others follow in order
        at = sorted(depth + (1 - depth) * rng.random() for _ in chain[1:])
        needles += [
            (place, f"VAR {name} = {source}.")
            for place, name, source in zip((depth, *at), chain, (value, *(f"VAR {name}" for name in chain)))
        ]
    question = f"Which variables have the value {values[0]}? The variables {names[0]},"
    return needles, [(question, tuple(names[1:_CHAIN]), depth)]


def _words(rng: random.Random, depth: float) -> _Hidden:
    common = rng.sample(_WORDS.split(), _COMMON)
    return [], [(f"The {_COMMON} most common words of this list are", tuple(common), depth)]


def _list_item(rng: random.Random, answers: Sequence[str]) -> str:
    """Three words, one of them common."""
    rare = [word for word in _WORDS.split() if word not in answers]
    return " ".join([rng.choice(answers), *rng.sample(rare, 2)]) + ","


# kind -> what the text hides, and the questions
KINDS: dict[str, Callable[[random.Random, float], _Hidden]] = {
    "passkey": _passkey,
    "needle": _needle,
    "variables": _variables,
    "words": _words,
}


def make_examples(
    kind: str, tokenizer: PreTrainedTokenizerBase, length: int, depth: float, rng: random.Random
) -> list[Example]:
    """Prompts of at most `length` tokens, answer included, about one text that hides something at `depth` (0 to 1).

    Args:
        kind (`str`): `passkey`, `needle` (several alike, each asked for), `variables` (a chain of assignments beside
            another one) or `words` (the most common ones of a list, which has no depth).
        tokenizer (`PreTrainedTokenizerBase`): counts the tokens.
        length (`int`): tokens of prompt and answer together.
        depth (`float`): position of the first needle, or of the beginning of the chain.
        rng (`random.Random`): source of randomness of the text.

    Raises:
        ValueError: an unknown kind, a depth outside 0 to 1, or a length too short for the question.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of long-context task; choose among {', '.join(KINDS)}.")
    if not 0 <= depth <= 1:
        raise ValueError(f"The depth is {depth}, but it must be between 0 (the beginning) and 1 (the end).")

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    needles, questions = KINDS[kind](rng, depth)
    longest = max((question for question, _, _ in questions), key=count)
    room = length - _ROOM - count(" ".join([*(needle for _, needle in needles), "\n" + longest]))
    filler: list[str] = []
    while room > 0:
        filler.append(_list_item(rng, questions[0][1]) if kind == "words" else _sentence(rng))
        room -= count(" " + filler[-1])
    if len(filler) < 2:
        raise ValueError(f"{length} tokens are too few for {kind}; choose at least {length - room + 64}.")
    text = _place(filler[:-1], needles)
    return [Example(f"{text}\n{question}", answers, at) for question, answers, at in questions]


def score(example: Example, answer: str) -> float:
    """The share of the expected words that the answer contains."""
    return sum(word in answer for word in example.answers) / len(example.answers)


@torch.inference_mode()
def answer_all(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[str]:
    """Greedy answers to prompts that share a beginning, which is read once."""
    prompts = [tokenizer(example.prompt, verbose=False)["input_ids"] for example in examples]
    shared = min(map(len, prompts)) - 1
    while any(prompt[:shared] != prompts[0][:shared] for prompt in prompts):
        shared -= 1
    first = model.base_model(input_ids=torch.tensor([prompts[0][:shared]], device=model.device), use_cache=True)
    ends, answers = model.generation_config.eos_token_id, []
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    for example, prompt in zip(examples, prompts):
        cache, ids, room = copy.deepcopy(first[CACHE]), prompt[shared:], 12 if len(example.answers) == 1 else _ROOM
        answer: list[int] = []
        while len(answer) < room and not ends & set(answer[-1:]):
            given = {"input_ids": torch.tensor([ids], device=model.device), CACHE: cache}
            outputs = model(**given, use_cache=True, logits_to_keep=1)
            ids = [int(outputs.logits[0, -1].argmax())]
            cache, answer = outputs[CACHE], answer + ids
        answers.append(tokenizer.decode(answer, skip_special_tokens=True))
    return answers


def evaluate_long_context(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    lengths: Sequence[int] = (1024, 2048, 4096),
    depths: int = 5,
    samples: int = 2,
    seed: int = 0,
) -> dict:
    """Evaluate a causal model on retrieval from long texts, with greedy answers, one text at a time.

    Args:
        model (`PreTrainedModel`): any causal model.
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        kinds (`Sequence[str]`, *optional*): of tasks, see [`make_examples`].
        lengths (`Sequence[int]`, *optional*): tokens of a text with its answer.
        depths (`int`, *optional*, defaults to 5): depths, evenly spaced from the beginning to the end.
        samples (`int`, *optional*, defaults to 2): texts of each kind, length and depth.
        seed (`int`, *optional*, defaults to 0): of the texts; the same for all models.

    Returns:
        `dict` with `metrics` (means by kind and length, and `accuracy` over all) and `rows` (one for each kind,
        length and nearest depth; `samples` counts the answers).
    """
    places = [round(index / (depths - 1), 3) if depths > 1 else 0.5 for index in range(depths)]
    found: dict[tuple, list[float]] = {}
    plan = [(kind, length, depth) for kind in kinds for length in lengths for depth in places for _ in range(samples)]
    for place, (kind, length, depth) in enumerate(tqdm(plan, desc="long context", unit="text")):
        rng = random.Random(f"{seed} {kind} {length} {depth} {place % samples}")
        examples = make_examples(kind, tokenizer, length, depth, rng)
        for example, answer in zip(examples, answer_all(model, tokenizer, examples)):
            nearest = min(places, key=lambda at: abs(at - example.depth))
            found.setdefault((kind, length, nearest), []).append(score(example, answer))
    rows = [
        {"kind": kind, "length": length, "depth": depth, "accuracy": _mean(scores), "samples": len(scores)}
        for (kind, length, depth), scores in sorted(found.items())
    ]
    metrics = {"accuracy": _mean(mean for scores in found.values() for mean in scores)}
    for kind in kinds:
        for length in lengths:
            mine = [mean for key, scores in found.items() if key[:2] == (kind, length) for mean in scores]
            metrics[f"{kind} {length}"] = _mean(mine)
    return {"metrics": metrics, "rows": rows}


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def plot_depths(rows: Sequence[dict], path: str | Path) -> Path | None:
    """Plot accuracy over length and depth, averaged over kinds, as SVG; `None` if matplotlib is missing."""
    if not can_draw():
        return None
    lengths, depths = (sorted({row[name] for row in rows}) for name in ("length", "depth"))
    table = [
        [
            _mean(row["accuracy"] for row in rows if (row["length"], row["depth"]) == (length, depth))
            for length in lengths
        ]
        for depth in depths
    ]
    axes = new_axes("tokens", "depth of the answer")
    image = axes.imshow(table, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    for y, line in enumerate(table):
        for x, value in enumerate(line):
            axes.text(x, y, f"{value:.2f}", ha="center", va="center")
    axes.figure.colorbar(image, label="accuracy")
    axes.figure.savefig(path, metadata={"Date": None})
    return Path(path)
