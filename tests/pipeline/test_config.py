"""The config: wrong settings stop at the door, all at once, each with its name, value and remedy."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

import cluster.__main__
import pipeline.__main__
from pipeline.config import DEEPSPEED_KEYS_SET_HERE, ENGINE_KEYS_SET_HERE, load_config

COMPLETE = """
run_dir = "run"
[model]
path = "model"
[read]
paths = ["corpus"]
[publish]
registry = "registry"
name = "handbook"
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(COMPLETE)
    return path


def errors(path: Path, *overrides: str) -> list[str]:
    """Return the lines of the error that the settings raise, without the path before each."""
    with pytest.raises(ValueError) as caught:
        load_config(path, overrides)
    return [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()]


def test_a_complete_file(path: Path) -> None:
    config = load_config(path)
    assert config.read.paths == ["corpus"] and config.chunk.max_tokens == 256 and config.train.lora.rank == 64
    with pytest.raises(ValidationError, match="frozen"):
        config.run_dir = "other"  # type: ignore[misc]
    assert type(config).model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("read.pathes=['a']", "read.pathes = ['a']: unknown key; did you mean 'paths'?"),
        ("trian.epochs=1", "trian = {'epochs': 1}: unknown key; did you mean 'train'?"),
        ("train.lora.rnak=8", "train.lora.rnak = 8: unknown key; did you mean 'rank'?"),
        ("chunk.zzz=1", "chunk.zzz = 1: unknown key; remove it"),
        ("evaluate.judge.modle=x", "evaluate.judge.modle = 'x': unknown key; did you mean 'model'?"),
        (
            "train.deepspeed.zero_optimization.stage=3",
            "train: train.deepspeed.zero_optimization may not set stage: other settings decide it",
        ),
        ("chunk.max_tokens=many", "chunk.max_tokens = 'many': Input should be a valid integer"),
        ("chunk.max_tokens='64'", "chunk.max_tokens = '64': Input should be a valid integer"),
        ("chunk.max_tokens=64.5", "chunk.max_tokens = 64.5: Input should be a valid integer"),
        ("filter.keep_unfinished=1", "filter.keep_unfinished = 1: Input should be a valid boolean"),
        ("chunk.max_tokens=1", "chunk.max_tokens = 1: Input should be greater than or equal to 16"),
        ("train.learning_rate=0", "train.learning_rate = 0: Input should be greater than 0"),
        ("read.paths=[]", "read.paths = []: List should have at least 1 item"),
        ("question.kinds=['joke']", "question.kinds.0 = 'joke': Input should be 'fact',"),
        ("publish.name=Hand Book", "publish.name = 'Hand Book': String should match pattern"),
        ("publish.name=auto", "config: publish.name = 'auto' is what clients call any adapter; choose another"),
        ("serve.model_name=handbook", "config: publish.name = 'handbook' is what clients call the base model; choose"),
        ("train.zero_stage=4", "train.zero_stage = 4: Input should be 1, 2 or 3"),
        (
            "train.batch_tokens=128",
            "train: batch_tokens = 128 is less than row_tokens = 256; raise batch_tokens",
        ),
    ],
)
def test_a_wrong_setting_is_named(path: Path, override: str, error: str) -> None:
    (line,) = errors(path, override)
    assert line.startswith(error)


