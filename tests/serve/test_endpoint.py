"""The endpoint as its users meet it: `python -m serve`, the official OpenAI client, six adapters on two slots.

One engine serves all tests of this file, with two slots, room for three adapters in memory and four on disk, so that
mixed traffic evicts at every level. What PEFT on transformers answers is the measure of a right answer.
"""

import contextlib
import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pyarrow as pa
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from benchmarks.raylets import DEADLINE_S, until
from pipeline.base_model import load_base_model
from pipeline.engine import load_tokenizer
from pipeline.publish import move_alias, write_version
from pipeline.retrieve import PassageIndex
from pipeline.schema import digest
from serve.access import add_key
from serve.registry import Registry
from serve.server import TIE_NATS
from tests.serve.conftest import ANSWER_TOKENS, MODEL, NAMES, QUESTION, Published, endpoint

pytestmark = pytest.mark.slow

BASE_NAME = MODEL.name
MAX_REQUESTS = 16  # at a time on a replica


@pytest.fixture(scope="module")
def published(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Published:
    """A registry of this file's own, which its tests change."""
    folder = tmp_path_factory.mktemp("own") / "registry"
    shutil.copytree(published.registry.folder.uri, folder)
    return published._replace(registry=Registry(str(folder)))


@pytest.fixture(scope="module")
def url(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    config = tmp_path_factory.mktemp("serve") / "config.toml"
    config.write_text(
        f"""
        run_dir = "{config.parent}/run"
        [model]
        path = "{MODEL}"
        max_model_len = 512
        [read]
        paths = ["nothing"]
        [publish]
        registry = "{published.registry.folder.uri}"
        name = "test"
        [serve]
        adapter_slots = 2
        adapters_in_memory = 3
        adapters_on_disk = 4
        max_rank = 8
        max_body_kb = 64
        max_requests = {MAX_REQUESTS}
        max_queued = 48
        max_requests_per_key = 8
        alias_seconds = 0.5
        request_timeout_s = {DEADLINE_S}
        cache_dir = "{config.parent}/cache"
        [cluster]
        kv_cache_gb = 1
        """
    )
    with endpoint(config) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S)


def ask(client: openai.OpenAI, model: str, **more: Any) -> Any:
    return client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        **more,
    )


def assert_answers_as(reply: Any, expected: list[int]) -> bool:
    """The same tokens as PEFT, or another one where the two were within a tie of bf16; True without such a tie."""
    tokens = reply.choices[0].logprobs.content
    for wanted, token in zip(expected, tokens, strict=False):
        given = int(token.token.removeprefix("token_id:"))
        if given == wanted:
            continue
        others = {int(top.token.removeprefix("token_id:")): top.logprob for top in token.top_logprobs}
        assert token.logprob - others.get(wanted, float("-inf")) < TIE_NATS, (given, wanted, others)
        return False
    return True


def ask_with_tokens(client: openai.OpenAI, model: str) -> Any:
    return ask(client, model, logprobs=True, top_logprobs=5, extra_body={"return_tokens_as_token_ids": True})


def states(url: str) -> dict[str, dict[str, Any]]:
    (replica,) = httpx.get(f"{url}/v1/adapters", timeout=DEADLINE_S).json()["replicas"]
    return replica["adapters"]


def test_chat_completion_and_stream_agree(client: openai.OpenAI, published: Published) -> None:
    reply = ask(client, "ada")
    text = reply.choices[0].message.content
    assert reply.model == published.registry.resolve("ada").model_id
    chunks = list(ask(client, "ada", stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert len(chunks) > 3, "the answer came in one piece"
    prompt = load_tokenizer(str(MODEL)).apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False
    )
    completion = client.completions.create(
        model="ada", prompt=prompt, max_tokens=ANSWER_TOKENS, temperature=0, extra_body={"add_special_tokens": False}
    )
    assert completion.choices[0].text == text
    assert ask(client, BASE_NAME).choices[0].message.content != text


def test_models_are_listed_with_their_metadata(client: openai.OpenAI, published: Published) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert list(listed) == [BASE_NAME, *NAMES]
    metadata: Any = listed["ada"].model_dump()["metadata"]
    live = published.registry.resolve("ada")
    assert (metadata["corpus"], metadata["version"], metadata["rank"]) == ("ada", live.version, 8)
    assert metadata["created"] and metadata["base_revision"]
    assert client.models.retrieve(live.model_id).id == live.model_id
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_mixed_traffic_over_few_slots_is_answered_by_the_right_adapter(
    client: openai.OpenAI, url: str, published: Published
) -> None:
    asked = [NAMES[number * 5 % len(NAMES)] if number % 7 else "" for number in range(42)]
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda name: ask_with_tokens(client, name or BASE_NAME), asked))
    exact = [assert_answers_as(r, published.expected[name]) for name, r in zip(asked, replies, strict=True)]
    assert sum(exact) > len(exact) / 2
    ready = [name for name, state in states(url).items() if state["state"] == "ready"]
    assert 1 <= len(ready) <= 4, "more adapters on the disk than allowed"


