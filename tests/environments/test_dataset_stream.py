"""Streams of tasks: the same order on every rank and after a resume, another one in each pass; invalid rows."""

import copy
import json
import pickle
import warnings

import pytest

from gear_lightning.data import RolloutDataModule
from gear_lightning.environments import dataset_stream
from gear_lightning.environments.dataset_stream import StreamedTasks
from gear_lightning.errors import UserError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A data set of three files with 30 tasks, in the working directory."""
    monkeypatch.setenv("GEAR_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    for part in range(3):
        write(tmp_path / "set" / f"part{part}.jsonl", *({"prompt": str(10 * part + i)} for i in range(10)))
    return tmp_path


def write(path, *rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def prompts(source, indices) -> list[int]:
    return [int(source[i].messages[0]["content"]) for i in indices]


def test_each_pass_has_all_tasks_in_another_order_that_the_seed_determines():
    source = StreamedTasks("set/*.jsonl", buffer=8)
    assert source.size is None
    passes = [prompts(source, range(30 * n, 30 * (n + 1))) for n in range(4)]
    assert all(sorted(order) == list(range(30)) for order in passes)
    assert len({tuple(order) for order in [*passes, list(range(30))]}) == 5
    assert prompts(StreamedTasks("set/*.jsonl", buffer=8), range(120)) == [i for order in passes for i in order]
    assert prompts(StreamedTasks("set/*.jsonl", buffer=8, seed=1), range(30)) != passes[0]
    assert prompts(StreamedTasks("set/*.jsonl", buffer=1), range(60)) == [*range(30), *range(30)]
    assert prompts(StreamedTasks("set/*.jsonl", buffer=1000), range(30)) != list(range(30))


@pytest.mark.parametrize("recent", [3, 1024])
def test_access_in_any_order_gives_the_same_tasks(monkeypatch, recent):
    monkeypatch.setattr(dataset_stream, "RECENT", recent)
    expected = prompts(StreamedTasks("set/*.jsonl", buffer=8), range(200))
    source = StreamedTasks("set/*.jsonl", buffer=8)
    for index in (150, 0, 199, 31, 30, 29, 90, 60, 59, 4, 5, 120, 119):
        assert prompts(source, [index]) == [expected[index]]
    for other in (copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        assert prompts(other, range(28, 33)) == expected[28:33]


def test_ranks_and_a_resume_draw_the_same_stream():
    positions = range(96)
    expected = prompts(StreamedTasks("set/*.jsonl", buffer=8), positions)
    drawn = {}
    for rank in range(2):  # each iteration has 8 tasks, 4 on each rank
        data = RolloutDataModule(StreamedTasks("set/*.jsonl", buffer=8), tasks_per_iteration=8)
        for position in positions:
            if position // 4 % 2 == rank:
                drawn[position] = int(data.train_task(position).messages[0]["content"])
    assert [drawn[position] for position in positions] == expected
    resumed = RolloutDataModule(StreamedTasks("set/*.jsonl", buffer=8))
    assert [int(resumed.train_task(p).messages[0]["content"]) for p in range(72, 96)] == expected[72:]


def test_invalid_rows_are_left_out_with_a_warning(folder):
    write(folder / "set" / "part1.jsonl", '{"prompt": "10"}', '{"prompt": ""}', "no JSON", '{"prompt": "11"}')
    source = StreamedTasks("set/*.jsonl", buffer=1)
    with pytest.warns(
        UserWarning, match=r"part1\.jsonl:2: found prompt = empty text, expected text\. This row is left"
    ):
        assert prompts(source, range(12)) == [*range(10), 10, 11]
    with pytest.warns(UserWarning, match=r"set/\*\.jsonl: 2 of 24 rows were left out"):
        assert prompts(source, range(12, 44)) == [*range(20, 30), *range(12), *range(20, 30)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompts(source, range(44, 90))


@pytest.mark.filterwarnings("ignore:.*This row is left out")
def test_data_without_tasks_ends_with_an_error(folder):
    path = write(folder / "bad.jsonl", *({"question": "a"} for _ in range(500)))
    with pytest.raises(
        UserError, match=r"none of 100 rows is a valid task; the last: .*bad\.jsonl:100: found the columns"
    ):
        StreamedTasks(path)[0]
    with pytest.raises(UserError, match=r"bad\.jsonl: columns\.prompt: no column 'x'; columns are question"):
        StreamedTasks(write(folder / "bad.jsonl", {"question": "a"}), columns={"prompt": "x"})[0]
    with pytest.raises(UserError, match=r"empty\.jsonl: found no tasks"):
        StreamedTasks(write(folder / "empty.jsonl"))[3]


def test_the_place_of_a_task_is_that_of_its_row():
    source = StreamedTasks("set/*.jsonl", buffer=8)
    for index in (*range(70), 3):
        number = int(source[index].messages[0]["content"])
        place = source.place_of(index)
        assert place.endswith(f"part{number // 10}.jsonl:{number % 10 + 1}")


def test_a_file_that_cannot_be_read_ends_the_run(folder):
    (folder / "set" / "part1.jsonl.gz").write_bytes(b"no gzip")
    source = StreamedTasks("set/part1*", buffer=1)
    assert prompts(source, range(10)) == list(range(10, 20))
    with pytest.raises(UserError, match=r"part1\.jsonl\.gz: cannot be read beyond line 0"):
        source[10]


def test_options_that_a_stream_cannot_have_are_refused():
    with pytest.raises(UserError, match="a stream has no slices; use DatasetTasks"):
        StreamedTasks("set/*.jsonl", split="train[:50%]")
    with pytest.raises(UserError, match="buffer=0: must be at least 1"):
        StreamedTasks("set/*.jsonl", buffer=0)
    with pytest.raises(UserError, match="no split 'test'; splits are train"):
        StreamedTasks("set/*.jsonl", split="test")


def test_other_files_change_the_digest(folder):
    before = StreamedTasks("set/*.jsonl").digest
    assert StreamedTasks("set/*.jsonl").digest == before
    write(folder / "set" / "part2.jsonl", {"prompt": "99"})
    assert StreamedTasks("set/*.jsonl").digest != before
