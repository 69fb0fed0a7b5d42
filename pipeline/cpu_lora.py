"""LoRA in vLLM's CPU build: two matrix products per adapter in a batch, and none for rows without one.

In: vLLM's own stacked adapter weights and its mapping from rows to slots. Out: the same sums, in the model's dtype as
PEFT computes them. What this replaces (vLLM 0.29) copies an adapter's matrices once per token, which makes prompts many
times slower, and reads slot -1, "no adapter", as the last slot: once every slot is taken, answers of the base model
that share a batch with an adapter's come from the wrong weights. vLLM imports this through `worker_extension_cls`.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

NO_ADAPTER = -1


class GroupedLora:
    """What `worker_extension_cls` names; importing it is all that it does."""


def update_metadata(self: Any, *arguments: Any, **more: Any) -> None:
    """Take over a step's mapping, and note once for all layers which rows belong to which slot."""
    _update_metadata(self, *arguments, **more)
    slots = self.token_lora_indices
    present = [slot for slot in slots.unique().tolist() if slot != NO_ADAPTER]
    everywhere = len(present) == 1 and bool((slots != NO_ADAPTER).all())
    self.row_groups = [(slot, slice(len(slots)) if everywhere else (slots == slot).nonzero()[:, 0]) for slot in present]


def add_lora_linear(
    self: Any,
    y: Tensor,
    x: Tensor,
    lora_a_stacked: tuple[Tensor, ...],
    lora_b_stacked: tuple[Tensor, ...],
    scale: float,
    output_slices: tuple[int, ...],
    **_: Any,
) -> None:
    """Add every row's adapter to `y` [rows, out], in place.

    `x` is [rows, in]; for each output slice, A is [slots, 1, rank, in] and B is [slots, 1, slice, rank].
    """
    x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    for slot, rows in self.row_groups:
        own, start = x[rows], 0
        for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            added = torch.mm(torch.mm(own, a[slot, 0].T), b[slot, 0].T)
            y[rows, start : start + size] += added if scale == 1.0 else added * scale
            start += size


_update_metadata = PunicaWrapperCPU.update_metadata
PunicaWrapperCPU.update_metadata = update_metadata  # type: ignore[method-assign]
PunicaWrapperCPU.add_lora_linear = add_lora_linear  # type: ignore[method-assign, assignment]