def test_errors_have_openai_shape_and_hold_no_internals(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(client, "nobody")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        ask(client, "../ada")
    with pytest.raises(openai.BadRequestError):
        ask(client, "ada", extra_body={"max_tokens": 10_000})
    with pytest.raises(openai.BadRequestError):
        list(ask(client, "ada", extra_body={"max_tokens": 10_000}, stream=True))
    for body in ({"retrieval": 99}, {"prompt_logprobs": 1}, {"echo": True}, {"echo": True, "logprobs": None}):
        with pytest.raises(openai.BadRequestError):
            ask(client, "ada", extra_body=body)
    with pytest.raises(openai.BadRequestError, match="prompt"):
        client.completions.create(model="ada", prompt="x", echo=True, logprobs=0)
    with pytest.raises(openai.BadRequestError, match="asks for 10 answers; 8 are given"):
        client.completions.create(model="ada", prompt=["x"] * 5, n=2)
    unusable = (
        b'"top_logprobs": 3',
        b'"stream_options": {"include_usage": true}',
        b'"structured_outputs": "x"',
        b'"n": -3',
    )
    for body, status in (
        (b"x" * 70_000, 413),
        (b'{"model": "ada", "messages": [{"role": "user", "content": "\xff\xfe"}]}', 400),
        (b"{", 400),
        (b'{"model": "ada"}', 400),
        (b'{"model": "ada", "messages": []}', 400),
        (b'{"model": "ada", "messages": null}', 400),
        *((b'{"model": "ada", "messages": [{"role": "user", "content": "x"}], %s}' % more, 400) for more in unusable),
    ):
        reply = httpx.post(f"{url}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert reply.status_code == status, reply.text
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        assert "Traceback" not in reply.text and "ray." not in reply.text
    chunked = httpx.post(f"{url}/v1/chat/completions", content=iter([b"x" * 10_000] * 8))
    assert chunked.status_code == 413
    assert ask(client, "ada").choices


def test_seeded_requests_do_not_end_the_engine(client: openai.OpenAI) -> None:
    """On a CPU, vLLM dies of a seeded request whose prompt it reads in parts: these do not fit one step together."""

    def sample(number: int) -> str:
        prompt = [1000 + number] * 450
        done = client.completions.create(model=BASE_NAME, prompt=prompt, max_tokens=2, temperature=1.0, seed=1)
        return done.choices[0].finish_reason

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(sample, range(12))) == ["length"] * 12


def test_a_damaged_adapter_is_refused_and_the_others_go_on(
    client: openai.OpenAI, url: str, published: Published
) -> None:
    folder = Path(published.registry.folder.uri)
    (folder / "broken").mkdir()
    version = published.registry.resolve("ada").version
    for file in (folder / "ada" / version).iterdir():
        target = folder / "broken" / version / file.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes().replace(b'"ada"', b'"broken"'))
    manifest = json.loads((folder / "broken" / version / "manifest.json").read_text())
    # A file that is whole and fits, and still is not the adapter that was published: only the probe can tell.
    answer = manifest["probe"]["answer_ids"]
    manifest["probe"]["answer_ids"] = [answer[0] + 1, *answer[1:]]
    (folder / "broken" / version / "manifest.json").write_text(json.dumps(manifest))
    move_alias(published.registry.folder / "broken", version)
    with pytest.raises(openai.ConflictError) as refused:
        ask(client, "broken")
    assert "failed its probe" in refused.value.message
    assert states(url)[f"broken@{version}"]["state"] == "failed"
    assert_answers_as(ask_with_tokens(client, "ada"), published.expected["ada"])


