"""The loss against a full-vocabulary reference of a few lines, in value and in gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.loss import FullVocabulary, Labels, Signal, TopK, answer_losses

POSITIONS, WIDTH, VOCABULARY = 11, 16, 61


@pytest.fixture
def hidden() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(POSITIONS, WIDTH, requires_grad=True)


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def teacher() -> Tensor:
    """Logits of some teacher, [POSITIONS, VOCABULARY]."""
    return torch.randn(POSITIONS, VOCABULARY, generator=torch.Generator().manual_seed(2)) * 3


def gradient_of(losses: Tensor, hidden: Tensor) -> Tensor:
    # Unequal weights catch a backward pass that mixes up positions.
    return torch.autograd.grad((losses * torch.arange(1.0, POSITIONS + 1)).sum(), hidden)[0]


def exact_kl(hidden: Tensor, weight: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_p = F.log_softmax(hidden @ weight.T / temperature, dim=-1)
    log_q = F.log_softmax(teacher / temperature, dim=-1)
    return F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)


def bucketed_kl(hidden: Tensor, weight: Tensor, teacher: Tensor, k: int, temperature: float) -> Tensor:
    ids = teacher.topk(k).indices

    def outcomes(logits: Tensor) -> Tensor:
        kept = F.log_softmax(logits, dim=-1).gather(1, ids)
        tail = (1 - kept.exp().sum(-1, keepdim=True)).log()
        return F.log_softmax(torch.cat([kept, tail], dim=-1) / temperature, dim=-1)

    return F.kl_div(outcomes(hidden @ weight.T), outcomes(teacher), log_target=True, reduction="none").sum(-1)


def stored(teacher: Tensor, k: int, temperature: float = 1.0) -> TopK:
    logprobs, ids = F.log_softmax(teacher, dim=-1).topk(k)
    return TopK(ids, logprobs, temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_whole_vocabulary_equals_exact_kl(hidden: Tensor, weight: Tensor, teacher: Tensor, temperature: float) -> None:
    reference = exact_kl(hidden, weight, teacher, temperature)
    losses = answer_losses(hidden, weight, stored(teacher, VOCABULARY, temperature), chunk=4)
    torch.testing.assert_close(losses, reference, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient_of(losses, hidden), gradient_of(reference, hidden), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_tail_bucket(hidden: Tensor, weight: Tensor, teacher: Tensor, k: int, temperature: float) -> None:
    reference = bucketed_kl(hidden, weight, teacher, k, temperature)
    losses = answer_losses(hidden, weight, stored(teacher, k, temperature), chunk=4)
    torch.testing.assert_close(losses, reference, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gradient_of(losses, hidden), gradient_of(reference, hidden), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("k", [1, 5, VOCABULARY])
def test_bucketing_never_gives_more_than_exact_kl(hidden: Tensor, weight: Tensor, teacher: Tensor, k: int) -> None:
    losses = answer_losses(hidden, weight, stored(teacher, k), chunk=VOCABULARY)
    assert (losses <= exact_kl(hidden, weight, teacher, 1.0) + 1e-4).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_never_negative_with_float16_teacher(weight: Tensor, temperature: float) -> None:
    """Stored log-probabilities of a sure teacher add up to more than one after rounding."""
    torch.manual_seed(3)
    hidden = torch.randn(500, WIDTH)
    signal = stored(hidden @ weight.T, 20, temperature)
    rounded = TopK(signal.ids, signal.logprobs.half().float(), temperature)
    losses = answer_losses(hidden, weight, rounded, chunk=64)
    assert (rounded.logprobs.exp().sum(-1) > 1).any(), "the test does not reach the case it is for"
    assert (losses >= -1e-6).all()
    assert losses.mean() < 1e-3


def test_student_equal_to_teacher_has_no_loss_and_no_gradient(hidden: Tensor, weight: Tensor) -> None:
    losses = answer_losses(hidden, weight, stored((hidden @ weight.T).detach(), 5), chunk=4)
    assert losses.abs().max() < 1e-5
    assert gradient_of(losses, hidden).abs().max() < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_online_teacher_equals_exact_kl(hidden: Tensor, weight: Tensor, temperature: float) -> None:
    states = torch.randn(POSITIONS, WIDTH, generator=torch.Generator().manual_seed(4))
    reference = exact_kl(hidden, weight, states @ weight.T, temperature)
    losses = answer_losses(hidden, weight, FullVocabulary(states, temperature), chunk=4)
    torch.testing.assert_close(losses, reference, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient_of(losses, hidden), gradient_of(reference, hidden), rtol=1e-3, atol=1e-4)


def test_labels_equal_cross_entropy(hidden: Tensor, weight: Tensor) -> None:
    ids = torch.randint(0, VOCABULARY, (POSITIONS,), generator=torch.Generator().manual_seed(5))
    reference = F.cross_entropy(hidden @ weight.T, ids, reduction="none")
    losses = answer_losses(hidden, weight, Labels(ids), chunk=4)
    torch.testing.assert_close(losses, reference)
    torch.testing.assert_close(gradient_of(losses, hidden), gradient_of(reference, hidden), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 3, POSITIONS, 1000])
def test_chunks_change_nothing(hidden: Tensor, weight: Tensor, teacher: Tensor, chunk: int) -> None:
    signals: list[Signal] = [stored(teacher, 5), Labels(teacher.argmax(-1)), FullVocabulary(hidden.detach() * 2)]
    for signal in signals:
        whole = answer_losses(hidden, weight, signal, chunk=POSITIONS)
        torch.testing.assert_close(answer_losses(hidden, weight, signal, chunk), whole)


def test_no_positions_give_no_loss(weight: Tensor) -> None:
    hidden = torch.randn(0, WIDTH, requires_grad=True)
    losses = answer_losses(hidden, weight, Labels(torch.empty(0, dtype=torch.int64)), chunk=4)
    assert losses.shape == (0,)
    losses.sum().backward()
