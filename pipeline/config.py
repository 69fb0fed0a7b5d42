"""One TOML file + `section.key=value` overrides -> one frozen, fully checked `Config`.

In: a path and a list of overrides. Out: `Config`, or a `ValueError` that names every wrong field, value, remedy.
Imports no torch, ray or vllm, so that `--help` and a wrong key answer at once. Relative paths count from the
current directory, not from the file.
"""

import difflib
import os
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator


def _absolute(path: str) -> str:
    if not path:
        raise ValueError("an empty path; give a folder, a file or a URI")
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


# Workers have working directories of their own, so paths are settled here, once.
Location = Annotated[str, AfterValidator(_absolute)]
# Ray's label selectors: "H100", "!H100", "in(H100, H200)", "!in(H100, H200)".
_LABEL = r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?"
LabelKey = Annotated[str, Field(pattern=rf"^({_LABEL}/)?{_LABEL}$")]
LabelSelector = Annotated[str, Field(pattern=rf"^!?({_LABEL}|in\({_LABEL}(, ?{_LABEL})*\))$")]
CORPUS = "{corpus}"
AUTO = "auto"  # what clients call the adapter whose corpus fits the question best
QuestionKind = Literal["fact", "definition", "detail", "comparison", "summary", "use"]
QUESTION_KINDS: tuple[QuestionKind, ...] = get_args(QuestionKind)

ENGINE_KEYS_SET_HERE = frozenset(
    [
        "model",
        "tokenizer",
        "dtype",
        "seed",
        "max_model_len",
        "max_logprobs",
        "logprobs_mode",
        "enable_lora",
        "max_loras",
        "max_cpu_loras",
        "max_lora_rank",
        "tensor_parallel_size",
        "gpu_memory_utilization",
        "enable_prefix_caching",
        "worker_extension_cls",
    ]
)
DEEPSPEED_KEYS_SET_HERE = frozenset(
    [
        "bf16",
        "fp16",
        "gradient_clipping",
        "gradient_accumulation_steps",
        "optimizer",
        "scheduler",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
    ]
)


def _refuse_keys(field: str, given: dict[str, Any], refused: frozenset[str]) -> None:
    own = sorted(refused & given.keys())
    if own:
        raise ValueError(f"{field} may not set {', '.join(own)}: other settings decide it; remove it")


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys; the text under a field is its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, strict=True)


class Model(Section):
    path: Location
    """Folder of the base model in Hugging Face format (config.json, safetensors, tokenizer, chat template), the same on
    every node; no URI."""
    max_model_len: int = Field(default=2048, ge=256)
    """Longest prompt plus reply, in tokens."""
    engine: dict[str, Any] = {}
    """Further vLLM engine arguments, passed on as they are; keys that other settings decide are refused."""

    @model_validator(mode="after")
    def _refuse_own_engine_keys(self) -> "Model":
        _refuse_keys("model.engine", self.engine, ENGINE_KEYS_SET_HERE)
        return self


class Read(Section):
    paths: list[str] = Field(min_length=1)
    """Files, folders, globs, or s3:// and gs:// URIs of them."""
    text_field: str = "text"
    """Name of the text field in JSONL and Parquet rows."""
    title_field: str = "title"
    """Name of the title field in JSONL and Parquet rows; rows without it have no title."""
    max_file_mb: int = Field(default=32, ge=1)
    """Larger files are rejected, except JSONL and Parquet, which are read in pieces and limited per row."""
    unit_files: int = Field(default=256, ge=1)
    """Files that one task reads and commits together."""
    near_duplicate_threshold: float | None = Field(default=None, gt=0, le=1)
    """Estimated Jaccard similarity of word 5-grams from which documents count as near-duplicates; unset: keep them."""


class Chunk(Section):
    max_tokens: int = Field(default=256, ge=16)
    """Longest passage, in tokens of the base model."""
    shard_passages: int = Field(default=64, ge=1)
    """Passages per shard: the unit that one engine works on, commits, and redoes after a crash."""


class Sampling(Section):
    temperature: float = Field(default=1.0, ge=0, le=2)
    """Sampling temperature; 0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens that holds this much probability; below 1 the vocabulary is sorted,
    which is slow on a CPU."""
    sampling_top_k: int = Field(default=0, ge=0)
    """Sample from this many most likely tokens; 0: from all."""


