"""Divergences between teacher and student, and the distillation loss hook built on them.

Letters: B batch, T target, V vocabulary, K kept teacher entries, C tokens of a chunk, p teacher, q student.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F
from transformers.utils import logging

from ..loss_flashlite import IGNORE_INDEX, chunked_sum, divisor

__all__ = ["KDLoss", "divergence", "shared_vocabulary"]

logger = logging.get_logger(__name__)
PARAMETERS = {"forward": None, "reverse": None, "jsd": 0.5, "skew": 0.1, "taid": 0.4}
# finite stand-in for infinity: exp(-1e4) is 0 in every dtype, and 0 * 1e4 is 0 where 0 * inf is NaN
LOG_ZERO = -1e4
# embeddings are padded to multiples of 64, 128 or 256; a larger difference means different vocabularies
MAX_PADDING = 512


def shared_vocabulary(teacher_size: int, student_size: int) -> int:
    """Number of ids common to both models, without padding; raises `ValueError` for different vocabularies."""
    if abs(teacher_size - student_size) > MAX_PADDING:
        raise ValueError(
            f"The teacher has {teacher_size} output ids and the student {student_size}, but padding explains at most "
            f"{MAX_PADDING}; give the student the teacher's tokenizer, or distil through text with "
            "TeacherCache(mode='text')."
        )
    if teacher_size != student_size:
        logger.warning_once(
            f"Vocabularies of {teacher_size} (teacher) and {student_size} (student) ids: distilling over the shared "
            f"first {min(teacher_size, student_size)}, renormalised."
        )
    return min(teacher_size, student_size)


def parse_divergence(name: str) -> tuple[str, float | None]:
    """Split `"jsd:0.5"` into kind and parameter, which has a default."""
    kind, _, value = name.partition(":")
    if kind not in PARAMETERS or (value and PARAMETERS[kind] is None):
        raise ValueError(
            f"divergence is {name!r}, but must be forward, reverse, jsd:beta, skew:alpha or taid:start, "
            "for example 'jsd:0.5'."
        )
    parameter = float(value) if value else PARAMETERS[kind]
    if parameter is not None and not 0 <= parameter <= 1:
        raise ValueError(f"divergence is {name!r}, but its parameter must lie between 0 and 1.")
    return kind, parameter


def _kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    log_a, log_b = log_a.clamp_min(LOG_ZERO), log_b.clamp_min(LOG_ZERO)
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _mix(log_a: torch.Tensor, log_b: torch.Tensor, share: float) -> torch.Tensor:
    """`log(share a + (1 - share) b)`."""
    return torch.logaddexp(log_a.clamp_min(LOG_ZERO) + math.log(share), log_b.clamp_min(LOG_ZERO) + math.log1p(-share))


def divergence(log_p: torch.Tensor, log_q: torch.Tensor, kind: str = "forward", parameter: float | None = None):
    r"""Divergence of each row of student log-probabilities from the teacher's; 0 where both are equal.

    `forward`: `KL(p || q)`. `reverse`: `KL(q || p)`. `jsd`: `b KL(p || m) + (1 - b) KL(q || m)`, `m = b p + (1 - b) q`
    (GKD, arXiv 2306.13649; b = 0 and b = 1 are defined as the forward and the reverse KL). `skew`:
    `KL(p || a p + (1 - a) q)` (DistiLLM, arXiv 2402.03898). `taid`: `KL(p_t || q)` with `p_t` proportional to
    `q^(1 - t) p^t`, no gradient through it (arXiv 2501.16937).

    Args:
        log_p, log_q (`torch.Tensor` of shape `[..., V]`): normalised log-probabilities.
        kind (`str`, *optional*, defaults to `"forward"`): one of the above.
        parameter (`float`, *optional*): b, a or t.

    Returns:
        `torch.Tensor` of shape `[...]`, in nats.

    Raises:
        ValueError: a kind other than forward and reverse without its parameter.
    """
    if kind == "forward" or (kind == "jsd" and parameter == 0) or (kind == "skew" and parameter == 0):
        return _kl(log_p, log_q)
    if kind == "reverse" or (kind == "jsd" and parameter == 1):
        return _kl(log_q, log_p)
    if parameter is None:
        raise ValueError(f"The divergence {kind!r} needs a parameter between 0 and 1, but none was given.")
    if kind == "jsd":
        middle = _mix(log_p, log_q, parameter)
        return parameter * _kl(log_p, middle) + (1 - parameter) * _kl(log_q, middle)
    if kind == "skew":
        return _kl(log_p, _mix(log_p, log_q, parameter)) if parameter < 1 else 0 * log_q.sum(-1)
    between = torch.log_softmax((1 - parameter) * log_q.detach() + parameter * log_p.clamp_min(LOG_ZERO), dim=-1)
    return _kl(between, log_q)


class _ForwardKL(torch.autograd.Function):
    """`KL(softmax(teacher) || softmax(student))` of each row; the gradient `q - p` is computed in the same pass.

    [`divergence`] on two log-softmaxes is the reference: under autograd it passes over the vocabulary three times as
    often.
    """

    @staticmethod
    def forward(ctx, student, teacher):
        log_p = torch.log_softmax(teacher, dim=-1).clamp_min_(LOG_ZERO)
        log_q = torch.log_softmax(student, dim=-1).clamp_min_(LOG_ZERO)
        p = log_p.exp()
        # a matrix product of a row and a column reads both once and writes no intermediate tensor
        value = torch.bmm(p[:, None], log_p.sub_(log_q)[..., None])[:, 0, 0]
        ctx.save_for_backward(log_q.exp_().sub_(p) if ctx.needs_input_grad[0] else None)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return slope * grad[:, None], None


def bucket_log_probs(
    logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reduce student `[C, V]` and cached top-k teacher `[C, K]` to the K kept tokens and one bucket for all others."""
    total = logits.logsumexp(-1, keepdim=True)
    log_q = logits.gather(-1, ids) - total
    tiny = torch.finfo(weights.dtype).tiny
    log_p = weights.clamp_min(tiny).log()
    if ids.shape[-1] == logits.shape[-1]:
        return log_p, log_q
    rest_q = logits.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True) - total
    # stored probabilities are rounded, so a remainder below their precision is zero
    rest_p = (1 - weights.sum(-1, keepdim=True)).clamp_min(torch.finfo(torch.float32).eps).log()
    return torch.cat([log_p, rest_p], -1), torch.cat([log_q, rest_q], -1)


