"""Metrics for generated text, answer spans, classes and likelihoods, with bootstrap confidence intervals.

Nothing here uses the network. The modules of the `evaluate` library download scripts from the Hub, so the packages
behind them, sacrebleu and rouge_score, are called directly; `own_metrics` loads such modules on request.
"""

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer
from sacrebleu.metrics import BLEU, CHRF

RESAMPLES = 1000
_ROUGE = version("rouge_score")
CONFIDENCE = 0.95
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Thai, Lao, Tibetan, Burmese, Khmer, kana
_UNSPACED = "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff"
_NO_SPACES = re.compile(f"([{_HAN}{_UNSPACED}])")
# shares of letters above which a text is treated as unsegmented, or as not English
_MOST_UNSPACED, _MOST_NOT_ASCII = 0.1, 0.01


def bleu(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    resamples: int = RESAMPLES,
    tokenize: str | None = None,
) -> dict:
    """Corpus BLEU of detokenized text by sacreBLEU, `bleu` in 0..100, with its signature for comparison.

    Rows without a reference are left out, as by chrF and ROUGE; `without_reference` counts them.

    Args:
        predictions (`Sequence[str]`): answers.
        references (`Sequence[Sequence[str]]`): the accepted answers of each.
        resamples (`int`, *optional*, defaults to 1000): of the bootstrap.
        tokenize (`str`, *optional*): one of sacreBLEU's tokenizers; if unset, `zh` for references in Chinese, `char`
            for other scripts without spaces, else its default `13a`. The signature names it.
    """
    predictions, references, left_out = _with_references(predictions, references)
    if tokenize is None:
        letters = _letters(references)
        han, unspaced = (len(re.findall(f"[{scripts}]", letters)) for scripts in (_HAN, _UNSPACED))
        tokenize = "13a" if han + unspaced <= _MOST_UNSPACED * len(letters) else "char" if unspaced else "zh"
    return _sacrebleu("bleu", BLEU(tokenize=tokenize), predictions, references, resamples) | left_out


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]], resamples: int = RESAMPLES) -> dict:
    """chrF2 by sacreBLEU, `chrf` in 0..100, with its signature."""
    predictions, references, left_out = _with_references(predictions, references)
    return _sacrebleu("chrf", CHRF(), predictions, references, resamples) | left_out


class UnicodeTokenizer(Tokenizer):
    """Tokens: lower-cased runs of letters, digits and their marks, and single characters of scripts without spaces."""

    def tokenize(self, text: str) -> list[str]:
        """Split a text into words."""
        text = unicodedata.normalize("NFKC", text).casefold()
        kept = "".join(char if unicodedata.category(char)[0] in "LMN" else " " for char in text)
        return _NO_SPACES.sub(r" \1 ", kept).split()


_ROUGE_TOKENIZERS: dict[str, Tokenizer] = {
    "english": DefaultTokenizer(use_stemmer=True),
    "unicode": UnicodeTokenizer(),
}


def rouge(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    resamples: int = RESAMPLES,
    tokenize: str | None = None,
) -> dict:
    """ROUGE-1, ROUGE-2 and ROUGE-L F-measures in 0..100 by rouge_score, with a signature that names the tokenizer.

    With several references, the best value counts, separately for each measure.

    Args:
        predictions (`Sequence[str]`): answers.
        references (`Sequence[Sequence[str]]`): the accepted answers of each.
        resamples (`int`, *optional*, defaults to 1000): of the bootstrap.
        tokenize (`str`, *optional*): `english`, rouge_score's own, which keeps ASCII letters and digits only and stems
            words; or `unicode`, without stemming. If unset, `unicode` if more than 1% of the references' letters are
            not ASCII.
    """
    predictions, references, left_out = _with_references(predictions, references)
    names = ("rouge1", "rouge2", "rougeL")
    if tokenize is None:
        letters = _letters(references)
        foreign = sum(not letter.isascii() for letter in letters)
        tokenize = "unicode" if foreign > _MOST_NOT_ASCII * len(letters) else "english"
    if tokenize not in _ROUGE_TOKENIZERS:
        raise ValueError(f"tokenize is {tokenize!r}, but must be one of {', '.join(_ROUGE_TOKENIZERS)}.")
    scorer = RougeScorer(names, tokenizer=_ROUGE_TOKENIZERS[tokenize])
    scores = [scorer.score_multi(answers, text) for text, answers in zip(predictions, references, strict=True)]
    result: dict = {
        "rouge_signature": f"tok:{tokenize}|stem:{'yes' if tokenize == 'english' else 'no'}|version:{_ROUGE}",
        **left_out,
    }
    for name in names:
        result |= with_interval(name, [100 * score[name].fmeasure for score in scores], resamples)
    return result


def squad(predictions: Sequence[str], references: Sequence[Sequence[str]], resamples: int = RESAMPLES) -> dict:
    """SQuAD's exact match and token F1, `exact_match` and `f1` in 0..100, the best over the accepted answers.

    Text is lower-cased, stripped of punctuation and of the articles a, an, the; each character of a script without
    spaces is a token of its own, as in MLQA (arXiv 1910.07475). A question without accepted answers
    is unanswerable, and the empty prediction is right (SQuAD 2.0).
    """
    _check_pairs(predictions, references)
    exact, overlap = [], []
    for text, answers in zip(predictions, references, strict=True):
        # answers that are empty after normalization are ignored
        accepted = [answer for answer in answers if normalize_answer(answer)] or [""]
        exact.append(100.0 * max(normalize_answer(text) == normalize_answer(answer) for answer in accepted))
        overlap.append(100.0 * max(_token_f1(text, answer) for answer in accepted))
    return with_interval("exact_match", exact, resamples) | with_interval("f1", overlap, resamples)