@pytest.mark.parametrize(
    ("main", "option"),
    [(pipeline.__main__.main, ["status", "--redo"]), (cluster.__main__.main, ["check", "--address=a"])],
)
def test_settings_may_stand_behind_options(
    main: Callable[[list[str]], int], option: list[str], path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, flag = option
    assert main([command, str(path), flag, "chunk.zzz=1"]) == 2
    assert "chunk.zzz = 1: unknown key" in capsys.readouterr().err


def test_a_cluster_out_of_reach_is_an_error_of_one_line(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*_: object) -> None:
        raise ConnectionError("nothing listens at head:6379")

    monkeypatch.setattr(pipeline.__main__, "_command", command)
    assert pipeline.__main__.main(["run", str(path)]) == 2
    assert capsys.readouterr().err == "error: ConnectionError: nothing listens at head:6379\n"


def test_who_interrupts_a_run_is_told_that_it_goes_on(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.__main__, "_command", command)
    assert pipeline.__main__.main(["run", str(path)]) == 130
    assert capsys.readouterr().err == "stopped; the same command goes on from here\n"


def test_what_must_be_chosen_has_no_default(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text("[model]\n[publish]\n")
    names = ["run_dir", "model.path", "read", "publish.registry", "publish.name"]
    assert errors(path) == [f"{name} is missing; it has no default and must be chosen" for name in names]


def test_all_errors_are_reported_at_once(path: Path) -> None:
    found = errors(path, "chunk.max_tokens=1", "read.pathes=1", "train.epochs=none", "model.engine.seed=1")
    assert [line.split()[0] for line in found] == [
        "model:",
        "read.pathes",
        "chunk.max_tokens",
        "train.epochs",
    ]


@pytest.mark.parametrize(
    ("override", "section", "expected"),
    [
        ("chunk.max_tokens=64", "chunk", {"max_tokens": 64}),
        (" chunk.max_tokens = 64", "chunk", {"max_tokens": 64}),
        ("model.path=/a/b=c d", "model", {"path": "/a/b=c d"}),
        ('read.text_field="5"', "read", {"text_field": "5"}),
        ("read.text_field=", "read", {"text_field": ""}),
        ("read.paths=['a', 'b']", "read", {"paths": ["a", "b"]}),
        ("filter.keep_unfinished=true", "filter", {"keep_unfinished": True}),
        ("train.learning_rate=1e-4", "train", {"learning_rate": 1e-4}),
        ("train.lora.rank=8", "train", {"lora": {"rank": 8}}),
        ("model.engine.kv_transfer.depth=1", "model", {"engine": {"kv_transfer": {"depth": 1}}}),
    ],
)
def test_overrides(path: Path, override: str, section: str, expected: dict[str, object]) -> None:
    found = load_config(path, [override]).model_dump(exclude_unset=True)[section]
    assert found == found | expected


def test_the_last_override_wins(path: Path) -> None:
    assert load_config(path, ["chunk.max_tokens=64", "chunk.max_tokens=32"]).chunk.max_tokens == 32


@pytest.mark.parametrize("override", ["chunk.max_tokens", "=1", "chunk..max_tokens=1", ".=1"])
def test_an_override_of_another_form(path: Path, override: str) -> None:
    assert errors(path, override) == [f"override {override!r} is not of the form section.key=value"]


def test_an_override_below_a_value(path: Path) -> None:
    assert errors(path, "run_dir.a=1") == ["override 'run_dir.a=1': run_dir is a value, not a section"]


@pytest.mark.parametrize(
    ("field", "keys"), [("model.engine", ENGINE_KEYS_SET_HERE), ("train.deepspeed", DEEPSPEED_KEYS_SET_HERE)]
)
def test_keys_that_we_set_ourselves_are_refused(path: Path, field: str, keys: frozenset[str]) -> None:
    assert {"model", "seed"} <= ENGINE_KEYS_SET_HERE and {"bf16", "optimizer"} <= DEEPSPEED_KEYS_SET_HERE
    for key in keys:
        (line,) = errors(path, f"{field}.{key}=1")
        assert f"{field} may not set {key}: other settings decide it; remove it" in line
    load_config(path, [f"{field}.steps_per_print=1"])


def test_files_that_hold_no_config(tmp_path: Path) -> None:
    (line,) = errors(tmp_path / "none.toml")
    assert "No such file or directory; give the path of a TOML file" in line
    for data in (b"run_dir = ", b"run_dir = '\xff'"):
        (tmp_path / "bad.toml").write_bytes(data)
        assert "is not valid TOML" in errors(tmp_path / "bad.toml")[0]


def test_an_update_has_a_run_directory_of_its_own(path: Path) -> None:
    """With --redo it would delete what it is to go on from."""
    with pytest.raises(ValueError, match=r"update\.previous_run = .*runs/a' is run_dir itself"):
        load_config(path, ["run_dir=runs/a", "update.previous_run=runs/a/"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("forget_removed", "needs previous_run"),
        ("ask_again", "needs previous_run"),
        ("ask_for_untold", "set ask_again"),
    ],
)
def test_an_update_is_told_what_it_lacks(path: Path, setting: str, message: str) -> None:
    (line,) = errors(path, f"update.{setting}=true")
    assert f"{setting} = true" in line and message in line


def test_shares_leave_room_for_the_corpus(path: Path) -> None:
    shares = ("update.replay_share=0.5", "general.share=0.3", "reading.share=0.3", "reading.per_passage=2")
    assert load_config(path, shares[:3]).shares == {"old": 0.0, "general": 0.3, "reading": 0.0}
    assert load_config(path, shares).shares == {"old": 0.0, "general": 0.3, "reading": 0.3}
    (line,) = errors(path, *shares, "update.previous_run=before")
    assert "update.replay_share = 0.5 and general.share = 0.3 and reading.share = 0.3 leave no room" in line


def test_paths_are_absolute_from_the_door_on(path: Path) -> None:
    config = load_config(path, ["run_dir=runs/a", "publish.registry=s3://bucket/registry"])
    assert config.run_dir == str(Path.cwd() / "runs" / "a")
    assert config.publish.registry == "s3://bucket/registry"
    with pytest.raises(ValueError, match=r"run_dir: an empty path"):
        load_config(path, ["run_dir="])


def test_a_judge_at_an_endpoint_needs_a_name(path: Path) -> None:
    (line,) = errors(path, "evaluate.judge.url=http://grader:8000/v1")
    assert "url = 'http://grader:8000/v1' needs the name of the model" in line
