"""Student hidden states at answer positions + a teacher signal -> the distillation loss per answer token.

In: hidden states [A, d] and the output matrix [V, d]; logits exist for one chunk of positions at a time.
Out: losses [A] in nats. Forward KL over k + 1 outcomes, the k stored tokens and "everything else" (the tail):

    L = sum_{i in top-k, tail} q_i (log q_i - log p_i),    q, p proportional to teacher^(1/T), student^(1/T)

which is never negative, and with k = vocabulary and T = 1 the exact KL of Kujanpää et al. 2025, Eq. 1. Each signal
gives its own gradient with respect to the logits, so that backward keeps no [A, V] tensor and recomputes nothing.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# Stored log-probabilities are float16, so k of them may add up to slightly more than one; both tails get this floor.
TAIL_FLOOR = 1e-5


class LossAndGradient(NamedTuple):
    loss: Tensor  # [n]
    gradient: Tensor  # [n, V], of the loss with respect to the logits


class Signal(Protocol):
    """What the teacher says about the answer positions; `chunk` is the range of positions that `logits` belong to."""

    def compare(self, logits: Tensor, chunk: slice, weight: Tensor) -> LossAndGradient: ...


@dataclass(frozen=True)
class TopK:
    """The stored top-k of the teacher at temperature 1."""

    ids: Tensor  # int64 [A, k]
    logprobs: Tensor  # float32 [A, k]
    temperature: float = 1.0

    def compare(self, logits: Tensor, chunk: slice, weight: Tensor) -> LossAndGradient:
        ids = self.ids[chunk]
        logprobs = torch.log_softmax(logits, dim=-1)  # [n, V]
        student, teacher = logprobs.gather(1, ids), self.logprobs[chunk]
        if has_tail := ids.shape[1] < logits.shape[1]:
            student, teacher = _with_tail(student), _with_tail(teacher)
        log_p = torch.log_softmax(student / self.temperature, dim=-1)
        log_q = torch.log_softmax(teacher / self.temperature, dim=-1)
        q = log_q.exp()
        loss = (q * (log_q - log_p)).sum(-1)
        # dL/d(log student_i) = (p_i - q_i) / T for the k + 1 outcomes; these add up to zero over i, so a top-k logit
        # gets its own and the tail's logits share the tail's in proportion to their probability.
        outcome = (log_p.exp() - q) / self.temperature  # [n, k + 1]
        tail_scale = outcome[:, -1:] / student[:, -1:].exp() if has_tail else 0.0
        gradient = logprobs.exp_().mul_(tail_scale).scatter_(1, ids, outcome[:, : ids.shape[1]])
        return LossAndGradient(loss, gradient)


@dataclass(frozen=True)
class FullVocabulary:
    """The same weights with the passage in the prompt: teacher hidden states at the same answer positions."""

    hidden: Tensor  # [A, d]
    temperature: float = 1.0

    def compare(self, logits: Tensor, chunk: slice, weight: Tensor) -> LossAndGradient:
        teacher = (self.hidden[chunk] @ weight.T).float()
        log_q = torch.log_softmax(teacher / self.temperature, dim=-1)
        log_p = torch.log_softmax(logits / self.temperature, dim=-1)
        q = log_q.exp()
        loss = (q * (log_q - log_p)).sum(-1)
        return LossAndGradient(loss, log_p.exp_().sub_(q).div_(self.temperature))


@dataclass(frozen=True)
class Labels:
    """Hard labels: cross-entropy on the sampled answer tokens (supervised fine-tuning, for comparison)."""

    ids: Tensor  # int64 [A]

    def compare(self, logits: Tensor, chunk: slice, weight: Tensor) -> LossAndGradient:
        ids = self.ids[chunk, None]
        logprobs = torch.log_softmax(logits, dim=-1)
        loss = -logprobs.gather(1, ids).squeeze(1)
        gradient = logprobs.exp_()
        return LossAndGradient(loss, gradient.scatter_add_(1, ids, torch.full_like(ids, -1, dtype=gradient.dtype)))


def _with_tail(logprobs: Tensor) -> Tensor:
    """Append the log of the mass that the k leave out: [n, k] -> [n, k + 1]."""
    tail = (1.0 - logprobs.exp().sum(-1, keepdim=True)).clamp_min(TAIL_FLOOR)
    return torch.cat([logprobs, tail.log()], dim=-1)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, signal: Signal, chunk: int) -> Tensor:
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk):
            positions = slice(start, start + chunk)
            logits = (hidden[positions] @ weight.T).float()  # [chunk, V]
            compared = signal.compare(logits, positions, weight)
            losses[positions] = compared.loss
            if gradient is not None:
                torch.mm(compared.gradient.to(weight.dtype), weight, out=gradient[positions])
            del logits, compared  # before the next chunk's are made
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].unsqueeze(1).to(gradient.dtype), None, None, None


def answer_losses(hidden: Tensor, weight: Tensor, signal: Signal, chunk: int) -> Tensor:
    """Return the loss of every answer position, float32 [A]; differentiable in `hidden` [A, d] only.

    `weight` is the frozen output matrix [V, d]; at most `chunk` x V logits exist at a time.
    """
    return _ChunkedLoss.apply(hidden, weight, signal, chunk)  # type: ignore[return-value]