def normalize_answer(text: str) -> str:
    """SQuAD's normalization: lower case, without punctuation, English articles and extra spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def classification(predictions: Sequence[int], references: Sequence[int], resamples: int = RESAMPLES) -> dict:
    """Accuracy, and F1 averaged over the classes that occur, `accuracy` and `f1_macro` in 0..100."""
    _check_pairs(predictions, references)
    found, expected = np.asarray(predictions), np.asarray(references)
    result = with_interval("accuracy", 100.0 * (found == expected), resamples)
    samples = [_macro_f1(found[picks], expected[picks]) for picks in _resampled_indices(len(found), resamples)]
    return result | {"f1_macro": _macro_f1(found, expected)} | _interval("f1_macro", samples)


def likelihood(
    nll: ArrayLike,
    words: ArrayLike,
    tokens: ArrayLike,
    n_bytes: ArrayLike,
    resamples: int = RESAMPLES,
) -> dict:
    """Perplexities and bits per byte of a text, from sums over its pieces (documents, or blocks of a long text).

    `word_perplexity = exp(sum nll / sum words)`, `token_perplexity = exp(sum nll / sum tokens)`,
    `bits_per_byte = sum nll / (ln 2 * sum bytes)`; the interval is a bootstrap over the pieces.

    Args:
        nll (array of `float`): negative log-likelihood of each piece, in nats.
        words, tokens, n_bytes (arrays of `int`): original words with line ends, predicted tokens and UTF-8 bytes.
    """
    loss = np.asarray(nll, dtype=np.float64)
    counts = np.asarray([words, tokens, n_bytes], dtype=np.float64)
    if not loss.size or not counts.sum(1).all():
        raise ValueError("No words, tokens or bytes were scored, but a perplexity needs at least one of each.")
    picks = np.stack(list(_resampled_indices(len(loss), resamples))) if resamples else None
    result = {}
    for name, count, final in (
        ("word_perplexity", counts[0], _exp),
        ("token_perplexity", counts[1], _exp),
        ("bits_per_byte", counts[2] * math.log(2), float),
    ):
        result[name] = final(loss.sum() / count.sum())
        if picks is not None and len(loss) > 1:
            result |= _interval(name, [final(rate) for rate in loss[picks].sum(1) / count[picks].sum(1)])
    return result | {"words": int(counts[0].sum()), "tokens": int(counts[1].sum()), "bytes": int(counts[2].sum())}


METRICS: dict[str, Callable[..., dict]] = {
    "bleu": bleu,
    "chrf": chrf,
    "rouge": rouge,
    "squad": squad,
    "classification": classification,
}


def with_interval(name: str, values: ArrayLike, resamples: int = RESAMPLES) -> dict[str, float]:
    """Mean of per-example values under `name`, with the bootstrap interval as `name_low` and `name_high`."""
    scores = np.asarray(values, dtype=np.float64)
    means = [scores[picks].mean() for picks in _resampled_indices(len(scores), resamples)]
    return {name: float(scores.mean())} | _interval(name, means)


def _resampled_indices(size: int, resamples: int):
    generator = np.random.default_rng(0)
    return (generator.integers(0, size, size) for _ in range(resamples))


def _interval(name: str, samples: Sequence[float]) -> dict[str, float]:
    if not len(samples):
        return {}
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(samples, [tail, 100 - tail])
    return {f"{name}_low": float(low), f"{name}_high": float(high)}


def _sacrebleu(name: str, metric: Any, predictions, references, resamples: int) -> dict:
    # sacreBLEU wants one list per reference number, with None where a sentence has fewer
    count = max(len(answers) for answers in references)
    padded = [[answers[i] if i < len(answers) else None for answers in references] for i in range(count)]
    score = metric.corpus_score(predictions, padded).score
    result = {name: float(score), f"{name}_signature": str(metric.get_signature())}
    # sacreBLEU's bootstrap fails if a resample scores 0, so sentence statistics are resampled here
    counts = np.asarray(metric._extract_corpus_statistics(predictions, padded))
    samples = [
        float(metric._compute_score_from_stats(counts[picks].sum(0).tolist()).score)
        for picks in _resampled_indices(len(counts), resamples)
    ]
    return result | _interval(name, samples)


def _with_references(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list, list, dict]:
    """The rows that have a reference, and how many have none, if any: nothing is known of their answers."""
    _check_pairs(predictions, references)
    kept = [(text, list(answers)) for text, answers in zip(predictions, references, strict=True) if len(answers)]
    if not kept:
        raise ValueError("All references are empty, so there is nothing to score; check the target column.")
    without = len(references) - len(kept)
    return (
        [text for text, _ in kept],
        [answers for _, answers in kept],
        {"without_reference": without} if without else {},
    )


def _letters(references: Sequence[Sequence[str]]) -> str:
    """All letters of all references, concatenated."""
    return "".join(char for answers in references for answer in answers for char in answer if char.isalpha())


def _token_f1(prediction: str, answer: str) -> float:
    found, wanted = (_NO_SPACES.sub(r" \1 ", normalize_answer(text)).split() for text in (prediction, answer))
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
            f"There are {len(predictions)} predictions and {len(references)} references, but their numbers must be "
            f"equal and positive; check the data set."
        )