# quantization step of a logit in one byte: odds are accurate to 4%
_SHARE_STEPS = 12.0


def pack_weights(weights: torch.Tensor) -> torch.Tensor:
    """Pack top-k probabilities `[*, K]`, largest first, into one byte each.

    Each byte encodes the logit of the entry's share of the mass that remains after the entries before it, so that the
    entries never sum to more than 1 and the remaining mass is preserved. [`unpack_weights`] is the inverse.
    """
    left = 1 - weights.cumsum(-1) + weights
    share = (weights / left.clamp_min(torch.finfo(torch.float32).tiny)).clamp(max=1 - 1e-6)
    code = (_SHARE_STEPS * torch.logit(share)).round().add(128).clamp(1, 255)
    return torch.where(weights > 0, code, 0).to(torch.uint8)


def unpack_weights(codes: torch.Tensor) -> torch.Tensor:
    """Probabilities `[*, K]` of [`pack_weights`], in float32."""
    share = torch.sigmoid((codes.float() - 128) / _SHARE_STEPS) * (codes > 0)
    left = torch.cumprod(1 - share, -1)
    return share * torch.nn.functional.pad(left[..., :-1], (1, 0), value=1.0)


@dataclass(frozen=True)
class KDLoss:
    r"""Distillation as a loss hook: `model.loss_function = KDLoss("forward", alpha=0.5, temperature=2.0)`.

    `L = 1/n * sum over labels != -100 of [alpha CE + (1 - alpha) T^2 D(p_T, q_T)]`, in float32, a chunk of tokens at a
    time. The teacher is given as cached columns (`teacher_ids`, `teacher_weights`, see [`TeacherCache`]) or as dense
    `teacher_logits`. Without gradients (in evaluation) the value is the plain cross-entropy, so that `eval_loss` is
    comparable between models. Sums of `ce`, `kd` (the divergence itself, 0 for a student equal to its teacher) and
    `agree` (equal best tokens) are collected for [`DistillationCallback`].

    Args:
        divergence (`str`, *optional*, defaults to `"forward"`): `forward`, `reverse`, `jsd:beta`, `skew:alpha` or
            `taid:start`.
        alpha (`float`, *optional*, defaults to 0.5): share of cross-entropy on the labels.
        temperature (`float`, *optional*, defaults to 2.0): of both softmaxes.
        chunk_size (`int`, *optional*): tokens of a chunk, see [`chunked_cross_entropy`].
    """

    divergence: str = "forward"
    alpha: float = 0.5
    temperature: float = 2.0
    chunk_size: int | None = None
    state: dict = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        kind, parameter = parse_divergence(self.divergence)
        if not 0 <= self.alpha <= 1 or self.temperature <= 0:
            raise ValueError(
                f"alpha is {self.alpha} and temperature {self.temperature}, but alpha must lie between 0 and 1 and "
                "the temperature above 0; start with 0.5 and 2.0."
            )
        self.state.setdefault("parameter", parameter)
        self.state.setdefault("kind", kind)

    def __call__(
        self,
        hidden_states: torch.Tensor | None = None,
        lm_head: torch.nn.Module | None = None,
        labels: torch.Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        teacher_ids: torch.Tensor | None = None,
        teacher_weights: torch.Tensor | None = None,
        teacher_logits: torch.Tensor | None = None,
        logits: torch.Tensor | None = None,
        kd_only: bool = False,
        shift_labels: torch.Tensor | None = None,
        label_smoothing: float = 0.0,
        **kwargs,
    ) -> torch.Tensor:
        """See [`chunked_cross_entropy`]; teacher tensors are `[B, T, K]` or `[B, T, V]`, one row per state.

        `label_smoothing` applies to the cross-entropy in training only: the teacher's distributions are smooth
        already.

        Without hidden states it serves as the hook of transformers' own causal models: `logits` `[B, T, V]` and
        `labels` that are the tokens themselves, or `shift_labels` that are each state's target.
        """
        training = torch.is_grad_enabled()
        if hidden_states is None and logits is not None:
            labels = F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:] if shift_labels is None else shift_labels
            hidden_states = logits  # only shape and device are used, since the logits are given
        if hidden_states is None or not (logits is not None or isinstance(lm_head, torch.nn.Module)):
            raise TypeError(
                "KDLoss got neither logits= nor hidden_states= with lm_head=: this model calls its loss function "
                "with other arguments; train it with DistillationTrainer, which computes the loss outside the model."
            )
        if teacher_logits is not None:
            columns: tuple[torch.Tensor, ...] = (teacher_logits,)
            signal: Callable | None = self._dense
        elif teacher_ids is not None and teacher_weights is not None:
            if not teacher_weights.is_floating_point():  # packed bytes, possibly widened by the collator
                teacher_weights = unpack_weights(teacher_weights)
            columns = (teacher_ids, teacher_weights)
            signal = self._sampled if bool((teacher_weights[..., -1] < 0).any()) else self._topk
            if signal == self._sampled and self.state["kind"] != "forward":
                raise ValueError(
                    f"divergence is {self.divergence!r}, but sampled teacher columns estimate the forward divergence "
                    "only; annotate with mode='topk' or use 'forward'."
                )
        elif training:
            raise ValueError(
                "KDLoss got neither teacher_ids and teacher_weights nor teacher_logits; annotate the dataset with "
                "TeacherCache or train with DistillationTrainer(teacher=...)."
            )
        else:
            columns, signal = (), None
        alpha = 1.0 if not training else 0.0 if kd_only else self.alpha
        smoothing = label_smoothing if training else 0.0

        def row_loss(logits, labels, *teacher):
            # weight 0: computed for the logs only
            with torch.set_grad_enabled(torch.is_grad_enabled() and alpha > 0):
                ce = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
            if signal is None:
                return (ce,)
            kd, true_kd, best = signal(self._softened(logits), *teacher)
            agree = (logits.detach().argmax(-1) == best).sum()
            loss = alpha * ce + (1 - alpha) * self.temperature**2 * kd.sum() if alpha < 1 else ce
            return loss, ce.detach(), true_kd.sum().detach(), agree, kd.sum().detach()

        (total, *sums), count = chunked_sum(hidden_states, lm_head, labels, row_loss, columns, self.chunk_size, logits)
        if signal is not None:
            self._collect("train" if training else "eval", sums, count)
        return total / divisor(num_items_in_batch, count, total)

    def _pair(self, log_p, log_q):
        kind, parameter = self.state["kind"], self.state["parameter"]
        value = divergence(log_p, log_q, kind, parameter)
        # TAID's loss uses an interpolated target and starts near 0 by construction
        return value, divergence(log_p.detach(), log_q.detach()) if kind == "taid" else value

    def _softened(self, logits):
        return logits if self.temperature == 1 else logits / self.temperature

    def _dense(self, logits, teacher):
        shared = shared_vocabulary(teacher.shape[-1], logits.shape[-1])
        teacher = teacher[:, :shared].to(logits.dtype)
        best, teacher, logits = teacher.argmax(-1), self._softened(teacher), logits[:, :shared]
        if self.state["kind"] == "forward":
            value = _ForwardKL.apply(logits, teacher)
            return value, value, best
        return *self._pair(torch.log_softmax(teacher, dim=-1), torch.log_softmax(logits, dim=-1)), best

    def _topk(self, logits, ids, weights):
        return *self._pair(*bucket_log_probs(logits, ids, weights.to(logits.dtype))), ids[:, 0]

    def _sampled(self, logits, ids, weights):
        weights = weights.to(logits.dtype)
        log_q = logits.gather(-1, ids[:, :-1]) - logits.logsumexp(-1, keepdim=True)
        value = weights[:, -1] - (weights[:, :-1] * log_q).sum(-1)
        return value, value, ids[:, 0]

    def _collect(self, split: str, sums: list[torch.Tensor], count: int) -> None:
        sums = torch.stack([*(value.float() for value in sums), torch.tensor(float(count), device=sums[0].device)])
        self.state[split] = self.state[split] + sums if split in self.state else sums

    def pop_metrics(self, split: str = "train") -> dict[str, float]:
        """Average `ce`, `kd` and `agree` per labelled token over all processes, and reset the sums."""
        sums = self.state.pop(split, None)
        if sums is None:
            return {}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        *values, count = sums.tolist()
        return {key: value / max(count, 1.0) for key, value in zip(("ce", "kd", "agree", "objective"), values)}
