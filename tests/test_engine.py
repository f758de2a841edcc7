"""Which engines stay in memory, and which are closed: with engines that hold no model."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from companion.local.engine import TUNED, Engines


class Hollow:
    """An engine without a model: tuned where its name begins with ft."""

    def __init__(self, name: str) -> None:
        self.adapters = ("adapter",) if name.startswith("ft") else ()
        self.closed = False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def made():
    return []


@pytest.fixture
def engines(made):
    def load(name: str) -> Hollow:
        made.append((name, Hollow(name)))
        return made[-1][1]

    return Engines(load)


def ask(engines, name: str) -> Hollow:
    with engines.use(name):
        return engines.get(name)


def open_names(made) -> list[str]:
    return [name for name, engine in made if not engine.closed]


def test_an_engine_is_started_once(engines, made):
    assert ask(engines, "base") is ask(engines, "base")
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: ask(engines, "ft:a"), range(8)))) == 1
    assert len(made) == 2


def test_of_too_many_tuned_engines_the_least_recently_used_is_closed(engines, made):
    ask(engines, "base")
    names = [f"ft:{number}" for number in range(TUNED)]
    for name in [*names, names[0], "ft:new"]:
        ask(engines, name)
    assert open_names(made) == ["base", names[0], *names[2:], "ft:new"]


def test_an_engine_in_use_is_not_closed_for_another(engines, made):
    with engines.use("ft:0"):
        held = engines.get("ft:0")
        for number in range(1, 6):
            ask(engines, f"ft:{number}")
        assert not held.closed
        assert len(open_names(made)) == TUNED
        engines.close()
        assert open_names(made) == ["ft:0"]
        assert engines.get("ft:0") is held
    engines.close()
    assert held.closed


def test_where_all_are_in_use_one_more_is_started_and_the_rest_is_closed_later(engines, made):
    names = [f"ft:{number}" for number in range(TUNED + 1)]
    uses = [engines.use(name) for name in names]
    for use, name in zip(uses, names, strict=True):
        use.__enter__()
        engines.get(name)
    assert open_names(made) == names
    for use in uses:
        use.__exit__(None, None, None)
    ask(engines, "ft:last")
    assert len(open_names(made)) == TUNED


def test_a_closed_engine_is_started_again(engines, made):
    before = ask(engines, "base")
    engines.close()
    assert before.closed
    assert ask(engines, "base") is not before


def test_an_engine_whose_model_is_deleted_ends_with_its_last_user(engines, made):
    idle = ask(engines, "ft:idle")
    engines.drop("ft:idle")
    engines.drop("ft:never")
    assert idle.closed
    with engines.use("ft:a"):
        held = engines.get("ft:a")
        engines.drop("ft:a")
        assert not held.closed
    assert ask(engines, "ft:a") is not held


def test_an_engine_is_never_closed_while_it_is_in_use(engines, made):
    wrong, until = [], time.monotonic() + 1

    def work(number: int) -> None:
        while time.monotonic() < until:
            name = f"ft:{number % 7}"
            with engines.use(name):
                engine = engines.get(name)
                time.sleep(0.0005)
                if engine.closed:
                    wrong.append(name)
            number = number * 31 + 7

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    while time.monotonic() < until:
        engines.close()
        time.sleep(0.002)
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(made) > 50