class QuestionSection(Sampling):
    per_passage: int = Field(default=30, ge=1)
    """Quota of distinct, standalone questions for each passage, shared out over the kinds."""
    per_sentence: int | None = Field(default=None, ge=1)
    """Quota for each sentence of a passage, instead: where much is said, much is asked."""
    kinds: list[QuestionKind] = Field(default=list(QUESTION_KINDS), min_length=1)
    """Kinds of question to ask for."""
    per_call: int = Field(default=3, ge=1, le=20)
    """Questions asked for in one reply."""
    structured: bool = False
    """Force replies into a JSON list of strings; helps larger models, costs the smallest ones variety."""
    max_rounds: int = Field(default=4, ge=1)
    """Times a passage with an open quota is asked, each time with another seed."""
    max_tokens: int = Field(default=192, ge=32)
    """Longest reply."""
    temperature: float = Field(default=0.8, ge=0, le=2)
    """Sampling temperature; 0 is greedy."""
    seed: int = 0
    """Seed from which the seed of every batch of requests is derived."""


class AnswerSection(Sampling):
    per_question: int = Field(default=1, ge=1)
    """Answers sampled for each question."""
    top_k: int = Field(default=20, ge=1, le=1000)
    """Teacher log-probabilities stored for each answer token; has nothing to do with how answers are sampled."""
    max_tokens: int = Field(default=128, ge=1)
    """Longest answer."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """Sampling temperature; 0 is greedy. The stored log-probabilities are always those of temperature 1."""
    seed: int = 0
    """Seed from which the seed of every batch of requests is derived."""


class General(Sampling):
    """Prompts that have nothing to do with the corpus, written and answered by the base model alone."""

    prompts: int = Field(default=256, ge=0)
    """Prompts to train on: on these the student keeps the base model's answers; 0 leaves them out."""
    share: float = Field(default=0.2, ge=0, lt=1)
    """Share of these among the samples of every epoch."""
    held_out: int = Field(default=64, ge=0)
    """Prompts to measure forgetting with; never trained on."""
    first_words: list[str] = Field(
        default=["", "What", "Who", "Where", "When", "Why", "How", "Which", "Tell me"], min_length=1
    )
    """What the prompts begin with, in turn; the model goes on. After nothing it writes what it was trained on last: one
    for code asks for code."""
    max_tokens: int = Field(default=96, ge=16)
    """Longest prompt, and longest answer; both may be cut off there."""
    temperature: float = Field(default=0.8, ge=0, le=2)
    """Sampling temperature of both; 0 is greedy."""
    seed: int = 0
    """Seed of prompts and answers."""


class Reading(Section):
    """Questions asked again with retrieved passages in which names and numbers are exchanged: what the student has
    learnt of them is wrong there, so that it goes on reading what it is given, as the base model does."""

    per_passage: int = Field(default=0, ge=0)
    """Questions of each passage that are asked so, with `serve.retrieval_passages` passages; 0 leaves them out. Names
    are words that always have a capital letter: in German all nouns, in scripts without such letters none."""
    share: float = Field(default=0.04, ge=0, lt=1)
    """Share of these among the samples of every epoch; each is as long as several others."""


class FilterSection(Section):
    keep_unfinished: bool = False
    """Keep answers that were cut off at answer.max_tokens."""
    reject_leak_phrases: bool = True
    """Reject answers that speak of "the text" or "the passage", which the student would copy."""
    reject_invented_numbers: bool = True
    """Reject answers with a number of three digits or more, a year above all, that neither passage nor question has."""
    min_initial_kl: float | None = Field(default=None, ge=0)
    """Drop answers on which the closed-book model, in an update the adapter that it goes on from, agrees with the
    teacher: mean KL per token, in nats, below this. What that adapter was trained on is kept, to be replayed."""


class Update(Section):
    """Go on from an earlier run of the corpus, before some of its documents changed."""

    previous_run: Location | None = None
    """Its run directory: passages that stand there, too, keep their questions and answers, and its adapter is trained
    on."""
    replay_share: float = Field(default=0.5, ge=0, lt=1)
    """Share of answers about unchanged passages among the samples of every epoch, against forgetting."""
    forget_removed: bool = False
    """Asked about what previous_run was taught and no document says any more, the student learns to answer like the
    base model again."""
    ask_again: bool = False
    """Second round: about the unchanged passages, too, `question.per_passage` questions are written that were not asked
    there."""
    ask_for_untold: bool = False
    """The second round asks for the words that no short answer has given: once most are, which the report's coverage
    says, other questions hardly find the rest. Before that it is no help to a small model."""

    @model_validator(mode="after")
    def _check(self) -> "Update":
        if self.forget_removed and self.previous_run is None:
            raise ValueError("forget_removed = true needs previous_run, to know what was removed; set it")
        if self.ask_again and self.previous_run is None:
            raise ValueError("ask_again = true needs previous_run, to know what was asked; set it")
        if self.ask_for_untold and not self.ask_again:
            raise ValueError("ask_for_untold = true is about a second round; set ask_again, too")
        return self


