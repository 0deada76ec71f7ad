"""What each worker runs with, and how long it waits for its next start."""

from __future__ import annotations

from pathlib import Path

import pytest

from kiteq.cli.introduction import introduction
from kiteq.config import Settings
from kiteq.errors import ConfigError
from kiteq.workers.backoff import Backoff
from kiteq.workers.member import status_text
from kiteq.workers.plan import check_left_over, known_to_clients, settings_of
from tests.e2e import wire


def test_ports_count_up_and_stores_are_apart() -> None:
    settings = Settings(
        workers=3, bind="127.0.0.1:100", advertise="h.example:200", pport="300", db="lmdb://./s?force=1", flush="async"
    )
    planned = settings_of(settings)
    assert [one.bind for one in planned] == ["127.0.0.1:100", "127.0.0.1:101", "127.0.0.1:102"]
    assert [one.advertise for one in planned] == ["h.example:200", "h.example:201", "h.example:202"]
    assert [one.pport for one in planned] == ["300", "301", "302"]
    assert [one.db for one in planned] == [
        "lmdb://./s?force=1",
        "lmdb://./s/worker-1?force=1",
        "lmdb://./s/worker-2?force=1",
    ]
    assert {(one.workers, one.flush) for one in planned} == {(1, "async")}


@pytest.mark.parametrize("database", ["memory://", "mock://"])
def test_what_is_free_or_in_memory_is_the_same_for_each(database: str) -> None:
    planned = settings_of(Settings(workers=2, bind="[::1]:0", pport="127.0.0.1:0", db=database))
    assert [(one.bind, one.pport, one.db, one.advertise) for one in planned] == [
        ("[::1]:0", "127.0.0.1:0", database, None)
    ] * 2


def test_an_http_address_counts_up() -> None:
    assert [one.pport for one in settings_of(Settings(workers=2, pport="[::1]:300"))] == ["[::1]:300", "[::1]:301"]
    assert [one.pport for one in settings_of(Settings(workers=2, pport="0"))] == ["0", "0"]
    assert [one.pport for one in settings_of(Settings(workers=2))] == [None, None]


@pytest.mark.parametrize(
    ("bind", "advertise", "told"),
    [
        ("127.0.0.1:100", None, "127.0.0.1:100"),
        ("[::1]:100", None, "[::1]:100"),
        ("0.0.0.0:100", None, ":100"),
        ("[::]:100", None, ":100"),
        ("0.0.0.0:100", "h:7", "h:7"),
    ],
)
def test_clients_are_told_an_address_they_can_use(bind: str, advertise: str | None, told: str) -> None:
    assert known_to_clients(Settings(bind=bind, advertise=advertise), bind) == told


def test_with_a_registry_who_names_a_worker_is_told_of_the_others_beside_it() -> None:
    settings = Settings(bind="0.0.0.0:100", advertise="h:7", zkhost="zk://z:2181")
    assert known_to_clients(settings, settings.bind) == ":100"


def test_messages_of_workers_that_do_not_run_are_not_left_behind(tmp_path: Path) -> None:
    database = f"lmdb://{tmp_path}/s"
    check_left_over(Settings(db=database))
    for number in (1, 3):
        (tmp_path / "s" / f"worker-{number}").mkdir(parents=True)
        (tmp_path / "s" / f"worker-{number}" / "data.mdb").touch()
    (tmp_path / "s" / "worker-7").mkdir()
    (tmp_path / "s" / "worker-x").mkdir()
    check_left_over(Settings(db=database, workers=4))
    check_left_over(Settings(db="memory://"))
    with pytest.raises(ConfigError) as caught:
        check_left_over(Settings(db=database, workers=2))
    assert str(caught.value) == (
        f"the folder {tmp_path}/s/worker-3 holds what waits at worker 3, which does not run with workers 2: start with "
        "--workers 4; to have fewer, wait until nothing waits at the workers from 3 on (`kiteq group list --broker` at "
        "their ports), stop, and delete their folders"
    )
    with pytest.raises(ConfigError, match="worker-1 holds what waits at worker 1"):
        check_left_over(Settings(db=database))


async def test_a_worker_that_was_started_once_and_never_used_is_not_missed(tmp_path: Path) -> None:
    database = f"lmdb://{tmp_path}/s"
    async with wire.running(tmp_path / "s" / "worker-1") as broker:
        await (await wire.connect(broker, "producers")).publish(wire.numbered(1))
    async with wire.running(tmp_path / "s" / "worker-2"):
        pass  # as `--workers 3` leaves it that fails because two run
    check_left_over(Settings(db=database, workers=2))
    with pytest.raises(ConfigError, match="start with --workers 2;"):
        check_left_over(Settings(db=database))


@pytest.mark.parametrize("held", ["a delayed message", "a half message"])
async def test_a_worker_that_holds_what_is_in_no_topic_yet_is_missed(tmp_path: Path, held: str) -> None:
    async with wire.running(tmp_path / "s" / "worker-1") as broker:
        client = await wire.connect(broker, "producers")
        if held == "a delayed message":
            await client.publish(wire.numbered(1, delay=3_600))
        else:
            await client.prepare(wire.numbered(1))
    with pytest.raises(ConfigError, match="start with --workers 2;"):
        check_left_over(Settings(db=f"lmdb://{tmp_path}/s"))


def test_the_first_start_again_is_at_once_and_a_good_life_begins_anew() -> None:
    backoff = Backoff()
    assert [backoff.wait_after(1) for _ in range(8)] == [0, 0.5, 1, 2, 4, 8, 10, 10]
    assert [backoff.wait_after(lived) for lived in (30, 29, 31)] == [0, 0.5, 0]


def test_an_end_is_told_in_words() -> None:
    assert [status_text(status) for status in (0, 3, -9, -64)] == ["0", "3", "SIGKILL", "SIGRTMAX"]
    assert status_text(-99) == "signal 99"


def test_the_introduction_of_a_set_says_what_each_has() -> None:
    settings = Settings(workers=3, bind="127.0.0.1:100", db="lmdb:///s")
    text = introduction(settings, [(f"127.0.0.1:{port}", None) for port in (100, 101, 102)])
    assert "serves on 127.0.0.1:100 to 102\n" in text
    assert "lmdb:///s, that is /s, at most 64GiB; the same for the others in worker-1, worker-2 in it\n" in text
    assert "  workers   3 brokers, each with its own messages; every limit is of each of them\n" in text
    assert "a client of one is told of all" in text
    text = introduction(
        Settings(workers=2, zkhost="zk://z:2181", db="memory://"), [("127.0.0.1:7", None), ("127.0.0.1:9", None)]
    )
    assert "serves on 127.0.0.1:7 and 127.0.0.1:9\n" in text
    assert "zk://z:2181, where clients find these brokers as 127.0.0.1:7 and 127.0.0.1:9\n" in text
    assert "  store     memory://, in memory only" in text
