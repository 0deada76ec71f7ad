"""The command line without a broker: every failure is one sentence and a status."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kiteq import __version__
from kiteq.cli.output import age_text
from kiteq.remoting.packets import WIRE_VERSIONS
from kiteq.store.recovery import FORMAT_VERSION
from tests.cli.running import environment, kiteq, refused
from tests.support.broker import free_port

pytestmark = pytest.mark.slow

ID = "00112233445566778899aabbccddeeff"


@pytest.mark.parametrize("flag", ["--version", "-version"])
def test_the_version_is_printed(tmp_path: Path, flag: str) -> None:
    done = kiteq(tmp_path, flag)
    product, wire, store = done.stdout.splitlines()
    assert (done.returncode, done.stderr, product) == (0, "", f"kiteq {__version__}")
    assert wire == f"wire versions {', '.join(map(str, WIRE_VERSIONS))}"
    assert re.fullmatch(rf"store format {FORMAT_VERSION}, upgrades [\d, ]+", store)


def test_off_loopback_it_names_users_and_insecure(tmp_path: Path) -> None:
    sentence = refused(tmp_path, "-bind=0.0.0.0:13800", status=2)
    assert "--users" in sentence
    assert "--insecure" in sentence
    assert not (tmp_path / "kiteq-data").exists()


@pytest.mark.parametrize("flag", ["--users=u.toml", "-users=u.toml"])
def test_a_flag_that_is_not_built_yet_says_so(tmp_path: Path, flag: str) -> None:
    assert "not built yet" in refused(tmp_path, flag, status=2)


@pytest.mark.parametrize("command", [("send", "a", "b"), ("stat",), ("group", "list"), ("config", "check")])
def test_a_flag_of_the_broker_before_a_command_is_an_error(tmp_path: Path, command: tuple[str, ...]) -> None:
    sentence = refused(tmp_path, "-topics=a", *command, status=2)
    assert sentence == f"--topics is a flag of the broker and has no meaning before the command {command[0]!r}"


def test_a_misspelt_key_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "kiteq.toml").write_text('# ours\ntopcs = ["a"]\n')
    sentence = refused(tmp_path, "--config", "kiteq.toml", status=2)
    assert sentence == "kiteq.toml, line 2: unknown setting 'topcs'; did you mean 'topics'?"
    assert refused(tmp_path, "config", "check", "--config", "kiteq.toml", status=2) == sentence


def test_empty_values_are_errors(tmp_path: Path) -> None:
    assert refused(tmp_path, "--config", "", status=2) == "--config is empty; name a TOML file or leave it out"
    assert refused(tmp_path, "--db=", status=2).startswith("db is empty (--db); it must be ")
    assert refused(tmp_path, status=2, KITEQ_DB="").startswith("db is empty (KITEQ_DB); it must be ")


def test_an_unknown_flag_or_command_is_refused_without_a_traceback(tmp_path: Path) -> None:
    for words in (("--bnd", "x"), ("sned",)):
        done = kiteq(tmp_path, *words)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert "Error: No such" in done.stderr


def test_config_check_says_what_is_ignored(tmp_path: Path) -> None:
    done = kiteq(tmp_path, "config", "check", KITEQ_BINDD="x")
    assert done.returncode == 0
    assert done.stdout == (
        "KITEQ_BINDD is not a setting and is ignored; did you mean KITEQ_BIND?\nthe settings are valid\n"
    )


def test_config_show_tells_counts_from_sizes(tmp_path: Path) -> None:
    lines = kiteq(tmp_path, "config", "show", "--pport=13801", "--half-quota", "4096").stdout.splitlines()
    shown = {name: value for name, value, _ in (re.split(" {2,}", line) for line in lines)}
    assert (shown["half_quota"], shown["check_limit"], shown["connections"]) == ("4096", "15", "1024")
    assert (shown["pport"], shown["message_limit"], shown["check_after"]) == ("13801", "1MiB", "6s")


def test_config_show_gives_each_value_and_its_source(tmp_path: Path) -> None:
    (tmp_path / "kiteq.toml").write_text('topics = ["a", "b"]\n')
    words = ("config", "show", "--config", "kiteq.toml", "--ack-deadline", "2m")
    lines = kiteq(tmp_path, *words, KITEQ_FLUSH="async").stdout.splitlines()
    shown = {name: (value, source) for name, value, source in (re.split(" {2,}", line) for line in lines)}
    assert shown["topics"] == ("a, b", "kiteq.toml, line 1")
    assert shown["flush"] == ("async", "KITEQ_FLUSH")
    assert shown["ack_deadline"] == ("120s", "--ack-deadline")
    assert shown["store_limit"] == ("64GiB", "default")
    as_json = json.loads(kiteq(tmp_path, *words, "--json").stdout)
    assert as_json["ack_deadline"] == {"value": 120.0, "source": "--ack-deadline"}


def test_an_empty_variable_names_no_broker(tmp_path: Path) -> None:
    sentence = refused(tmp_path, "group", "drop", "members", "--yes", status=2, KITEQ_BROKER="")
    assert sentence == "KITEQ_BROKER is empty; it must name a broker, like 127.0.0.1:13800"
    there = refused(tmp_path, "stat", "--broker", "127.0.0.1:1", status=1, KITEQ_BROKER="")
    assert there.startswith("no broker answers at 127.0.0.1:1")


def test_the_pipeline_is_printed_in_order(tmp_path: Path) -> None:
    words = [line.split()[0] for line in kiteq(tmp_path, "pipeline").stdout.splitlines() if not line.startswith(" ")]
    assert words[0] == "authenticate"
    assert words.index("route") < words.index("persist") < words.index("respond")


@pytest.mark.parametrize(
    "words",
    [
        ("stat",),
        ("group", "list"),
        ("dlq", "list", "g"),
        ("send", "a", "b"),
        ("listen", "a"),
        ("tx", "list"),
        ("tx", "commit", ID, "--reason", "seen"),
        ("msg", "cancel", ID),
    ],
)
def test_no_broker_there_is_one_sentence(tmp_path: Path, words: tuple[str, ...]) -> None:
    address = f"127.0.0.1:{free_port()}"
    sentence = refused(tmp_path, *words, "--broker", address, status=1)
    assert sentence == f"no broker answers at {address}: connection refused; is one running there?"


def test_the_environment_may_name_the_broker(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    assert address in refused(tmp_path, "stat", status=1, KITEQ_BROKER=address)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("send", "a b", "t"), "'a b' is not a valid topic"),
        (("send", "a", "t", "--property", "x"), "--property is 'x'; it must be NAME=VALUE"),
        (("send", "a", "t", "--ttl", "soon"), "--ttl is 'soon'; it must be a time from 0.001s to 7d, like 60s"),
        (("send", "a", "t", "--id", "xyz"), "a message id as str must be 32 hex digits"),
        (("listen", "a", "t", "--regex", "x"), "give TYPE or --regex, not both"),
        (("group", "unsubscribe", "g", "a", "t", "--regex", "x"), "give TYPE or --regex, not both"),
        (("tx", "show", "xyz"), "ID is 'xyz'; it must be 32 hex digits"),
        (("tx", "resume", ID + "0"), f"ID is '{ID}0'; it must be 32 hex digits"),
        (("msg", "cancel", "0x" + ID[2:]), f"ID is '0x{ID[2:]}'; it must be 32 hex digits"),
        (("tx", "commit", ID, "--reason", " "), "--reason is empty; say why, for the audit log"),
        (("tx", "rollback", ID, "--reason="), "--reason is empty; say why, for the audit log"),
        (("tx", "list", "--older-than", "soon"), "--older-than is 'soon'; it must be a time like 90s, 10m or 2h"),
        (("-bind=127.0.0.1:1", "-pport=1"), "pport is 127.0.0.1:1 (--pport), which is bind already"),
        (("stat", "--broker", "here"), "--broker is 'here'; it must be HOST:PORT"),
        (("send", "a", "t", "--broker", "h:x"), "'kiteq://h:x': the port must be 1 to 65535"),
    ],
)
def test_a_wrong_argument_is_one_sentence(tmp_path: Path, words: tuple[str, ...], sentence: str) -> None:
    assert refused(tmp_path, *words, status=2).startswith(sentence)


@pytest.mark.parametrize("verb", ["commit", "rollback"])
def test_a_decision_by_hand_needs_a_reason(tmp_path: Path, verb: str) -> None:
    done = kiteq(tmp_path, "tx", verb, ID)
    assert done.returncode == 2
    assert "--reason" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0s"), (0, "0s"), (59.9, "59s"), (60, "1m"), (125, "2m 5s"), (3_600, "1h"), (7_320, "2h 2m"),
        (86_400 * 3 + 7_200 + 5, "3d 2h"),
    ],
)  # fmt: skip
def test_an_age_is_written_with_its_two_largest_units(seconds: float, text: str) -> None:
    assert age_text(seconds) == text


@pytest.mark.parametrize(
    ("words", "absent"),
    [
        (("--version",), ("typer", "structlog", "trio", "lmdb", "kiteq.broker")),
        (("config", "check"), ("structlog", "trio", "lmdb", "kiteq.broker", "kiteq_client")),
        (("send", "a b", "t"), ("structlog", "lmdb", "re2", "kiteq.store", "kiteq.pipe", "kiteq.broker")),
        (("stat", "--broker", "x"), ("structlog", "trio", "lmdb", "kiteq.broker", "kiteq_client")),
        (("tx", "list", "--broker", "x"), ("structlog", "trio", "lmdb", "kiteq.broker", "kiteq_client", "hypercorn")),
    ],
)
def test_a_command_imports_only_what_it_needs(tmp_path: Path, words: tuple[str, ...], absent: tuple[str, ...]) -> None:
    program = (
        "import sys\nfrom kiteq.__main__ import main\n"
        f"try:\n    main({list(words)!r})\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {absent!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(), capture_output=True, check=True, text=True
    )
    assert done.stderr.splitlines()[-1] == "[]"