class Lora(Section):
    rank: int = Field(default=64, ge=1, le=512)
    """Rank of the adapter."""
    alpha: int | None = Field(default=None, ge=1)
    """Scale numerator; unset: twice the rank, as the paper."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Layers that it adapts, by the end of their names, as PEFT takes them; all-linear: all but the output, or in an
    update those of the previous run."""


class Train(Section):
    teacher: Literal["stored", "online", "sft", "raw_text"] = "stored"
    """Signal: `stored`, the answers' top-k; `online`, the same weights with the passage in the prompt; `sft`, the
    answers' own tokens; `raw_text`, the passages' own tokens without any question."""
    lora: Lora = Lora()
    epochs: int = Field(default=4, ge=1)
    """Passes over the answers."""
    learning_rate: float = Field(default=5e-4, gt=0, lt=1)
    """Peak learning rate of AdamW; shorter steps and larger models want less."""
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises; it then falls linearly to zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of the adapter."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    temperature: float = Field(default=1.0, gt=0, le=10)
    """Softens both distributions in the loss; the paper uses 2."""
    batch_tokens: int = Field(default=1024, ge=64)
    """Tokens of all workers together in one optimiser step: batch_tokens / row_tokens rows. Each worker needs one at
    least, and GPUs want many: raise it with them."""
    row_tokens: int = Field(default=256, ge=64)
    """Length of one packed row, in tokens; several samples share it, and the opening of their prompts, without seeing
    each other. A longer sample has a row of its own and counts as several."""
    micro_rows: int = Field(default=4, ge=1)
    """Packed rows in one forward and backward pass."""
    loss_chunk: int = Field(default=256, ge=1)
    """Answer positions whose logits are in memory at a time."""
    zero_stage: Literal[1, 2, 3] = 1
    """DeepSpeed ZeRO stage, what the workers share: the optimiser's state, with 2 also gradients (for adapters of a
    billion parameters), with 3 also the base model."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more work."""
    checkpoint_steps: int = Field(default=100, ge=1)
    """Optimiser steps between checkpoints."""
    seed: int = 0
    """Seed of the adapter's initial weights and the sample order."""
    deepspeed: dict[str, Any] = {}
    """Further DeepSpeed settings, merged in as they are; keys that other settings decide are refused."""

    @model_validator(mode="after")
    def _check(self) -> "Train":
        _refuse_keys("train.deepspeed", self.deepspeed, DEEPSPEED_KEYS_SET_HERE)
        zero = self.deepspeed.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError(f"deepspeed.zero_optimization = {zero!r}; give a table")
        _refuse_keys("train.deepspeed.zero_optimization", zero, frozenset(["stage"]))
        if self.batch_tokens < self.row_tokens:
            raise ValueError(
                f"batch_tokens = {self.batch_tokens} is less than row_tokens = {self.row_tokens}; raise batch_tokens"
            )
        return self


class Judge(Section):
    """A language model that grades replies: the base model, or one at an OpenAI-compatible endpoint, whose key is
    OPENAI_API_KEY."""

    model: str | None = None
    """Name of the model at the endpoint; unset: the base model grades, in the local engine."""
    url: str | None = None
    """Address of the endpoint of `model`, ending in /v1; unset: OpenAI's own."""
    max_tokens: int = Field(default=160, ge=32)
    """Longest grading, its reasons included."""
    concurrency: int = Field(default=16, ge=1)
    """Requests at a time."""

    @model_validator(mode="after")
    def _check(self) -> "Judge":
        if self.url and not self.model:
            raise ValueError(f"url = {self.url!r} needs the name of the model there; set model")
        return self