def test_a_moved_alias_takes_effect_without_a_failed_or_stale_answer(
    client: openai.OpenAI, published: Published
) -> None:
    registry = published.registry
    folder = Path(registry.folder.uri)
    old, other = registry.resolve("dora"), registry.resolve("emil")
    new = folder / "dora" / other.version
    new.mkdir()
    for file in (folder / "emil" / other.version).iterdir():
        (new / file.name).write_bytes(file.read_bytes().replace(b'"name": "emil"', b'"name": "dora"'))
    replies: list[Any] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            replies.append(ask_with_tokens(client, "dora"))

    workers = [threading.Thread(target=load) for _ in range(4)]
    for worker in workers:
        worker.start()
    until(lambda: len(replies) >= 8)
    move_alias(registry.folder / "dora", other.version)
    until(lambda: sum(reply.model.endswith(other.version) for reply in replies) >= 8)
    stop.set()
    for worker in workers:
        worker.join()
    assert {reply.model for reply in replies} == {f"dora@{old.version}", f"dora@{other.version}"}
    for reply in replies:
        assert_answers_as(reply, published.expected["emil" if reply.model.endswith(other.version) else "dora"])
    assert_answers_as(ask_with_tokens(client, old.model_id), published.expected["dora"])
    move_alias(registry.folder / "dora", old.version)


def publish_mills(published: Published, tmp_path: Path, **scores: dict[str, float]) -> str:
    """Publish the adapter `ada` as `mills`, with passages and scores by arm; return its version."""
    texts = [
        f"The Kestrel Mill on the River Arden was built by the miller number {i}. {'It turns. ' * 20}" for i in range(9)
    ]
    columns = {"passage_id": texts, "source": texts, "heading": [""] * len(texts), "text": texts}
    PassageIndex.build(pa.table(columns)).save(tmp_path)
    ada = published.registry.resolve("ada")
    files = ("adapter_model.safetensors", "adapter_config.json")
    contents: dict[str, Any] = {f: (published.registry.folder / "ada" / ada.version).read_bytes(f) for f in files}
    contents |= {f"retrieval/{file.name}": file.read_bytes() for file in tmp_path.iterdir()}
    version = digest("mills", scores)[:16]
    mills, measured = published.registry.folder / "mills", {"scores": scores, "metric": "substring_match"}
    write_version(mills, version, load_base_model(str(MODEL)), contents, probe=None, measured=measured)
    move_alias(mills, version)
    return version


@pytest.mark.parametrize("adapter_score", [0.4, 0.6])
def test_passages_are_read_by_the_one_that_reads_them_better(
    client: openai.OpenAI, published: Published, tmp_path: Path, adapter_score: float
) -> None:
    scores = {"adapter_retrieval": {"substring_match": adapter_score}, "retrieval": {"substring_match": 0.5}}
    mills = f"mills@{publish_mills(published, tmp_path, **scores)}"
    asked: Any = {"model": mills, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 2}
    assert client.chat.completions.create(**asked).model == mills
    reply = client.chat.completions.create(**asked, extra_body={"retrieval": 1})
    assert reply.model == (mills if adapter_score > 0.5 else BASE_NAME)
    sources = (reply.model_extra or {})["distillery"]["sources"]
    assert len(sources) == 1
    asked["messages"][0]["content"] = [{"type": "text", "text": QUESTION}]
    chunks = list(client.chat.completions.create(**asked, extra_body={"retrieval": 1}, stream=True))
    assert [bool(chunk.choices) for chunk in chunks] == [True] * len(chunks), "clients look into the first choice"
    ours = [(chunk.model_extra or {}).get("distillery") for chunk in chunks]
    assert ours == [{"sources": sources}, *[None] * (len(chunks) - 1)]
    asked["messages"][0]["content"] = "Zebras?"
    reply = client.chat.completions.create(**asked, extra_body={"retrieval": 1})
    assert (reply.model_extra or {})["distillery"]["sources"] == []
    assert reply.model == mills, "no passage was found that the base model could read"


