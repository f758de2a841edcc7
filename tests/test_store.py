"""The store: transactions, pages, and what it does when the disk refuses."""

import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from disks import fill, make_read_only, small_disk

from companion.local.store import Store, StoreError, link, new_id


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def add_job(store, status="queued", **more) -> str:
    job = {"id": new_id("ftjob-"), "status": status, "metadata": None} | more
    store.add_job(job)
    return job["id"]


def add_file(store, purpose="fine-tune") -> str:
    file_id = new_id("file-")
    store.content(file_id).write_text("{}")
    store.add_file({"id": file_id, "purpose": purpose})
    return file_id


def test_ids_have_their_prefix_and_are_drawn_anew():
    made = {new_id("ftjob-") for _ in range(1000)}
    assert len(made) == 1000
    assert all(len(one) == 30 and one[:6] == "ftjob-" and one[6:].isalnum() for one in made)


def test_what_is_stored_is_there_when_the_store_is_opened_again(tmp_path):
    first = Store(tmp_path)
    job_id, file_id = add_job(first), add_file(first)
    first.add_event(job_id, "a", "hello", data={"step": 1}, at=12.9)
    first.close()
    again = Store(tmp_path)
    assert again.job(job_id)["status"] == "queued"
    assert again.file(file_id)["purpose"] == "fine-tune"
    event = again.events(job_id, None, 10)["data"][0]
    assert (event["message"], event["data"], event["created_at"]) == ("hello", {"step": 1}, 12)


def test_what_does_not_exist_is_none(store):
    assert store.job("ftjob-none") is store.file("file-none") is store.model("ft:none") is None
    assert store.delete_file("file-none") is False
    assert store.update_job("ftjob-none", ("queued",), status="failed") is None
    assert store.next_job("queued") is None


def test_a_change_that_fails_is_undone_wholly(store):
    with pytest.raises(KeyError), store.change():
        job_id = add_job(store)
        with store.change():
            store.add_event(job_id, "a", "hello")
        raise KeyError
    assert store.job(job_id) is None
    assert store.events(job_id, None, 10)["data"] == []
    assert store.job(add_job(store))


def test_a_change_of_a_killed_process_is_undone(store):
    code = (
        "import os, sys; from companion.local.store import Store; store = Store()\n"
        "with store.change():\n"
        "    store.add_job({'id': 'ftjob-a', 'status': 'queued'}); os.kill(os.getpid(), 9)"
    )
    environment = os.environ | {"COMPANION_HOME": str(store.folder)}
    done = subprocess.run([sys.executable, "-c", code], env=environment)
    assert done.returncode
    assert store.job("ftjob-a") is None
    assert store.job(add_job(store))


def test_reading_does_not_wait_for_a_change_and_sees_it_only_when_it_is_done(store):
    job_id = add_job(store)
    with ThreadPoolExecutor(1) as other, store.change():
        store.update_job(job_id, ("queued",), status="running")
        assert other.submit(store.job, job_id).result(5)["status"] == "queued"
        assert store.job(job_id)["status"] == "running"
    assert store.job(job_id)["status"] == "running"


def test_an_event_is_stored_once_for_its_key(store):
    one, other = add_job(store), add_job(store)
    assert store.add_event(one, "step-1", "first")
    assert not store.add_event(one, "step-1", "again")
    assert store.add_event(other, "step-1", "another job's")
    assert [event["message"] for event in store.events(one, None, 10)["data"]] == ["first"]


def test_threads_and_processes_that_write_at_once_lose_nothing(store):
    job_id = add_job(store)
    stores = [store, Store(store.folder)]

    def write(number: int) -> None:
        for step in range(25):
            assert stores[number % 2].add_event(job_id, f"{number}-{step}", "x")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.events(job_id, None, 1000)["data"]) == 200


def test_a_job_changes_only_from_a_status_that_allows_it(store):
    job_id = add_job(store)
    assert store.update_job(job_id, ("running", "queued"), status="running", seed=3)["seed"] == 3
    assert store.update_job(job_id, ("queued",), status="cancelled") is None
    assert store.job(job_id) == {"id": job_id, "status": "running", "metadata": None, "seed": 3}


def test_the_next_job_is_the_oldest_of_its_status(store):
    first, second = add_job(store), add_job(store)
    assert store.next_job("queued")["id"] == first
    store.update_job(first, ("queued",), status="running")
    assert store.next_job("queued")["id"] == second


@pytest.mark.parametrize(
    ("status", "busy"),
    [
        ("validating_files", True),
        ("queued", True),
        ("running", True),
        ("paused", False),
        ("succeeded", False),
        ("failed", False),
        ("cancelled", False),
    ],
)
def test_the_store_is_busy_while_a_job_waits_or_runs(store, status, busy):
    add_job(store, status)
    assert store.busy() is busy


