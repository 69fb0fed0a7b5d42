"""Chats -> token ids, text and top-k log-probabilities: the engine that writes.

In: prompts as token ids, and a seed for all of them. Out: one `Completion` per prompt, in order.
The engine runs inside the calling process (an actor) and forgets its prefix cache between calls, so that a unit of work
that is redone after a crash sees the same batches as in an undisturbed run and, but on several GPUs, the same tokens.
"""

import io
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from pipeline.config import Cluster, Model, Sampling
from pipeline.resources import compute_dtype
from pipeline.store import PROGRESS_S

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATE = date(2024, 7, 26)  # what a chat template that asks for it is told, so that a prompt is the same tomorrow
# What every chat template is told, here and at the endpoint: a question is answered at once, without thinking aloud.
TEMPLATE_ARGUMENTS = {"enable_thinking": False, "date_string": DATE.strftime("%d %b %Y")}


class Completion(NamedTuple):
    """`topk_*` are [len(token_ids), k], most likely first, natural log at temperature 1; k is 0 if not asked for."""

    text: str
    finish_reason: str
    token_ids: np.ndarray
    topk_ids: np.ndarray
    topk_logprobs: np.ndarray


class EngineStats(NamedTuple):
    """Tokens and seconds of all calls of an engine so far."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    engine_seconds: float = 0.0

    def since(self, before: "EngineStats") -> dict[str, float]:
        return {name: new - old for name, new, old in zip(self._fields, self, before, strict=True)}


class _Reporter(tqdm):
    """vLLM's progress bar, which draws nothing and reports how many requests are finished, of how many."""

    def __init__(self, iterable: Any = None, *, report: Callable[[int, int], None], **options: Any) -> None:
        self._report = report
        self._has_reported = False
        # vLLM iterates over prompts while it takes them in, in no time.
        disable = iterable is not None
        super().__init__(
            iterable, **options, disable=disable, file=io.StringIO(), delay=PROGRESS_S, mininterval=PROGRESS_S
        )

    def display(self, *_: Any, **__: Any) -> None:
        if self.n < self.total or self._has_reported:  # of a short call, nothing
            self._has_reported = True
            self._report(self.n, self.total)