class Evaluate(Section):
    questions: Location | None = None
    """JSONL of questions for measuring only: `question`, `answers` (accepted strings), `context` (its gold passage),
    and if wanted `kind` and `id`; unset: questions that the base model wrote are held out."""
    max_questions: int | None = Field(default=None, ge=1)
    """Use only the first this many."""
    held_out: int = Field(default=100, ge=0)
    """Without a file: at most so many of the written questions, and at most a tenth of them, are kept out of training
    for measuring; in an update also those that the previous run kept out."""
    near_duplicate_threshold: float = Field(default=0.8, gt=0, le=1)
    """A training question whose words are this much those of an evaluation question (Jaccard) is not trained on."""
    baselines: list[Literal["sft", "raw_text"]] = []
    """Adapters to train for comparison: on the same answers with hard labels, and on the passages' raw text."""
    unrelated: Location | None = None
    """JSONL like `questions` about other matters, to see what the adapter does to them, without their passages and with
    them in the prompt."""
    retrieval: bool = True
    """Ask with the passages that BM25 finds in the prompt, too; these are the longest prompts."""
    embedding_model: Location | None = None
    """Folder of a sentence-transformers model: retrieval by its embeddings becomes an arm, beside that by BM25."""
    judge: Judge | None = None
    """Grade replies with a language model, too."""
    max_tokens: int = Field(default=128, ge=1)
    """Longest answer."""
    bootstrap_resamples: int = Field(default=2000, ge=100)
    """Resamples for the 95 % intervals."""
    seed: int = 0
    """Seed of the resampling."""


class Gate(Section):
    """Thresholds that an adapter must reach to be published; what could not be measured is not held against it. With 1
    (`max_kl_to_base`: 100, `min_gap_closed`: -100) one lets everything through."""

    min_gap_closed: float | None = 0.1
    """Least share of the gap between closed book and gold passage that it closes, where there clearly is one."""
    max_closed_book_loss: float | None = Field(default=0.05, ge=0)
    """Most that its score may lie below that of the base model alone, where there is no clear gap."""
    max_kl_to_base: float | None = Field(default=0.3, ge=0)
    """Forgetting: most that it may differ from the base model on general prompts, in nats per token."""
    max_general_loss: float | None = Field(default=0.2, ge=0)
    """Forgetting: most that its share of right answers to general questions may fall."""
    max_refusal_loss: float | None = Field(default=0.5, ge=0)
    """Most that its share of refusals may fall on questions that nobody can answer."""
    max_retrieval_loss: float | None = Field(default=0.2, ge=0)
    """Most that its score with retrieved passages may lie below that of the base model with them."""
    max_previous_loss: float | None = Field(default=0.2, ge=0)
    """Most that its score may lie below that of the version that clients have now."""


class Publish(Section):
    registry: Location
    """Folder or bucket URI of the adapter registry."""
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    """Adapter name: lower-case letters, digits, dot, dash and underscore."""
    gate: Gate = Gate()
    """What an adapter must reach; `--force REASON` publishes it all the same."""


class Serve(Section):
    """Settings of the endpoint; the base model, the registry and the engine's size stand in the other sections."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all networks, with API keys (`python -m serve.admin CONFIG key`)."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on."""
    model_name: str | None = None
    """What clients call the base model; unset: the name of its folder."""
    adapter_slots: int = Field(default=4, ge=1)
    """Adapters that one batch can mix; each takes its size at `max_rank` in GPU memory."""
    adapters_in_memory: int = Field(default=32, ge=1)
    """Adapters that a replica keeps in CPU memory, least recently used out first."""
    adapters_on_disk: int = Field(default=256, ge=1)
    """Adapters that a replica keeps on its disk."""
    max_rank: int = Field(default=64, ge=1, le=512)
    """Largest rank of an adapter; smaller ones take as much room in a slot."""
    max_adapter_mb: int = Field(default=2048, ge=1)
    """Largest adapter, and largest retrieval index, in MiB."""
    cache_dir: Location = os.path.join(tempfile.gettempdir(), f"corpus-distillery-{os.getuid()}")
    """Local folder for the copies of adapters, where nobody else can write."""
    preload: list[str] = []
    """Adapters that a replica loads before it takes traffic."""
    min_replicas: int = Field(default=1, ge=0)
    """Fewest replicas; 0 frees the engine when nobody asks, and the first question then waits for its start."""
    max_replicas: int = Field(default=1, ge=1)
    """Most replicas."""
    target_requests: int = Field(default=32, ge=1)
    """Requests at a time that one replica should have before another is started."""
    idle_seconds: float = Field(default=600, ge=0)
    """Seconds that the load must stay low before a replica is stopped."""
    max_requests: int = Field(default=64, ge=1)
    """Requests that a replica works on at a time."""
    max_queued: int = Field(default=256, ge=1)
    """Requests that may wait for a replica; above it clients get 503 with Retry-After."""
    max_requests_per_key: int = Field(default=64, ge=1)
    """Answers that one API key may have in work or waiting, so that others' wait is bounded; above it 429. A request
    counts `n` for each of its prompts. One that alone makes more than this gets 400, with a key and without."""
    max_body_kb: int = Field(default=1024, ge=1)
    """Largest request body, in KiB; above it 413."""
    request_timeout_s: float = Field(default=120, gt=0)
    """Time until the first token, or the whole answer without streaming; above it 503."""
    alias_seconds: float = Field(default=2, gt=0, le=10)
    """How long the registry's names, aliases and keys are remembered: a moved alias takes effect this soon."""
    retrieval_passages: int = Field(default=3, ge=1, le=20)
    """Passages in the prompt of a request with `"retrieval": true`, and of the evaluation's retrieval arms."""
    retrieval_model: Literal["better", "adapter", "base"] = "better"
    """Who answers a request with `"retrieval"`: the adapter, the base model, or the one of them that scored better with
    retrieved passages when the adapter was evaluated."""
    auto_min_score: float = Field(default=0.2, ge=0, le=1)
    """Share of the question's words, rare ones counting more, that a passage must hold for `model: "auto"` to choose
    its corpus."""

    @model_validator(mode="after")
    def _check(self) -> "Serve":
        if self.adapters_in_memory < self.adapter_slots:
            raise ValueError(
                f"adapters_in_memory = {self.adapters_in_memory} is less than adapter_slots = {self.adapter_slots}; "
                "raise adapters_in_memory"
            )
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas = {self.max_replicas} is less than min_replicas = {self.min_replicas}; raise it"
            )
        return self