def test_pages_follow_each_other_in_both_orders(store):
    made = [add_file(store) for _ in range(7)]
    for ascending, expected in ((False, made[::-1]), (True, made)):
        found, after, more = [], None, True
        while more:
            page = store.files(None, after, 3, ascending)
            assert page["object"] == "list"
            assert page["first_id"] == page["data"][0]["id"]
            found += [one["id"] for one in page["data"]]
            after, more = page["last_id"], page["has_more"]
        assert found == expected
    assert store.files(None, made[0], 3, False)["data"] == []
    with pytest.raises(LookupError):
        store.files(None, "file-none", 3, False)


def test_jobs_are_found_by_all_of_the_metadata_asked_for(store):
    one, two, none = (add_job(store, metadata=tag) for tag in ({"a": "1", 'b"': "2"}, {"a": "1"}, None))

    def found(metadata) -> list[str]:
        return [job["id"] for job in store.jobs(metadata, None, 10)["data"]]

    assert found({"a": "1"}) == [two, one]
    assert found({"a": "1", 'b"': "2"}) == [one]
    assert found({"a": "2"}) == found({"a": ""}) == []
    assert found(None) == [none]
    assert found({}) == [none, two, one]


def test_a_deleted_file_takes_its_content_with_it(store):
    file_id = add_file(store)
    assert store.delete_file(file_id) is True
    assert not store.content(file_id).exists()
    assert store.file(file_id) is None


def test_a_model_that_is_forgotten_takes_its_checkpoint_with_it(store):
    job_id = add_job(store)
    adapter = store.job_folder(job_id) / "checkpoints" / "step-1" / "adapter.gguf"
    for name in ("ft:a", "ft:a:ckpt-step-1"):
        store.add_model(name, job_id, "base", adapter)
    checkpoint = {"id": "ftckpt_1", "fine_tuning_job_id": job_id}
    store.add_checkpoint(checkpoint | {"fine_tuned_model_checkpoint": "ft:a:ckpt-step-1"})
    assert store.model("ft:a").adapter == adapter
    store.forget_model("ft:a")
    assert [model.name for model in store.models_of(job_id)] == ["ft:a:ckpt-step-1"]
    store.forget_model("ft:a:ckpt-step-1")
    assert store.checkpoints(job_id, None, 10)["data"] == store.models() == []


def test_a_home_that_was_moved_still_has_its_models(store, tmp_path_factory):
    job_id = add_job(store)
    store.add_model("ft:a", job_id, "base", store.job_folder(job_id) / "model" / "adapter.gguf")
    store.close()
    moved = tmp_path_factory.mktemp("elsewhere") / "home"
    shutil.move(store.folder, moved)
    assert Store(moved).model("ft:a").adapter == moved / "jobs" / job_id / "model" / "adapter.gguf"


def test_what_a_killed_process_left_half_made_is_swept_away_when_it_is_old(store):
    kept = [store.content(add_file(store)), store.job_folder(add_job(store))]
    kept[1].mkdir()
    left = [store.content("file-a.new"), store.job_folder("ftjob-a")]
    left[0].write_text("half a fi")
    left[1].mkdir()
    (left[1] / "training_file.jsonl").write_text("{}")
    store.sweep()
    assert all(path.exists() for path in kept + left)
    for path in kept + left:
        os.utime(path, (time.time() - 7200,) * 2)
    store.sweep()
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in left)


def test_a_linked_file_outlives_the_first_and_replaces_what_was_there(tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    for content in ("a", "b"):
        one.write_text(content)
        link(one, two)
        one.unlink()
        assert two.read_text() == content

    def unsupported(*args):
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", unsupported)
    one.write_text("c")
    link(one, two)
    assert two.read_text() == "c"


def test_a_full_disk_is_an_error_that_says_so_and_the_reserve_lets_it_be_said(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        store = Store(disk)
        job_id = add_job(store)
        fill(disk, 0)
        with pytest.raises(StoreError, match="free some space") as refused:
            for number in range(100):
                store.add_event(job_id, f"{number}", "x" * 1000)
        assert refused.value.full
        assert store.job(job_id)
        store.use_reserve()
        assert store.update_job(job_id, ("queued",), status="failed")
        store.close()


def test_a_disk_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        make_read_only(disk)
        with pytest.raises(StoreError, match=str(disk)) as refused:
            Store(disk)
        assert not refused.value.full


def test_a_database_that_is_none_is_an_error_that_names_its_folder(tmp_path):
    (tmp_path / "endpoint.sqlite3").write_text("order;intent\n" * 1000)
    with pytest.raises(StoreError, match=str(tmp_path)):
        Store(tmp_path)