def test_as_many_passages_as_fit_stand_before_the_question(
    client: openai.OpenAI, published: Published, tmp_path: Path
) -> None:
    publish_mills(published, tmp_path)

    def sources(retrieval: int, *earlier: Any) -> list[str]:
        messages: Any = [{"role": "user", "content": text} for text in (*earlier, QUESTION)]
        reply = client.chat.completions.create(
            model="mills", messages=messages, max_tokens=ANSWER_TOKENS, extra_body={"retrieval": retrieval}
        )
        return [source["text"] for source in (reply.model_extra or {})["distillery"]["sources"]]

    assert len(sources(2)) == 2
    most = sources(9)
    assert 2 < len(most) < 9 and most[:2] == sources(2)
    assert 0 < len(sources(9, "It turns. " * 40)) < len(most)
    assert sources(9, "It turns. " * 130) == []
    assert sources(9, [{"type": "text", "text": "It turns. " * 65}] * 2) == []


def test_a_client_that_leaves_frees_its_place(client: openai.OpenAI, url: str) -> None:
    """As many as the replica takes leave behind the first token; another is answered long before they would be done."""
    body = {"model": "ada", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 300}
    body |= {"ignore_eos": True, "stream": True}

    def seconds(lines: int | None) -> float:
        def read(_: int) -> None:
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=DEADLINE_S) as reply:
                assert reply.status_code == 200
                list(islice(reply.iter_lines(), lines))

        started = time.monotonic()
        with ThreadPoolExecutor(MAX_REQUESTS) as pool:
            list(pool.map(read, range(MAX_REQUESTS)))
        ask(client, "ada")
        return time.monotonic() - started

    ask(client, "ada")  # it is loaded
    assert 3 * seconds(1) < seconds(None), "they go on although nobody listens"


def test_two_hundred_clients_are_answered_or_told_to_come_back(url: str) -> None:
    def one(number: int) -> int:
        body = {"model": NAMES[number % 2], "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 2}
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=DEADLINE_S)
        assert reply.status_code == 200 or "retry-after" in reply.headers
        return reply.status_code

    with ThreadPoolExecutor(200) as pool:
        seen = list(pool.map(one, range(200)))
    assert set(seen) == {200, 503}
    assert seen.count(200) >= 48


def test_metrics_health_and_page(url: str) -> None:
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert "Corpus Distillery" in httpx.get(f"{url}/").text
    text = until(lambda: (found := httpx.get(f"{url}/metrics", timeout=DEADLINE_S).text) * ("distillery" in found))
    assert "vllm" in text and "distillery_adapter_loads" in text