class Cluster(Section):
    address: str | None = None
    """Ray cluster to join; unset: RAY_ADDRESS if it is set, else a local Ray that ends with the run."""
    num_engines: int = Field(default=1, ge=1)
    """vLLM engines that write, or evaluate many corpora, at the same time."""
    engine_gpus: int = Field(default=0, ge=0)
    """GPUs per engine (tensor parallel size); 0: the CPU build."""
    engine_cpus: int = Field(default=2, ge=1)
    """CPU cores per engine; on the CPU build these are its compute threads."""
    engine_labels: dict[LabelKey, LabelSelector] = {}
    """Labels of the nodes that engines may run on, such as `{"ray.io/accelerator-type" = "in(L40S, H100)"}`."""
    kv_cache_gb: int = Field(default=2, ge=1)
    """Memory of a CPU engine for keys and values, in GiB."""
    gpu_memory_share: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory that an engine may take."""
    num_workers: int = Field(default=1, ge=1)
    """Training workers."""
    worker_gpus: float = Field(default=0, ge=0)
    """GPUs per training worker; 0 trains on the CPU."""
    worker_cpus: int = Field(default=2, ge=1)
    """CPU cores per training worker."""
    worker_labels: dict[LabelKey, LabelSelector] = {}
    """Labels of the nodes that training workers may run on, such as `{"ray.io/market-type" = "!spot"}`."""
    price_per_hour: float | None = Field(default=None, ge=0)
    """Price of the whole cluster for an hour, in any currency; `plan` then says what the run costs."""


class Config(Section):
    run_dir: Location
    """Folder or bucket URI that holds everything one run makes."""
    max_reject_share: float = Field(default=0.9, gt=0, le=1)
    """A stage that rejects a larger share of its rows stops the run; duplicate documents and general prompts do not
    count."""
    corpora: Location | None = None
    """Folder of many corpora, one in each of its folders, that get an adapter each; `{corpus}` in a setting
    outside [model] and [cluster] stands for the folder's name."""
    model: Model
    read: Read
    publish: Publish
    chunk: Chunk = Chunk()
    question: QuestionSection = QuestionSection()
    answer: AnswerSection = AnswerSection()
    general: General = General()
    reading: Reading = Reading()
    filter: FilterSection = FilterSection()
    train: Train = Train()
    update: Update = Update()
    evaluate: Evaluate = Evaluate()
    serve: Serve = Serve()
    cluster: Cluster = Cluster()

    @property
    def shares(self) -> dict[str, float]:
        """Shares of an epoch's samples by group; the rest are new answers about the corpus."""
        replay_share = self.update.replay_share if self.update.previous_run else 0.0
        reading_share = self.reading.share if self.reading.per_passage else 0.0
        return {"old": replay_share, "general": self.general.share, "reading": reading_share}

    @property
    def base_name(self) -> str:
        """What clients call the base model."""
        return self.serve.model_name or Path(self.model.path).name

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if self.publish.name in (AUTO, self.base_name):
            meant = "any adapter" if self.publish.name == AUTO else "the base model"
            raise ValueError(f"publish.name = {self.publish.name!r} is what clients call {meant}; choose another")
        if self.update.previous_run and self.update.previous_run.rstrip("/") == self.run_dir.rstrip("/"):
            raise ValueError(
                f"update.previous_run = {self.update.previous_run!r} is run_dir itself; give the update a run_dir "
                "of its own"
            )
        if sum(self.shares.values()) >= 1:
            names = ("update.replay_share", "general.share", "reading.share")
            pairs = zip(names, self.shares.values(), strict=True)
            listed = " and ".join(f"{name} = {share}" for name, share in pairs if share)
            raise ValueError(f"{listed} leave no room for the corpus; lower one")
        return self


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a TOML file and apply `section.key=value` overrides, whose values are TOML (bare words count as strings).

    Of a file for many corpora it gives the first valid one: they differ in paths and names only. Raises ValueError with
    one line per wrong field.
    """
    return next(config for config in load_configs(path, overrides).values() if isinstance(config, Config))


def load_configs(
    path: str | Path, overrides: list[str] | tuple[str, ...] = (), names: list[str] | None = None
) -> dict[str, Config | ValueError]:
    """Like `load_config`, for every corpus by its name; a file without `corpora` is for a single one, named "".

    A corpus whose name makes a setting wrong has the ValueError instead, unless all have one. `names` are taken for
    those of the corpora where their folder is out of reach.
    """
    data = read_settings(path, overrides)
    configs: dict[str, Config | ValueError] = {}
    for name in names or _corpora(data):
        try:
            configs[name] = Config.model_validate(_fill_in(data, name))
        except ValidationError as error:
            configs[name] = ValueError("\n".join(f"{path}: {line}" for line in _describe(error)))
    errors = [error for error in configs.values() if isinstance(error, ValueError)]
    if len(errors) == len(configs):
        raise errors[0]
    return configs


def read_settings(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a TOML file and apply overrides, without checking what they set."""
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"config file {path}: {error.strerror}; give the path of a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"config file {path} is not valid TOML: {error}") from error
    for override in overrides:
        _apply_override(data, override)
    return data


