"""Settings: which source wins, and what is said about a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from kiteq.config import NotBuilt, Settings, load
from kiteq.errors import ConfigError
from kiteq.limits import GIB, MIB


def refusal(
    flags: dict[str, object] | None = None, environ: dict[str, str] | None = None, path: Path | None = None
) -> str:
    with pytest.raises(ConfigError) as caught:
        load(flags or {}, environ or {}, path)
    return str(caught.value)


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return tmp_path / "kiteq.toml"


def test_without_any_source_every_setting_is_its_default() -> None:
    resolved = load({}, {})
    assert resolved.settings == Settings()
    assert set(resolved.sources.values()) == {"default"}


def test_flags_win_over_the_environment_over_the_file_over_defaults(toml: Path) -> None:
    toml.write_text('bind = "127.0.0.1:1"\nflush = "async"\nconnections = 5\n')
    environ = {"KITEQ_BIND": "127.0.0.1:2", "KITEQ_FLUSH": "sync"}
    settings, sources, _ = load({"bind": "127.0.0.1:3", "db": None}, environ, toml)
    assert (settings.bind, settings.flush, settings.connections) == ("127.0.0.1:3", "sync", 5)
    assert sources["bind"] == "--bind"
    assert sources["flush"] == "KITEQ_FLUSH"
    assert sources["connections"] == f"{toml}, line 3"
    assert sources["db"] == "default"


def test_the_environment_may_name_the_file(toml: Path) -> None:
    toml.write_text("connections = 5\n")
    assert load({}, {"KITEQ_CONFIG": str(toml)}).settings.connections == 5
    assert refusal(environ={"KITEQ_CONFIG": ""}) == "KITEQ_CONFIG is empty; name a TOML file or leave it out"


def test_every_kind_of_value_is_read_from_toml(toml: Path) -> None:
    toml.write_text(
        'topics = [\n  "trade",\n  "feed",\n]\nstore_limit = "2 GiB"\nmessage_limit = 4096\nack_deadline = 1.5\n'
        'max_hold = "2h"\ninsecure = true\nhandlers = ["a.b:C"]\ndb = "mmap://../x"\nadvertise = "h:1"\n'
    )
    settings = load({}, {}, toml).settings
    assert settings.topics == ("trade", "feed")
    assert (settings.store_limit, settings.message_limit) == (2 * GIB, 4096)
    assert (settings.ack_deadline, settings.max_hold) == (1.5, 7200.0)
    assert settings.insecure
    assert (settings.handlers, settings.db, settings.advertise) == (("a.b:C",), "mmap://../x", "h:1")


def test_text_from_flags_is_read_as_a_person_writes_it() -> None:
    flags: dict[str, object] = {
        "topics": "trade, feed,trade",
        "store_limit": "100MB",
        "ack_deadline": "500ms",
        "connections": "7",
    }
    settings = load(flags, {"KITEQ_INSECURE": "yes"}).settings
    assert settings.topics == ("trade", "feed")
    assert settings.store_limit == 100_000_000
    assert settings.ack_deadline == 0.5
    assert settings.connections == 7
    assert settings.insecure


def test_the_quota_of_a_group_follows_a_smaller_store() -> None:
    assert load({"store_limit": "64MiB"}, {}).settings.group_quota == 64 * MIB


def test_a_misspelt_key_is_named_with_its_line_and_the_nearest_name(toml: Path) -> None:
    toml.write_text('bind = "127.0.0.1:1"\n\nstor_limit = "1GiB"\n')
    assert refusal(path=toml) == f"{toml}, line 3: unknown setting 'stor_limit'; did you mean 'store_limit'?"


def test_an_unknown_key_comes_with_the_known_ones(toml: Path) -> None:
    toml.write_text("zzz = 1\n")
    assert refusal(path=toml).startswith(f"{toml}, line 1: unknown setting 'zzz'; known settings: bind, advertise,")


def test_an_unknown_table_is_found_on_its_line(toml: Path) -> None:
    toml.write_text('bind = "127.0.0.1:1"\n[qqq]\nx = 1\n')
    assert refusal(path=toml).startswith(f"{toml}, line 2: unknown setting 'qqq'")


def test_a_key_inside_a_text_is_not_taken_for_the_setting(toml: Path) -> None:
    toml.write_text("db = '''\nconnections = 1\n'''\nconnections = 0\n")
    resolved = refusal({"db": "memory://"}, path=toml)
    assert resolved == f"connections is 0 ({toml}, line 4); it must be a whole number from 1 to 65535"


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, toml: Path) -> None:
    missing = tmp_path / "none.toml"
    assert refusal(path=missing) == f"cannot read the configuration file {missing}: No such file or directory"
    toml.write_text("bind = \n")
    assert refusal(path=toml) == f"{toml} is not valid TOML: Invalid value (at line 1, column 8)"
    toml.write_bytes(b"\xff")
    assert refusal(path=toml) == f"{toml} is not valid TOML: it is not UTF-8 text"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("flush", "never", "one of sync, async"),
        ("flush", "", "a string: one of sync, async"),
        ("store_limit", "64G", "a size from 16MiB to 16TiB, like 64MiB"),
        ("message_limit", "65MiB", "a size from 1B to 64MiB, like 64MiB"),
        ("ack_deadline", "0", "a time from 0.1s to 3600s, like 60s"),
        ("ack_deadline", "soon", "a time from 0.1s to 3600s, like 60s"),
        ("connections", "many", "a whole number from 1 to 65535"),
        ("handlers", "nope", "a list of handlers, each as \"module:Class\"; 'nope' is not"),
        ("topics", "", "a list of topic names (leave it out to serve every topic)"),
        ("bind", "13800", "HOST:PORT with a port from 0 to 65535, like 127.0.0.1:13800"),
        ("bind", ":13800", "HOST:PORT; for every address of this machine write 0.0.0.0:13800"),
        ("bind", "::1:1", "HOST:PORT; an IPv6 address is written [::1]:13800"),
        ("bind", "[x]:1", "HOST:PORT; an IPv6 address is written [::1]:13800"),
        ("bind", "a b:1", "HOST:PORT, where HOST is a name or an address"),
        ("pport", "http", "PORT or HOST:PORT with a port from 0 to 65535, like 13801"),
        ("pport", "65536", "PORT or HOST:PORT with a port from 0 to 65535, like 13801"),
        ("pport", "::1:1", "HOST:PORT; an IPv6 address is written [::1]:13800"),
        ("check_after", "50ms", "a time from 0.1s to 86400s, like 60s"),
        ("check_limit", "256", "a whole number from 1 to 255"),
        ("half_quota", "0", "a whole number from 1 to 100000000"),
        ("advertise", "0.0.0.0:1", "the HOST:PORT at which clients reach this broker, not a wildcard"),
    ],
)
def test_a_wrong_flag_is_named_with_what_is_allowed(name: str, value: str, allowed: str) -> None:
    shown = repr(value) if value else "empty"
    assert refusal({name: value}) == f"{name} is {shown} (--{name.replace('_', '-')}); it must be {allowed}"


@pytest.mark.parametrize(
    "line",
    ['connections = "5"', "connections = true", "bind = 5", 'topics = "a"', "topics = [1]", "topics = []",
     'insecure = "yes"', "store_limit = true", "ack_deadline = [1]", "flush = 1", "[bind]"],
)  # fmt: skip
def test_a_wrong_type_in_the_file_is_refused_with_its_line(toml: Path, line: str) -> None:
    toml.write_text(f"# settings\n{line}\n")
    assert f"({toml}, line 2); it must be " in refusal(path=toml)


def test_a_bad_topic_name_is_quoted() -> None:
    assert "'a b' is not a valid topic" in refusal({"topics": "ok,a b"})


KNOWN = "lmdb:///absolute/path, lmdb://./relative/path, memory:// or mock://"


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("redis://x", f"db is 'redis://x' (--db); it must be {KNOWN}"),
        ("kiteq-data", f"db is 'kiteq-data' (--db); it must be {KNOWN}"),
        ("", f"db is empty (--db); it must be a string: {KNOWN}"),
        ("lmdb://[x", f"db is 'lmdb://[x' (--db); it must be {KNOWN}"),
        ("lmdb://", "db is 'lmdb://' (--db); it must be lmdb:///absolute/path or lmdb://./relative/path"),
        ("lmdb://var/x", "db is 'lmdb://var/x' (--db); it must be lmdb:///absolute/path or lmdb://./relative/path"),
        ("memory:///x", "db is 'memory:///x' (--db); it must be memory:// alone: it has no path"),
    ],
)
def test_a_bad_store_url_is_refused(url: str, sentence: str) -> None:
    assert refusal({"db": url}) == sentence


def test_a_mysql_url_is_not_built_yet_and_its_password_stays_secret() -> None:
    sentence = refusal({"db": "mysql://user:secret@host/kiteq"})
    assert sentence.endswith("; MySQL stores are not built yet")
    assert "secret" not in sentence


@pytest.mark.parametrize("url", ["lmdb:///var/x", "lmdb://./x", "mmap:///x", "file://./x", "memory://", "mock://"])
def test_a_good_store_url_is_kept(url: str) -> None:
    assert load({"db": url}, {}).settings.db == url


@pytest.mark.parametrize("name", ["users"])
def test_what_is_not_built_yet_says_so(name: str) -> None:
    with pytest.raises(NotBuilt, match="not built yet"):
        load({name: "1"}, {})
    with pytest.raises(NotBuilt, match=f"{name} \\(KITEQ_{name.upper()}\\)"):
        load({}, {f"KITEQ_{name.upper()}": "1"})


@pytest.mark.parametrize("bind", ["0.0.0.0:1", "[::]:1", "broker.example:1", "10.0.0.1:1"])
def test_other_machines_are_let_in_only_when_asked_for(bind: str) -> None:
    sentence = refusal({"bind": bind})
    assert sentence.startswith(f"bind is {bind} (--bind), which other machines can reach")
    assert "--users" in sentence
    assert "--insecure" in sentence
    assert load({"bind": bind, "insecure": True}, {}).settings.bind == bind


@pytest.mark.parametrize("bind", ["127.0.0.1:1", "127.1.2.3:0", "localhost:1", "[::1]:1"])
def test_loopback_needs_no_leave(bind: str) -> None:
    assert load({"bind": bind}, {}).settings.bind == bind


def test_the_http_port_is_at_the_host_of_bind_unless_it_names_another(toml: Path) -> None:
    toml.write_text("pport = 13801\n")
    assert load({}, {}).settings.http_address is None
    assert load({}, {}, toml).settings.http_address == "127.0.0.1:13801"
    assert load({"bind": "[::1]:1"}, {"KITEQ_PPORT": "13801"}).settings.http_address == "[::1]:13801"
    assert load({"pport": "127.0.0.2:0"}, {}).settings.http_address == "127.0.0.2:0"


def test_the_http_port_is_for_other_machines_only_when_asked_for() -> None:
    sentence = refusal({"pport": "0.0.0.0:13801"})
    assert sentence.startswith("pport is 0.0.0.0:13801 (--pport), which other machines can reach")
    assert "--insecure" in sentence
    assert load({"pport": "0.0.0.0:13801", "insecure": True}, {}).settings.http_address == "0.0.0.0:13801"


def test_the_http_port_is_not_the_port_of_the_broker() -> None:
    assert refusal({"pport": "13800"}) == (
        "pport is 127.0.0.1:13800 (--pport), which is bind already (default); take another port"
    )
    assert load({"bind": "127.0.0.1:0", "pport": "0"}, {}).settings.http_address == "127.0.0.1:0"


def test_limits_that_contradict_each_other_are_both_named() -> None:
    assert refusal({"max_hold": "1s"}) == (
        "max_hold is 1s (--max-hold); it must be at least ack_deadline, which is 60s (default)"
    )
    assert refusal({"store_limit": "64MiB", "message_limit": "32MiB"}) == (
        "message_limit is 32MiB (--message-limit); it must be at most a quarter of store_limit, "
        "which is 64MiB (--store-limit)"
    )
    assert refusal({"group_quota": "65MiB"}, {"KITEQ_STORE_LIMIT": "64MiB"}) == (
        "group_quota is 65MiB (--group-quota); it must be at most store_limit, which is 64MiB (KITEQ_STORE_LIMIT)"
    )


def test_a_misspelt_variable_is_reported_but_a_foreign_one_is_not() -> None:
    environ = {"KITEQ_STOR_LIMIT": "1GiB", "KITEQ_SERVICE_HOST": "10.0.0.1", "KITEQ_BROKER": "x", "HOME": "/"}
    assert load({}, environ).misspelt == (("KITEQ_STOR_LIMIT", "KITEQ_STORE_LIMIT"),)


def test_what_kubernetes_sets_is_not_taken_for_a_misspelt_port() -> None:
    assert load({}, {"KITEQ_PORT": "tcp://10.0.0.1:13800"}).misspelt == ()
    assert load({}, {"KITEQ_PORT": "13801"}).misspelt == (("KITEQ_PORT", "KITEQ_PPORT"),)


@pytest.mark.parametrize("value", ["0", "33", "two"])
def test_there_are_one_to_thirty_two_workers(value: str) -> None:
    assert refusal({"workers": value}) == f"workers is {value!r} (--workers); it must be a whole number from 1 to 32"


def test_the_ports_of_all_workers_must_exist() -> None:
    assert load({"workers": "3", "bind": "127.0.0.1:65533"}, {}).settings.workers == 3
    assert refusal({"workers": "3", "bind": "127.0.0.1:65534"}) == (
        "bind is 127.0.0.1:65534 (--bind); with 3 workers (--workers) the ports from 65534 to 65536 are needed, and "
        "65535 is the last one"
    )
    assert refusal({"workers": "3", "pport": "65534"}).startswith("pport is 127.0.0.1:65534 (--pport); with 3 workers")
    assert refusal({"workers": "3", "advertise": "h:65534"}).startswith("advertise is h:65534 (--advertise); with 3")


@pytest.mark.parametrize("pport", ["13798", "13799", "13801", "13802", "0.0.0.0:13802"])
def test_the_http_ports_of_workers_must_not_be_those_of_their_clients(pport: str) -> None:
    sentence = refusal({"workers": "3", "pport": pport, "insecure": "true"})
    assert sentence.endswith("collide with those from 13800 on of bind (default); take one from 13803 on")


@pytest.mark.parametrize("pport", ["13797", "13803", "0", "127.0.0.2:13801"])
def test_other_http_ports_of_workers_are_taken(pport: str) -> None:
    assert load({"workers": "3", "pport": pport}, {}).settings.pport == pport
