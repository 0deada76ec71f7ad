"""Who may read and write the registry: with credentials nobody else, and wrong ones are noticed at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio
from kazoo.client import KazooClient
from kazoo.exceptions import NoAuthError
from kazoo.security import make_acl

from kiteq.binding.bindings import fanout
from kiteq.registry.directory import open_directory
from kiteq.registry.errors import CredentialsRefused
from kiteq.registry.session import RESTART_SECONDS
from kiteq.registry_address import Credentials
from tests.registry.parts import ADDRESS, SERVER, ListLog, in_thread, opened, until
from tests.support.zookeeper import ZooKeeperProcess

pytestmark = pytest.mark.slow

RIGHT = Credentials("kiteq", "secret")
WRONG = Credentials("kiteq", "geheim")


@pytest.fixture(scope="module", params=["optional", "required", "lenient"])
def guarded(request: pytest.FixtureRequest) -> Iterator[ZooKeeperProcess]:
    with ZooKeeperProcess(users=dict([RIGHT]), sasl=request.param) as process:
        yield process


async def test_what_is_written_with_credentials_is_for_nobody_else(guarded: ZooKeeperProcess) -> None:
    async with opened(f"zk://{guarded.address}/mine", credentials=RIGHT) as registry:
        await registry.announce(ADDRESS, SERVER, ["t"])
        await registry.merge_bindings("g", "t", [fanout("t")])
        assert not registry.state.degraded
        with pytest.raises(CredentialsRefused, match="wants a user and a password"):
            async with opened(f"zk://{guarded.address}/mine"):
                pass


async def test_nodes_cannot_be_read_without_credentials() -> None:
    with ZooKeeperProcess(users=dict([RIGHT])) as zookeeper:
        async with opened(f"zk://{zookeeper.address}", credentials=RIGHT) as registry:
            await registry.announce(ADDRESS, SERVER, ["t"])
            stranger = KazooClient(zookeeper.address)
            stranger.start()
            for path in ("/kiteq", "/kiteq/server", "/kiteq/server/t", f"/kiteq/server/t/{ADDRESS}"):
                with pytest.raises(NoAuthError):
                    stranger.get_children(path)
            stranger.stop()
            stranger.close()


async def test_a_user_who_may_only_read_can_be_a_client_and_not_a_broker() -> None:
    reader = Credentials("reader", "other")
    with ZooKeeperProcess(users=dict([RIGHT, reader])) as zookeeper:
        url = f"zk://{zookeeper.address}"
        async with opened(url, credentials=RIGHT) as registry:
            await registry.announce(ADDRESS, SERVER, ["t"])
            with pytest.raises(CredentialsRefused, match="does not let the user 'reader' in"):
                async with opened(url, credentials=reader):
                    pass
            owner = KazooClient(
                zookeeper.address, sasl_options={"mechanism": "DIGEST-MD5", "username": "kiteq", "password": "secret"}
            )
            owner.start()
            acl = [make_acl("sasl", "kiteq", all=True), make_acl("sasl", "reader", read=True)]
            for path in ("/kiteq", "/kiteq/server", "/kiteq/server/t", f"/kiteq/server/t/{ADDRESS}"):
                owner.set_acls(path, acl)
            owner.stop()
            owner.close()
            with pytest.raises(CredentialsRefused):
                async with opened(url, credentials=reader, bindings_of=()):
                    pass
            async with open_directory(url, ["t"], log=ListLog(), credentials=reader) as directory:
                assert directory.servers_of("t") == {ADDRESS: SERVER}


@pytest.mark.parametrize("credentials", [WRONG, Credentials("nobody", "geheim")], ids=["password", "user"])
async def test_wrong_credentials_are_refused_at_the_start(guarded: ZooKeeperProcess, credentials: Credentials) -> None:
    with pytest.raises(CredentialsRefused, match="does not accept the user and password of KITEQ_ZK_AUTH") as caught:
        async with opened(f"zk://{guarded.address}/refused", credentials=credentials):
            pass
    assert credentials.password not in str(caught.value)


async def test_a_client_with_wrong_credentials_is_refused_too(guarded: ZooKeeperProcess) -> None:
    with pytest.raises(CredentialsRefused):
        async with open_directory(f"zk://{guarded.address}", ["t"], log=ListLog(), credentials=WRONG):
            pass


async def test_credentials_that_turn_wrong_are_told_and_harmless_and_right_ones_work_again() -> None:
    zookeeper = ZooKeeperProcess(users=dict([RIGHT]))
    try:
        await in_thread(zookeeper.start)
        async with opened(f"zk://{zookeeper.address}", credentials=RIGHT) as registry:
            await registry.announce(ADDRESS, SERVER, ["t"])
            zookeeper.kill()
            zookeeper._users = dict([WRONG])
            await in_thread(zookeeper.start)
            await until(lambda: "does not accept" in registry.state.reason)
            since = registry.state.since
            with trio.move_on_after(3 * RESTART_SECONDS):
                await until(lambda: registry.state.since > since + RESTART_SECONDS / 2)
                pytest.fail("a login that is refused again counts as a new outage")
            zookeeper.kill()
            zookeeper._users = dict([RIGHT])
            await in_thread(zookeeper.start)
            await until(lambda: not registry.state.degraded)
    finally:
        zookeeper.close()