class Engine:
    """One vLLM engine, with or without adapters; whoever sets `on_progress` is told how a call goes on."""

    def __init__(self, model: Model, cluster: Cluster, top_k: int = 0, adapter_rank: int = 0) -> None:
        """Load the model; `top_k` and `adapter_rank` are the most that `complete` may be asked for."""
        if not cluster.engine_gpus:
            _require_compiler()
        # In-process the engine loads in a third of the time and dies with its actor.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM

        arguments = engine_arguments(model, cluster) | {"max_logprobs": max(top_k, 1), "disable_log_stats": True}
        if adapter_rank:
            arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": vllm_rank(adapter_rank)}
        self._adapters: dict[str, int] = {}
        self._llm = LLM(model=model.path, **(arguments | model.engine))
        self.tokenizer = load_tokenizer(model.path)
        self.max_model_len = model.max_model_len
        self.stats = EngineStats()
        self.on_progress: Callable[[int, int], None] | None = None

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        seed: int,
        sampling: Sampling,
        max_tokens: int,
        top_k: int = 0,
        json_schema: dict[str, Any] | None = None,
        adapter: str | None = None,
    ) -> list[Completion]:
        """Complete every prompt; `adapter` is a PEFT folder. Prompts that share a prefix should stand together.

        A prompt with `max_tokens` behind it must fit into `max_model_len`; the caller rejects those that do not.
        """
        if not prompts:
            return []
        import torch
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import StructuredOutputsParams

        started = time.monotonic()
        self._llm.reset_prefix_cache()
        # A seed per request would halve the CPU's speed: each row of each step then draws its own noise. It does not
        # reach the processes of an engine on several GPUs, which go on from the noise that they have.
        torch.manual_seed(seed)
        parameters = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.sampling_top_k,
            max_tokens=max_tokens,
            logprobs=top_k or None,
            flat_logprobs=bool(top_k),
            structured_outputs=StructuredOutputsParams(json=json_schema) if json_schema else None,
            detokenize=False,  # it would spell out each of the k alternatives
        )
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            parameters,
            use_tqdm=partial(_Reporter, report=self.on_progress) if self.on_progress else False,
            lora_request=LoRARequest(adapter, self._adapter_id(adapter), adapter) if adapter else None,
        )
        self.stats = EngineStats(
            self.stats.prompt_tokens + sum(len(prompt) for prompt in prompts),
            self.stats.cached_tokens + sum(output.num_cached_tokens or 0 for output in outputs),
            self.stats.output_tokens + sum(len(output.outputs[0].token_ids) for output in outputs),
            self.stats.engine_seconds + time.monotonic() - started,
        )
        return [self._completion(output.outputs[0], top_k) for output in outputs]

    def _completion(self, output: Any, top_k: int) -> Completion:
        text: Any = self.tokenizer.decode(
            output.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        token_ids = np.asarray(output.token_ids, dtype=np.int32)
        num_tokens = len(token_ids)
        if not top_k:
            empty = np.empty((num_tokens, 0))
            return Completion(text, output.finish_reason, token_ids, empty.astype(np.int32), empty)
        # vLLM puts the sampled token before the k most likely ones.
        flat_ids = np.asarray(output.logprobs.token_ids, dtype=np.int32).reshape(num_tokens, top_k + 1)
        flat_logprobs = np.asarray(output.logprobs.logprobs, dtype=np.float32).reshape(num_tokens, top_k + 1)
        assert (flat_ids[:, 0] == token_ids).all(), "log-probabilities do not belong to the sampled tokens"
        return Completion(text, output.finish_reason, token_ids, flat_ids[:, 1:], flat_logprobs[:, 1:])

    def fits(self, chat: list[dict[str, str]], reply_tokens: int) -> bool:
        """Say whether the context holds a chat and a reply of so many tokens."""
        return len(render_chat(self.tokenizer, chat)) + reply_tokens <= self.max_model_len

    def _adapter_id(self, folder: str) -> int:
        """Return an id of its own for every adapter: vLLM tells adapters apart by it, and by nothing else."""
        return self._adapters.setdefault(folder, len(self._adapters) + 1)


def _require_compiler() -> None:
    """Raise if vLLM could not compile its sampler for this CPU; it would say so in the middle of the first unit."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if not shutil.which(compiler):
        raise OSError(
            f"vLLM compiles its sampler on CPUs, and there is no {compiler}: install it, or name the C++ compiler"
            " in the environment variable CXX"
        )


def engine_arguments(model: Model, cluster: Cluster) -> dict[str, Any]:
    """Return the vLLM arguments that the writing engines and the endpoint share."""
    arguments: dict[str, Any] = {
        "dtype": compute_dtype(on_gpu=cluster.engine_gpus > 0),
        "seed": 0,
        "max_model_len": model.max_model_len,
        "logprobs_mode": "raw_logprobs",
        "enable_prefix_caching": True,
        # Not the model folder's sampling defaults: a client who names none is answered as the evaluation was.
        "generation_config": "vllm",
    }
    if cluster.engine_gpus:
        return arguments | {
            "tensor_parallel_size": cluster.engine_gpus,
            "gpu_memory_utilization": cluster.gpu_memory_share,
        }
    return arguments | {
        "kv_cache_memory_bytes": cluster.kv_cache_gb << 30,
        "max_num_seqs": 128,
        # Compiling takes a minute at every start and gained nothing measurable on a CPU.
        "enforce_eager": True,
        "worker_extension_cls": "pipeline.cpu_lora.GroupedLora",
    }


def load_tokenizer(path: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def render_chat(tokenizer: "PreTrainedTokenizerBase", chat: list[dict[str, str]]) -> list[int]:
    """Return the token ids of a chat, up to where the assistant's reply begins."""
    ids: Any = tokenizer.apply_chat_template(
        chat,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        strftime_now=DATE.strftime,
        **TEMPLATE_ARGUMENTS,
    )
    return ids


def render_user_opening(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the token ids of a chat up to where a user's words would stand."""
    mark = "\u2063MARK\u2063"
    text: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], tokenize=False, strftime_now=DATE.strftime, **TEMPLATE_ARGUMENTS
    )
    return tokenizer.encode(text.partition(mark)[0], add_special_tokens=False)


def vllm_rank(rank: int) -> int:
    """Return the smallest rank limit that vLLM knows and that holds this rank."""
    return next(limit for limit in (8, 16, 32, 64, 128, 256, 320, 512) if limit >= rank)
