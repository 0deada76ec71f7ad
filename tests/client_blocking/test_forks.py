"""A process that forks: the child has a client of its own, the parent keeps what it has."""

from __future__ import annotations

from kiteq_client import fanout
from tests.client_blocking.parts import Place, run_program


def received(place: Place, count: int) -> set[str]:
    """Return the bodies of so many messages that wait for the group of a test."""
    with place.client() as client:
        bodies = set()
        for delivery in client.deliveries():
            delivery.ack()
            bodies.add(delivery.text)
            if len(bodies) == count:
                break
        return bodies


def bound(place: Place) -> None:
    with place.client(bindings=[fanout(place.topic)]):
        pass


PARTS = """
    def fork(work, *arguments):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                work(*arguments)
                status = 0
            finally:
                sys.stdout.flush()
                if status:
                    sys.excepthook(*sys.exc_info())
                os._exit(status)
        return pid

    def wait(*pids):
        for pid in pids:
            assert os.waitpid(pid, 0)[1] == 0

    def instance():
        prepared = client.prepare(message("half"))
        instance = client.admin("tx.show", id=prepared.id.hex())["instance"]
        client.rollback(prepared)
        assert instance
        return instance

    def connections():
        found = set()
        for name in os.listdir("/proc/self/fd"):
            try:
                target = os.readlink("/proc/self/fd/" + name)
            except OSError:
                continue
            if target.startswith(("socket:", "anon_inode:[eventpoll]")):
                found.add(target)
        return found

    client = blocking.Client(address, group=group, topics=[topic])
"""


def test_children_connect_for_themselves_while_the_parent_sends_on(place: Place) -> None:
    bound(place)
    program = (
        PARTS
        + """
    over = threading.Event()
    sent = []

    def load(thread):
        while not over.is_set():
            body = f"parent {thread} {len(sent)}"
            client.send(message(body))
            sent.append(body)

    def child(number):
        sending = [
            threading.Thread(target=lambda name=name: client.send(message(f"child {number} {name}"))) for name in "ab"
        ]
        for thread in sending:
            thread.start()
        for thread in sending:
            thread.join()
        assert instance() != instance_of_parent
        client.close()

    instance_of_parent = instance()
    assert instance_of_parent == instance()
    loads = [threading.Thread(target=load, args=(number,), daemon=True) for number in range(4)]
    for thread in loads:
        thread.start()
    children = []
    for number in range(8):
        count = len(sent)
        while len(sent) < count + 5:
            time.sleep(0.001)
        children.append(fork(child, number))
    wait(*children)
    over.set()
    for thread in loads:
        thread.join()
    assert client.statistics().reconnects == 0
    assert instance() == instance_of_parent
    client.close()
    print(len(sent))
    """
    )
    [count] = run_program(program, place)
    bodies = received(place, int(count) + 16)
    assert {body for body in bodies if body.startswith("child")} == {
        f"child {number} {name}" for number in range(8) for name in "ab"
    }


def test_the_child_holds_no_descriptor_of_the_parents_connections(place: Place) -> None:
    program = (
        PARTS
        + """
    def child():
        assert not connections() & connections_of_parent
        client.send(message())
        assert connections()

    client.send(message())
    connections_of_parent = connections()
    assert len(connections_of_parent) == 4  # a connection, a selector, and the two ends of the loop's pipe
    wait(fork(child))
    client.send(message())
    assert connections() == connections_of_parent
    assert client.statistics().reconnects == 0
    """
    )
    assert run_program(program, place) == []


def test_a_fork_while_it_connects_leaves_no_descriptor_either(place: Place) -> None:
    program = (
        PARTS
        + """
    def child():
        client.send(message())
        client.close()
        assert not connections(), connections()

    for _ in range(40):
        client = blocking.Client(address, group=group)
        opening = threading.Thread(target=client.send, args=(message(),))
        opening.start()
        pid = fork(child)
        opening.join()
        client.close()
        wait(pid)
    """
    )
    assert run_program(program, place) == []


def test_a_grandchild_connects_for_itself(place: Place) -> None:
    bound(place)
    program = (
        PARTS
        + """
    def grandchild():
        client.send(message("grandchild"))

    def child():
        client.send(message("child"))
        wait(fork(grandchild))
        client.send(message("child again"))

    client.send(message("parent"))
    wait(fork(child))
    client.send(message("parent again"))
    """
    )
    assert run_program(program, place) == []
    assert received(place, 5) == {"parent", "parent again", "child", "child again", "grandchild"}


def test_workers_forked_before_serving_like_gunicorn(place: Place) -> None:
    bound(place)
    program = (
        PARTS
        + """
    from concurrent.futures import ThreadPoolExecutor

    def serve(worker):
        with ThreadPoolExecutor(4) as requests:
            list(requests.map(lambda number: client.send(message(f"{worker} {number}")), range(25)))
        sys.exit(0)

    client.send(message("preloaded"))
    pids = []
    for worker in range(3):
        pid = os.fork()
        if pid == 0:
            serve(worker)
        pids.append(pid)
    wait(*pids)
    """
    )
    assert run_program(program, place) == []
    assert received(place, 76) == {"preloaded", *(f"{worker} {number}" for worker in range(3) for number in range(25))}


def test_a_pool_of_processes_like_celery(place: Place) -> None:
    bound(place)
    program = (
        PARTS
        + """
    import multiprocessing

    def task(number):
        client.send(message(str(number)))
        return os.getpid()

    client.send(message("parent"))
    with multiprocessing.get_context("fork").Pool(3, maxtasksperchild=5) as pool:
        pids = pool.map(task, range(40), chunksize=1)
        pool.close()
        pool.join()
    assert os.getpid() not in pids
    client.send(message("parent again"))
    """
    )
    assert run_program(program, place) == []
    assert received(place, 42) == {"parent", "parent again", *map(str, range(40))}


def test_what_was_taken_before_the_fork_belongs_to_the_parent(place: Place) -> None:
    bound(place)
    program = (
        PARTS
        + """
    def refused(call):
        try:
            call()
        except RuntimeError as error:
            print(error.args[0].replace(str(os.getppid()), "PARENT"))

    def child():
        refused(delivery.ack)
        refused(lambda: next(deliveries))
        deliveries.close()

    client.send_many([message("one"), message("two")])
    deliveries = client.deliveries()
    delivery = next(deliveries)
    wait(fork(child))
    delivery.ack()
    next(deliveries).ack()
    """
    )
    assert run_program(program, place) == [
        "these deliveries belong to the process before the fork; call deliveries() again",
        "this delivery was taken by process PARENT, and only that can answer it",
    ]


def test_a_handler_may_fork(place: Place) -> None:
    program = (
        PARTS
        + """
    def child():
        client.send(Message(topic + "-other", "pay"))
        client.close()

    def handle(received):
        wait(fork(child))
        pid = os.fork()
        if pid == 0:
            return  # as a program that forgets to leave
        wait(pid)
        over.set()

    over = threading.Event()
    client = blocking.Client(address, group=group, bindings=[fanout(topic)], on_message=handle)
    client.send(message("parent"))
    over.wait()
    client.close()
    print("over")
    """
    )
    assert run_program(program, place) == ["over"]


def test_a_child_of_a_closed_client_is_refused_as_the_parent(place: Place) -> None:
    program = (
        PARTS
        + """
    def child():
        try:
            client.send(message())
        except ClientClosed:
            print("closed")

    client.send(message())
    client.close()
    wait(fork(child))
    """
    )
    assert run_program(program, place) == ["closed"]
