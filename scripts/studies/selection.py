"""Which past blocks should a pre-trained model read? Selectors compared on a dense checkpoint, without training.

python scripts/studies/selection.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset test=books.jsonl \
    --mode mass --variants box:64:16:8,cshare:32:8:16,oracle:32:8:16
python scripts/studies/selection.py ... --mode perplexity --length 8192 --texts 2 --variants dense,cshare:16:8:43

A variant is selector:block:sub-block:blocks. `mass` runs the dense model once and reports which part of the true
softmax each variant would have read; `perplexity` runs the model once for each variant, with that attention.
"""

import math
from dataclasses import asdict, dataclass, field

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_flashlite.cli import finish, start
from modeling_flashlite.data.loading import load_data, pick_split
from modeling_flashlite.measure.results import write_results

QUERIES = 256


@dataclass
class StudyArgs:
    model: str = field(metadata={"help": "directory or Hub id of a dense causal model"})
    dataset: str = field(metadata={"help": "local files (test=a.jsonl.xz) or a Hub id, rows of a `text` column"})
    variants: str = field(metadata={"help": "dense, or selector:block:sub-block:blocks; separated by commas"})
    mode: str = field(default="perplexity", metadata={"help": "perplexity or mass"})
    split: str = field(default="test", metadata={"help": "split"})
    length: int = field(default=4096, metadata={"help": "tokens of a text"})
    texts: int = field(default=1, metadata={"help": "texts, evenly spaced over the rows"})
    output: str = field(default="runs/results/selection.json", metadata={"help": "results file"})
    label: str | None = field(default=None, metadata={"help": "name of the data set in tables"})
    note: str | None = field(default=None, metadata={"help": "about the checkpoint, for the results file"})


@dataclass(frozen=True)
class Variant:
    """How many blocks of which size are chosen, and by what."""

    selector: str
    block: int
    sub_block: int
    blocks: int

    @classmethod
    def of(cls, text: str) -> "Variant | None":
        if text == "dense":
            return None
        selector, *sizes = text.split(":")
        if selector not in SELECTORS or len(sizes) != 3:
            raise ValueError(
                f"{text!r} is no variant; give `dense` or selector:block:sub-block:blocks, the selector "
                f"one of {', '.join(SELECTORS)}."
            )
        return cls(selector, *map(int, sizes))


