"""The student: base model + LoRA adapter and its loss on packed answers; with the adapter off, the online teacher.

In: a base-model folder, packed samples and a teacher signal. Out: the loss of every answer token, or KL per answer.
The decoder and the output matrix are called apart, so that logits exist at answer positions only, chunk by chunk.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pipeline.batch import Packed, common_opening, pack, plan_epoch, samples_of, topk_of
from pipeline.config import Config, Lora, Train
from pipeline.loss import Signal, TopK, answer_losses
from pipeline.previous import adapter_of
from pipeline.resources import compute_dtype
from pipeline.store import Folder


def load_base(path: str, dtype: str | None = None) -> Any:
    """Load the base model frozen, in this machine's `compute_dtype` unless another is asked for."""
    on_gpu = torch.cuda.is_available()
    # On a CPU, PyTorch's fused attention with a mask makes the whole step a third slower than the plain one.
    attention = "sdpa" if on_gpu else "eager"
    dtype = dtype or compute_dtype(on_gpu)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention)
    model.config.use_cache = False
    return model.requires_grad_(False)


def add_adapter(base: Any, lora: Lora, base_name: str) -> PeftModel:
    """Put a fresh adapter on the model's linear layers; in bf16, its fp32 master copy is the optimiser's."""
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or 2 * lora.rank,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    model: Any = get_peft_model(base, config, autocast_adapter_dtype=False).to(base.dtype)
    # PEFT puts the model's folder there, which is another one on every machine.
    model.peft_config["default"].base_model_name_or_path = base_name
    return model


def load_adapter(base: Any, folder: str, is_trainable: bool = False) -> PeftModel:
    """Put a trained adapter on the base model, in its dtype like a fresh one."""
    return PeftModel.from_pretrained(base, folder, is_trainable=is_trainable, autocast_adapter_dtype=False)


class Student(nn.Module):
    """What DeepSpeed trains: the forward pass is the loss."""

    def __init__(self, model: PeftModel, loss_chunk: int) -> None:
        super().__init__()
        self.model = model
        self._loss_chunk = loss_chunk

    def hidden(self, packed: Packed) -> Tensor:
        """Return the decoder's last hidden states at the answer positions, [A, d]."""
        base: Any = self.model.get_base_model()
        states = base.get_decoder()(
            input_ids=packed.input_ids, position_ids=packed.position_ids, attention_mask=packed.attention_mask
        ).last_hidden_state  # [rows, L, d]
        return states.flatten(0, 1)[packed.answer_index]

    def forward(self, packed: Packed, signal: Signal) -> Tensor:
        """Return the loss of every answer token, float32 [A]."""
        hidden = self.hidden(packed)
        base: Any = self.model.get_base_model()
        weight = base.get_output_embeddings().weight  # reading it is what makes ZeRO 3 gather it
        return answer_losses(hidden, weight, signal, self._loss_chunk)

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Be the base model, without gradients."""
        with torch.no_grad(), self.model.disable_adapter():
            yield


class KlScorer:
    """A student for measuring only: the base model with a trained adapter, or with a fresh one, which does nothing."""

    def __init__(self, train: Train, base_path: str, num_threads: int, adapter: Folder | None = None) -> None:
        """Load both; `adapter` is a PEFT folder, wherever it is."""
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self._device.type == "cpu":
            torch.set_num_threads(num_threads)
        base = load_base(base_path)
        if adapter is None:
            self.model = add_adapter(base, train.lora, base_path)
        else:
            with tempfile.TemporaryDirectory(prefix="adapter-") as local:
                self.model = load_adapter(base, adapter.copy_to(local))
        self._student = Student(self.model, train.loss_chunk).to(self._device)
        self._train = train

    def initial_kl(self, answers: pa.Table) -> np.ndarray:
        """Like `kl`, with the adapter off."""
        with self._student.adapter_off():
            return self.kl(answers)

    def kl(self, answers: pa.Table) -> np.ndarray:
        """Return each answer's mean KL to the stored teacher over its tokens, in nats at temperature 1, [answers]."""
        settings = self._train
        samples = samples_of(answers)
        lengths = np.asarray([sample.length for sample in samples])
        result = np.zeros(len(samples))
        batch_tokens, opening = settings.row_tokens * settings.micro_rows, common_opening(samples)
        for rows in plan_epoch(lengths, batch_tokens, settings.row_tokens, seed=0, opening=opening):
            order = [index for row in rows for index in row]
            packed = pack([samples[index] for index in order], [len(row) for row in rows]).to(self._device)
            ids, logprobs = topk_of(answers.take(pa.array(order, pa.int64())), len(packed.answer_index))
            with torch.no_grad():
                losses = self._student(packed, TopK(ids.to(self._device), logprobs.to(self._device))).cpu().numpy()
            ends = np.cumsum([len(samples[index].answer_ids) for index in order])
            for index, part in zip(order, np.split(losses, ends[:-1]), strict=True):
                result[index] = part.mean()
        return result


_loaded: dict[tuple[str, str | None], KlScorer] = {}


def initial_scorer(config: Config) -> KlScorer:
    """Return a scorer of what training starts from: the previous run's adapter, or none.

    A process holds the last one, which is that of all corpora without a previous run.
    """
    path, previous_run = config.model.path, config.update.previous_run
    if (path, previous_run) not in _loaded:
        _loaded.clear()
        adapter = adapter_of(previous_run) if previous_run else None
        _loaded[path, previous_run] = KlScorer(config.train, path, config.cluster.worker_cpus, adapter)
    return _loaded[path, previous_run]


class GreedyReply(NamedTuple):
    """`margin` is the smallest lead of a chosen token over the runner-up, in nats: how safe the reply is from ties."""

    adapter_ids: list[int]
    base_ids: list[int]
    margin: float


def greedy_replies(model: PeftModel, prompts: list[list[int]], max_tokens: int) -> list[GreedyReply]:
    """Continue every prompt greedily with the adapter and without it, in plain PEFT on transformers: the oracle."""
    replies = []
    for prompt in prompts:
        adapter_ids, margin = continue_greedily(model, prompt, max_tokens)
        with model.disable_adapter():
            base_ids, _ = continue_greedily(model, prompt, max_tokens)
        replies.append(GreedyReply(adapter_ids, base_ids, margin))
    return replies


def continue_greedily(model: Any, prompt: list[int], max_tokens: int) -> tuple[list[int], float]:
    """Return the most likely continuation, and its smallest lead over a runner-up in nats."""
    output = model.generate(
        input_ids=torch.tensor([prompt], device=model.device),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
        max_new_tokens=max_tokens,
        do_sample=False,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    leads = [logits[0].float().log_softmax(-1).topk(2).values for logits in output.logits]
    margin = min(float(lead[0] - lead[1]) for lead in leads)
    return output.sequences[0, len(prompt) :].tolist(), margin