def _corpora(data: dict[str, Any]) -> list[str]:
    corpora = data.get("corpora")
    if not isinstance(corpora, str):
        return [""]
    from pipeline.store import Folder

    names = Folder(_absolute(corpora)).folders()
    if not names:
        raise ValueError(f"corpora = {corpora!r} has no folders; give the folder above those of the corpora")
    for field in ("run_dir", "publish.name"):
        section, _, key = field.rpartition(".")
        if CORPUS not in str((data.get(section, {}) if section else data).get(key)):
            raise ValueError(f"{field} must hold {CORPUS}, or all of corpora = {corpora!r} would have the same; add it")
    if CORPUS in str((data.get("model"), data.get("cluster"))):
        raise ValueError(f"{CORPUS} may not stand in [model] or [cluster], which the corpora share; remove it")
    return names


def _fill_in(value: Any, corpus: str) -> Any:
    if isinstance(value, dict):
        return {key: _fill_in(item, corpus) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill_in(item, corpus) for item in value]
    return value.replace(CORPUS, corpus) if corpus and isinstance(value, str) else value


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ValueError(f"override {override!r} is not of the form section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for name in names[:-1]:
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            raise ValueError(f"override {override!r}: {name} is a value, not a section")
    data[names[-1]] = value


def _describe(error: ValidationError) -> Iterator[str]:
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"]) or "config"
        if item["type"] == "extra_forbidden":
            close = difflib.get_close_matches(str(item["loc"][-1]), _known_keys(item["loc"][:-1]), n=1)
            remedy = f"did you mean {close[0]!r}?" if close else "remove it"
            yield f"{field} = {item['input']!r}: unknown key; {remedy}"
        elif item["type"] == "missing":
            yield f"{field} is missing; it has no default and must be chosen"
        elif item["type"] == "value_error":
            yield f"{field}: {item.get('ctx', {}).get('error')}"
        else:
            yield f"{field} = {item['input']!r}: {item['msg']}"


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = Config
    for name in location:
        annotation = section.model_fields[str(name)].annotation
        parts = (annotation, *get_args(annotation))  # a section, or one that may be unset
        section = next(part for part in parts if isinstance(part, type) and issubclass(part, BaseModel))
    return list(section.model_fields)
