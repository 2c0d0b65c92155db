"""Metrics of generated text, spans, classes and likelihoods, each with a bootstrap confidence interval.

Nothing here touches the network: the modules of the `evaluate` library fetch their scripts from the Hub, so the
packages that they wrap, sacrebleu and rouge_score, are called directly.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

RESAMPLES = 1000
CONFIDENCE = 0.95
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]], resamples: int = RESAMPLES) -> dict:
    """Corpus BLEU of detokenised text by sacreBLEU, `bleu` in 0..100, with the signature that makes it comparable."""
    return _sacrebleu("bleu", BLEU(), predictions, references, resamples)


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]], resamples: int = RESAMPLES) -> dict:
    """chrF2 by sacreBLEU, `chrf` in 0..100, with its signature."""
    return _sacrebleu("chrf", CHRF(), predictions, references, resamples)


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]], resamples: int = RESAMPLES) -> dict:
    """ROUGE-1, ROUGE-2 and ROUGE-L F-measures in 0..100 by rouge_score, with Porter stemming.

    With several references the one with the best value counts, for each measure by itself.
    """
    _check_pairs(predictions, references)
    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names, use_stemmer=True)
    scores = [
        scorer.score_multi(list(answers) or [""], text) for text, answers in zip(predictions, references, strict=True)
    ]
    result = {}
    for name in names:
        result |= with_interval(name, [100 * score[name].fmeasure for score in scores], resamples)
    return result


def squad(predictions: Sequence[str], references: Sequence[Sequence[str]], resamples: int = RESAMPLES) -> dict:
    """SQuAD's exact match and token F1, `exact_match` and `f1` in 0..100, best over the accepted answers.

    Text is lower-cased, stripped of punctuation and of the articles a, an, the. A question without accepted answers
    is unanswerable, and the empty prediction is right (SQuAD 2.0).
    """
    _check_pairs(predictions, references)
    exact, overlap = [], []
    for text, answers in zip(predictions, references, strict=True):
        # answers that normalise to nothing are no answers
        accepted = [answer for answer in answers if normalize_answer(answer)] or [""]
        exact.append(100.0 * max(normalize_answer(text) == normalize_answer(answer) for answer in accepted))
        overlap.append(100.0 * max(_token_f1(text, answer) for answer in accepted))
    return with_interval("exact_match", exact, resamples) | with_interval("f1", overlap, resamples)


def normalize_answer(text: str) -> str:
    """Lower-case, without punctuation, English articles and extra blanks: the normalisation of SQuAD's script."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def classification(predictions: Sequence[int], references: Sequence[int], resamples: int = RESAMPLES) -> dict:
    """Accuracy and macro-averaged F1 over the classes that occur, `accuracy` and `f1_macro` in 0..100."""
    _check_pairs(predictions, references)
    predictions, references = np.asarray(predictions), np.asarray(references)
    result = with_interval("accuracy", 100.0 * (predictions == references), resamples)
    samples = [
        _macro_f1(predictions[picks], references[picks]) for picks in _resampled_indices(len(predictions), resamples)
    ]
    return result | {"f1_macro": _macro_f1(predictions, references)} | _interval("f1_macro", samples)


def likelihood(
    nll: Sequence[float],
    words: Sequence[int],
    tokens: Sequence[int],
    n_bytes: Sequence[int],
    resamples: int = RESAMPLES,
) -> dict:
    """Perplexities and bits per byte of a text, from sums over its pieces (documents, or blocks of a long text).

    `word_perplexity = exp(sum nll / sum words)`, `token_perplexity = exp(sum nll / sum tokens)`,
    `bits_per_byte = sum nll / (ln 2 * sum bytes)`; the interval is a bootstrap over the pieces.

    Args:
        nll (`Sequence[float]`): negative log-likelihood of each piece, in nats.
        words, tokens, n_bytes (`Sequence[int]`): original words with line ends, predicted tokens and UTF-8 bytes.
    """
    nll, counts = np.asarray(nll, dtype=np.float64), np.asarray([words, tokens, n_bytes], dtype=np.float64)
    if not nll.size or not counts.sum(1).all():
        raise ValueError("0 words, tokens or bytes were scored, but a perplexity needs at least one of each.")
    picks = np.stack(list(_resampled_indices(len(nll), resamples))) if resamples else None
    result = {}
    for name, count, final in (
        ("word_perplexity", counts[0], _exp),
        ("token_perplexity", counts[1], _exp),
        ("bits_per_byte", counts[2] * math.log(2), float),
    ):
        result[name] = final(nll.sum() / count.sum())
        if picks is not None and len(nll) > 1:
            result |= _interval(name, [final(rate) for rate in nll[picks].sum(1) / count[picks].sum(1)])
    return result | {"words": int(counts[0].sum()), "tokens": int(counts[1].sum()), "bytes": int(counts[2].sum())}


METRICS: dict[str, Callable[..., dict]] = {
    "bleu": bleu,
    "chrf": chrf,
    "rouge": rouge,
    "squad": squad,
    "classification": classification,
}


def with_interval(name: str, values: Sequence[float], resamples: int = RESAMPLES) -> dict[str, float]:
    """Mean of per-example values under `name`, with the bootstrap interval as `name_low` and `name_high`."""
    values = np.asarray(values, dtype=np.float64)
    means = [values[picks].mean() for picks in _resampled_indices(len(values), resamples)]
    return {name: float(values.mean())} | _interval(name, means)


def _resampled_indices(size: int, resamples: int):
    generator = np.random.default_rng(0)
    return (generator.integers(0, size, size) for _ in range(resamples))


def _interval(name: str, samples: Sequence[float]) -> dict[str, float]:
    if not len(samples):
        return {}
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(samples, [tail, 100 - tail])
    return {f"{name}_low": float(low), f"{name}_high": float(high)}


def _sacrebleu(name: str, metric: BLEU | CHRF, predictions, references, resamples: int) -> dict:
    _check_pairs(predictions, references)
    # sacreBLEU wants one list per reference number, with None where a sentence has fewer
    count = max(len(answers) for answers in references)
    if not count:
        raise ValueError("All references are empty, but a score needs some; check the target column.")
    references = [list(answers) or [""] for answers in references]
    padded = [[answers[i] if i < len(answers) else None for answers in references] for i in range(count)]
    score = metric.corpus_score(list(predictions), padded).score
    result = {name: float(score), f"{name}_signature": str(metric.get_signature())}
    # sacreBLEU's own bootstrap fails where a resample scores 0, so resample the counts of its sentences here
    counts = np.asarray(metric._extract_corpus_statistics(list(predictions), padded))
    samples = [
        float(metric._compute_score_from_stats(counts[picks].sum(0).tolist()).score)
        for picks in _resampled_indices(len(counts), resamples)
    ]
    return result | _interval(name, samples)


def _token_f1(prediction: str, answer: str) -> float:
    found, wanted = normalize_answer(prediction).split(), normalize_answer(answer).split()
    if not found or not wanted:
        return float(found == wanted)
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted))


def _macro_f1(predictions: np.ndarray, references: np.ndarray) -> float:
    classes = np.union1d(predictions, references)
    hits = np.array([np.sum((predictions == c) & (references == c)) for c in classes])
    sizes = np.array([np.sum(predictions == c) + np.sum(references == c) for c in classes])
    return float(100.0 * np.mean(2 * hits / sizes))


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def _check_pairs(predictions: Sequence, references: Sequence) -> None:
    if not len(predictions) or len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} references were given, but there must be as many "
            "of both and at least one; check the data set."
        )