def box(q, k, near, v: Variant):
    """Quest's bound of the group's mean query."""
    sub = k.unflatten(0, (-1, v.sub_block))
    mean = q.mean(0)
    scores = mean.clamp(min=0) @ sub.amax(1).T + mean.clamp(max=0) @ sub.amin(1).T
    return scores.unflatten(1, (-1, v.block // v.sub_block)).amax(2)


def estimates(q, k, v: Variant):
    """Estimated log mass of every block for every head, `[G, R, n]`: log-sum-exp over sub-block means."""
    means = k.unflatten(0, (-1, v.sub_block)).mean(1)
    return (q @ means.T + math.log(v.sub_block)).unflatten(2, (-1, v.block // v.sub_block)).logsumexp(3)


def share(q, k, near, v: Variant):
    """Sum over heads of the estimated share of the whole softmax, near keys included."""
    logits = estimates(q, k, v)
    return logits, near


def candidates_share(q, k, near, v: Variant):
    """The same of the softmax over the candidates alone."""
    return estimates(q, k, v), None


def oracle(q, k, near, v: Variant):
    """The true share."""
    return (q @ k.T).unflatten(2, (-1, v.block)).logsumexp(3), near


def variance(q, k, near, v: Variant):
    """Half the variance of a sub-block's logits (diagonal covariance) added, capped by the bound of the box."""
    sub = k.unflatten(0, (-1, v.sub_block))
    first = q @ sub.mean(1).T
    second = 0.5 * (q.square() @ sub.var(1, correction=0).T)
    bound = q.clamp(min=0) @ sub.amax(1).T + q.clamp(max=0) @ sub.amin(1).T
    logits = torch.minimum(first + second, bound) + math.log(v.sub_block)
    return logits.unflatten(2, (-1, v.block // v.sub_block)).logsumexp(3), near


SELECTORS = {"box": box, "share": share, "cshare": candidates_share, "oracle": oracle, "variance": variance}


def choose(q, k, t, v: Variant) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Masks of the chosen and of the other candidates `[R, n]` and the keys always read `[R, S]`."""
    n, b = k.shape[0] // v.block, v.block
    key, j, i = torch.arange(k.shape[0]), torch.arange(n), (t // b)[:, None]
    always = (key <= t[:, None]) & ((key >= (i - 1) * b) | (key < b))
    candidates = (j > 0) & (j <= i - 2)
    near = (q @ k.T).masked_fill(~always, -math.inf).logsumexp(2)
    scores = SELECTORS[v.selector](q, k[: n * b], near, v)
    if isinstance(scores, tuple):
        logits, near = scores
        logits = logits.masked_fill(~candidates, -math.inf)
        total = logits.logsumexp(2) if near is None else torch.logaddexp(logits.logsumexp(2), near)
        scores = (logits - total[..., None]).exp().nan_to_num(0.0).sum(0)
    scores = scores.masked_fill(~candidates, -math.inf)
    chosen = torch.zeros_like(candidates).scatter(1, scores.topk(min(v.blocks, n)).indices, True) & candidates
    return chosen, candidates & ~chosen, always


class SparseAttention:
    """Attention of transformers' interface: sparse by a variant, or dense with the mass that each variant reads."""

    def __init__(self):
        self.variant, self.masses = None, {}

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        if self.variant is None:
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            for h in range(key.shape[1]):
                q = query[0, h * groups : (h + 1) * groups].float() * scaling
                self.measure(q, key[0, h].float())
            return out.transpose(1, 2), None
        out = torch.empty_like(query)
        for h in range(key.shape[1]):
            q = query[0, h * groups : (h + 1) * groups].float() * scaling
            for lo in range(0, q.shape[1], QUERIES):
                t = torch.arange(lo, min(lo + QUERIES, q.shape[1]))
                heads = slice(h * groups, (h + 1) * groups)
                out[0, heads, t] = self.attend(q[:, t], key[0, h], value[0, h], t).to(out.dtype)
        return out.transpose(1, 2), None

    def attend(self, q, k, v, t):
        b, end = self.variant.block, int(t[-1]) + 1
        k, v = k[:end].float(), v[:end].float()
        chosen, grid, seen = choose(q, k, t, self.variant)
        seen[:, : chosen.shape[1] * b] |= chosen.repeat_interleave(b, 1)
        slots_k, slots_v = (x[: grid.shape[1] * b].unflatten(0, (-1, b)).mean(1) for x in (k, v))
        logits = torch.cat(
            [(q @ k.T).masked_fill(~seen, -math.inf), (q @ slots_k.T + math.log(b)).masked_fill(~grid, -math.inf)], 2
        )
        return logits.softmax(2) @ torch.cat([v, slots_v])

    def measure(self, q, k):
        """The part of the true softmax that every variant reads, over some queries of the second half."""
        t = torch.arange(q.shape[1] // 2, q.shape[1], 16)
        weights = None
        for v in self.masses:
            chosen, _, seen = choose(q[:, t], k, t, v)
            seen[:, : chosen.shape[1] * v.block] |= chosen.repeat_interleave(v.block, 1)
            if weights is None:
                weights = (q[:, t] @ k.T).masked_fill(torch.arange(k.shape[0]) > t[:, None], -math.inf).softmax(2)
            self.masses[v].append(float((weights * seen).sum(2).mean()))


def take_texts(args: StudyArgs, tokenizer) -> list[torch.Tensor]:
    """Token ids `[1, length]` of consecutive rows, from evenly spaced places."""
    rows = pick_split(load_data(args.dataset), args.split)["text"]
    texts = []
    for index in range(args.texts):
        place, ids = index * len(rows) // args.texts, []
        while len(ids) < args.length:
            ids += tokenizer(rows[place] + "\n", add_special_tokens=False)["input_ids"]
            place += 1
        texts.append(torch.tensor(ids[: args.length])[None])
    return texts


def loss_of(model, ids) -> list[float]:
    """Negative log-likelihood of every token but the first."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
    losses = [
        torch.nn.functional.cross_entropy(model.lm_head(states).float(), targets, reduction="none")
        for states, targets in zip(hidden.split(512), ids[0, 1:].split(512))
    ]
    return torch.cat(losses).tolist()


def save(args: StudyArgs, metrics: dict) -> None:
    write_results(
        args.output,
        metrics,
        task="selection study",
        dataset=args.label or args.dataset,
        split=args.split,
        model=args.model,
        config=asdict(args),
        dtype="bfloat16",
    )


@torch.inference_mode()
def main(args: StudyArgs) -> dict:
    variants = {text: Variant.of(text) for text in args.variants.split(",")}
    attention = SparseAttention()
    ALL_ATTENTION_FUNCTIONS.register("study", attention)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    model.config._attn_implementation = "study"
    texts, metrics = take_texts(args, tokenizer), {}
    if args.mode == "mass":
        attention.masses = {v: [] for v in variants.values() if v is not None}
        for ids in tqdm(texts, desc="dense"):
            model.model(input_ids=ids, use_cache=False)
        for text, v in variants.items():
            if v is not None:
                metrics[f"lost mass {text}"] = 1 - sum(attention.masses[v]) / len(attention.masses[v])
        save(args, metrics)
    else:
        for text, attention.variant in tqdm(variants.items(), desc="variants"):
            losses = [loss for ids in texts for loss in loss_of(model, ids)]
            metrics[f"perplexity {text}"] = math.exp(sum(losses) / len(losses))
            save(args, metrics)  # a run that is stopped keeps what it has measured
    return finish({"output": args.output, **metrics})


if __name__ == "__main__":
    start(main, (StudyArgs,), __doc__)