def test_the_page_in_a_browser(url: str, tmp_path: Path) -> None:
    """Two answers side by side with their speed, a refusal that is shown, the adapters' table and the snippet."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("chromium and chromedriver are not installed (Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1200,900"):
        options.add_argument(argument)
    with contextlib.closing(webdriver.Chrome(options, webdriver.ChromeService(chromedriver))) as browser:
        browser.get(url)
        names = until(lambda: [option.text for option in browser.find_elements(By.CSS_SELECTOR, "#model option")])
        assert names[0] == "ada" and names[-2:] == ["auto", BASE_NAME]
        rows = [row.text for row in browser.find_elements(By.CSS_SELECTOR, "#adapters tr")]
        assert any(row.startswith("ada ") for row in rows)
        browser.find_element(By.ID, "question").send_keys(QUESTION + Keys.ENTER)
        cards = until(lambda: finished(browser))
        assert [card.splitlines()[0] for card in cards] == [BASE_NAME, "ada", "ada + retrieval"]
        assert (
            "tokens/s" in cards[0] and "tokens/s" in cards[1] and cards[0].splitlines()[1] != cards[1].splitlines()[1]
        )
        assert "published without its passages" in cards[2]
        snippet = browser.find_element(By.ID, "snippet").text
        assert f"{url}/v1" in snippet and QUESTION in snippet
        assert browser.save_screenshot(str(tmp_path / "page.png"))
        severe = [entry for entry in browser.get_log("browser") if "409" not in entry["message"]]
        assert not [entry for entry in severe if entry["level"] == "SEVERE" and "favicon" not in entry["message"]]


def finished(browser: webdriver.Chrome) -> list[str] | None:
    cards = [card.text for card in browser.find_elements(By.CSS_SELECTOR, "#answers article")]
    return cards if len(cards) == 3 and all("\u2026" not in card for card in cards) else None


@pytest.mark.long
@pytest.mark.parametrize("victim", ["EngineCore", "ServeReplica:distillery:AdapterServer"])
def test_a_killed_process_comes_back_under_load(
    client: openai.OpenAI, url: str, published: Published, victim: str
) -> None:
    (process,) = [process for process in own_processes() if victim in " ".join(process.cmdline())]
    statuses: list[int] = []
    stop = threading.Event()

    def load(name: str) -> None:
        body = {"model": name, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 16}
        while not stop.is_set():
            statuses.append(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=DEADLINE_S).status_code)
            time.sleep(0.2)

    workers = [threading.Thread(target=load, args=(name,)) for name in NAMES[:4]]
    for worker in workers:
        worker.start()
    until(lambda: statuses.count(200) >= 4)
    process.send_signal(signal.SIGKILL)
    served = statuses.count(200)
    until(lambda: statuses.count(200) > served + 8)
    stop.set()
    for worker in workers:
        worker.join()
    assert set(statuses) <= {200, 503}
    assert_answers_as(ask_with_tokens(client, "dora"), published.expected["dora"])
    replica = " ".join(" ".join(p.cmdline()) for p in own_processes())
    assert victim in replica
    assert all(state["state"] in ("loading", "probing", "ready") for state in states(url).values())


def own_processes() -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if process.is_running()]


def test_keys_open_their_own_adapters_only(url: str, published: Published, tmp_path: Path) -> None:
    mills = publish_mills(published, tmp_path)
    _, secret = add_key(published.registry.folder, ["ada"])
    _, other_secret = add_key(published.registry.folder, ["*"])
    until(lambda: httpx.get(f"{url}/v1/models").status_code == 401)
    caller = openai.OpenAI(base_url=f"{url}/v1", api_key=secret, max_retries=0, timeout=DEADLINE_S)
    assert [model.id for model in caller.models.list()] == [BASE_NAME, "ada"]
    assert ask(caller, "ada").choices
    own, all_of_them = ({"authorization": f"Bearer {one}"} for one in (secret, other_secret))
    assert httpx.get(f"{url}/metrics", headers=own).status_code == 403
    about_mills = {"model": "auto", "messages": [{"role": "user", "content": "Kestrel Mill, River Arden"}]}

    def routed(headers: dict[str, str]) -> dict[str, Any]:
        body = about_mills | {"max_tokens": 1}
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=DEADLINE_S)
        return reply.json()["distillery"]["route"]

    assert routed(own) == {"model": BASE_NAME}, "neither the corpus of others nor how well it fits"
    assert routed(all_of_them)["model"] == f"mills@{mills}"
    for headers, has_others in ((own, False), (all_of_them, True)):
        (replica,) = httpx.get(f"{url}/v1/adapters", headers=headers).json()["replicas"]
        names = {name.partition("@")[0] for name in replica["adapters"]}
        assert "ada" in names and (names > {"ada"}) is has_others
    with pytest.raises(openai.NotFoundError) as forbidden:
        ask(caller, "bob")
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(caller, "zed")
    assert forbidden.value.message.replace("bob", "zed") == unknown.value.message

    def patient(number: int) -> int:
        try:
            return ask(caller, "ada").choices[0].index
        except openai.RateLimitError as error:
            assert "retry-after" in error.response.headers
            return 429

    other = openai.OpenAI(base_url=f"{url}/v1", api_key=other_secret, max_retries=0, timeout=DEADLINE_S)
    until(lambda: httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {other_secret}"}).is_success)
    with ThreadPoolExecutor(32) as pool:
        busy = [pool.submit(patient, number) for number in range(32)]
        assert ask(other, "bob").choices, "a busy key starves another"
        assert {future.result() for future in busy} == {0, 429}
    with pytest.raises(openai.AuthenticationError):
        ask(openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0), "ada")
    Path(published.registry.folder.uri, "keys.json").unlink()
    time.sleep(2)  # longer than serve.alias_seconds
    assert httpx.get(f"{url}/v1/models").status_code == 401, "a registry that is gone lets nobody in"
