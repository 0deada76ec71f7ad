"""The ephemeral nodes of this process: made, made again after a lost session, taken over from an earlier start."""

from __future__ import annotations

from collections.abc import Mapping

from kiteq.registry.errors import AddressTaken
from kiteq.registry.layout import Server, decode_server, encode_server
from kiteq.registry.log import Log
from kiteq.registry.session import NoNodeError, ZooKeeperSession

__all__ = ["Announcements", "may_replace"]


def may_replace(theirs: Server, ours: Server, *, is_own_session: bool) -> bool:
    """Return whether a node of another session is our own: of an earlier start, or of a session of this one.

    A node of this start and a session that was never ours is made by a copy of the store: each would replace the
    other's for ever.
    """
    return theirs.broker_id == ours.broker_id and (theirs.epoch < ours.epoch or is_own_session)


class Announcements:
    """The nodes that stand for this broker. problem: why some of them are not there, None when all are."""

    def __init__(self, session: ZooKeeperSession, log: Log) -> None:
        self.problem: AddressTaken | None = None
        self._session = session
        self._log = log
        self._wanted: dict[str, Server] = {}
        self._ours: set[str] = set()
        self._leaving: set[str] = set()
        self._folders: set[str] = set()
        self._dirty: set[str] = set()
        self._sessions: set[int] = set()
        """All that this process has had."""
        self._watch = session.watch(self._dirty.add)

    @property
    def unfinished(self) -> bool:
        """Whether the next turn has to come soon, though nothing rings."""
        return bool(self._wanted.keys() - self._ours or self._leaving)

    def want(self, nodes: Mapping[str, Server], *, instead_of: str) -> None:
        """Keep these nodes alive from now on; others whose path begins with `instead_of` go."""
        gone = {path for path in self._wanted if path.startswith(instead_of) and path not in nodes}
        for path in gone:
            del self._wanted[path]
        self._leaving = (self._leaving | gone) - nodes.keys()
        self._ours -= {path for path, server in nodes.items() if self._wanted.get(path) != server}
        self._wanted.update(nodes)

    def refresh(self, *, full: bool) -> bool:
        """Bring ZooKeeper to what is wanted; there is never anything new to tell.

        Raises `RegistryUnavailable` and `CredentialsRefused`.
        """
        self._sessions.add(self._session.session_id)
        if full:
            self._ours.clear()
            self._folders.clear()
        self._ours -= {self._dirty.pop() for _ in range(len(self._dirty))}
        self._leave()
        unknown = [path for path in self._wanted if path not in self._ours]
        if not unknown:
            self._tell(None)
            return False
        missing, taken = self._look(unknown)
        self._create(missing)
        still_missing, taken_now = self._look(missing)  # sets the watches
        if still_missing:
            self._session.ring()
        self._tell(taken or taken_now)
        return False

    def _look(self, paths: list[str]) -> tuple[list[str], AddressTaken | None]:
        """Return which nodes are missing, deleting our own old ones; and whose node is in the way."""
        missing: list[str] = []
        changed: list[tuple[str, bytes, int]] = []
        old: list[tuple[str, int]] = []
        taken: AddressTaken | None = None
        answers = self._session.gather("get", [(path, self._watch) for path in paths])
        for path, answer in zip(paths, answers, strict=True):
            if isinstance(answer, NoNodeError):
                missing.append(path)
                continue
            content, stat = answer
            if stat.ephemeralOwner == self._session.session_id:
                self._ours.add(path)
                if content != encode_server(self._wanted[path]):
                    changed.append((path, encode_server(self._wanted[path]), stat.version))
                continue
            taken_here = self._in_the_way(path, content, stat.ephemeralOwner)
            if taken_here is not None:
                taken = taken_here
                continue
            self._log.info("replacing the announcement of an earlier session", node=path)
            old.append((path, stat.version))
        # Whatever these answer, what is not as wanted then rings or is looked at again.
        self._session.gather("set", changed)
        self._session.gather("delete", old)
        return missing + [path for path, _ in old], taken

    def _in_the_way(self, path: str, content: bytes, owner: int) -> AddressTaken | None:
        ours = self._wanted[path]
        try:
            theirs = decode_server(content)
        except ValueError as error:
            return AddressTaken(f"the node {path} is there and not ours: {error}; is another broker at this address?")
        if may_replace(theirs, ours, is_own_session=owner in self._sessions):
            return None
        if theirs.broker_id == ours.broker_id:
            start = "a later start of this broker" if theirs.epoch > ours.epoch else "another process as this broker"
            return AddressTaken(
                f"the node {path} was made by {start} (epoch {theirs.epoch}, here {ours.epoch}): "
                "does another process run on a copy of its store?"
            )
        return AddressTaken(f"the broker {theirs.broker_id} has announced itself at the same address: {path}")

    def _create(self, paths: list[str]) -> None:
        folders = {path.rpartition("/")[0] for path in paths} - self._folders
        self._session.make_folders(folders)
        self._folders |= folders
        requests = [(path, encode_server(self._wanted[path])) for path in paths]
        for answer in self._session.gather("create", requests, acl=self._session.acl, ephemeral=True):
            if isinstance(answer, NoNodeError):
                self._folders.clear()  # somebody deleted them

    def _leave(self) -> None:
        if not self._leaving:
            return
        paths = list(self._leaving)
        answers = self._session.gather("get", [(path,) for path in paths])
        ours = [
            (path, answer[1].version)
            for path, answer in zip(paths, answers, strict=True)
            if not isinstance(answer, Exception) and answer[1].ephemeralOwner == self._session.session_id
        ]
        self._session.gather("delete", ours)
        self._leaving.difference_update(paths)
        self._ours.difference_update(paths)

    def _tell(self, problem: AddressTaken | None) -> None:
        if problem is not None and str(problem) != str(self.problem):
            self._log.warning("this broker cannot be announced", reason=str(problem))
        self.problem = problem
