"""Registry URLs and credentials: what is read, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from kiteq.errors import ConfigError
from kiteq.registry_address import Credentials, RegistryAddress, parse_registry_url, read_credentials


@pytest.mark.parametrize(
    ("url", "hosts", "chroot"),
    [
        ("zk://h:2181", ("h:2181",), ""),
        ("zk://h", ("h:2181",), ""),
        ("zk://h/", ("h:2181",), ""),
        ("zk://h:1,h2:2,h:1/a", ("h:1", "h2:2"), "/a"),
        ("zk://h:1, h2/a/b-c/", ("h:1", "h2:2181"), "/a/b-c"),
        ("zk://[::1]:5/a", ("[::1]:5",), "/a"),
        ("zk://[::1]", ("[::1]:2181",), ""),
    ],
)
def test_a_url_names_hosts_and_a_chroot(url: str, hosts: tuple[str, ...], chroot: str) -> None:
    assert parse_registry_url(url) == RegistryAddress(hosts, chroot)


def test_an_address_is_written_as_a_user_would() -> None:
    assert str(parse_registry_url("zk://h,h2:5/a")) == "zk://h:2181,h2:5/a"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("h:2181", "must be zk://"),
        ("http://h:2181", "must be zk://"),
        ("zk://", "is not host:port"),
        ("zk://h,,h2", "is not host:port"),
        ("zk://::1", "is not host:port"),
        ("zk://h:0", "1 to 65535"),
        ("zk://h:65536", "1 to 65535"),
        ("zk://h:x", "1 to 65535"),
        ("zk://h/a//b", "chroot"),
        ("zk://h/../a", "chroot"),
        ("zk://h/a b", "chroot"),
        ("zk://" + ",".join(f"h{number}" for number in range(33)), "at most 32"),
    ],
)
def test_another_url_is_refused(url: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_registry_url(url)


def test_a_password_in_the_url_is_refused_and_not_shown() -> None:
    with pytest.raises(ValueError, match="KITEQ_ZK_AUTH") as caught:
        parse_registry_url("zk://me:geheim@h:2181")
    assert "geheim" not in str(caught.value)


def test_credentials_come_from_the_environment_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "auth").write_text("me:ge:heim\n")
    assert read_credentials({}) is None
    assert read_credentials({"KITEQ_ZK_AUTH": "me:ge:heim"}) == Credentials("me", "ge:heim")
    assert read_credentials({"KITEQ_ZK_AUTH": str(tmp_path / "auth")}) == Credentials("me", "ge:heim")
    assert "heim" not in repr(Credentials("me", "ge:heim"))


@pytest.mark.parametrize("text", ["", "me", "me:", ":geheim", "/no/such/file", "a:geheim\nb:c"])
def test_other_credentials_are_refused_and_not_shown(text: str) -> None:
    with pytest.raises(ConfigError, match="KITEQ_ZK_AUTH") as caught:
        read_credentials({"KITEQ_ZK_AUTH": text})
    assert "geheim" not in str(caught.value)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "auth").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_credentials({"KITEQ_ZK_AUTH": str(tmp_path / "auth")})
