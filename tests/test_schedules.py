"""Runs that begin by the clock: once however many beats run and whenever they die; what is missed is a choice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice, takewhile
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import redis
import yaml
from fleet import eventually
from preloading import Forked

from ferrum import cli, runs
from ferrum.errors import Conflict, FerrumError, InputError, NotFound, Unavailable, WorkflowError
from ferrum.local.redis import PrivateRedis
from ferrum.runs import submit
from ferrum.schedules import AT_MOST, Cron, Schedule, ScheduleError, Schedules, fire_due, firing_of
from ferrum.settings import Missed
from ferrum.workflow import Workflow

GATE = {"type": "approval", "message": "Go on, {{ input.who }}?"}
WORKFLOW = Workflow.of({"name": "nightly", "inputs": {"who": {"type": "string"}}, "steps": {"gate": GATE}})

#: 2026-01-15 00:00 UTC; schedules of these tests are due there, and long since.
DUE = 1_768_435_200
HOUR = 3600
DAY = 24 * HOUR


@pytest.fixture
def store(clean_redis: str) -> Iterator[Schedules]:
    with opened(clean_redis) as store:
        yield store


@contextmanager
def opened(url: str) -> Iterator[Schedules]:
    store = Schedules(url)
    try:
        yield store
    finally:
        store.close_connections()


def add(store: Schedules, cron: str = "0 * * * *", due: int | None = DUE, **more: Any) -> Schedule:
    """A schedule that is due at this time."""
    added = store.add(WORKFLOW, cron, input={"who": "Ada"}, **more)
    if due is not None:
        plant(store, added, next=due)
    return store.find(added.name)


def plant(store: Schedules, schedule: Schedule, **fields: str | int) -> None:
    """Write into what is kept of a schedule, as no command would."""
    store._redis.hset(f"ferrum:{{schedules}}:schedule:{schedule.id}", mapping=dict(fields))
    if "next" in fields:
        store._redis.zadd("ferrum:{schedules}:due", {schedule.id: int(fields["next"])})


def started() -> list[str]:
    """The runs that there are."""
    return [one.run_id for one in runs.record().runs(limit=10_000)]


class Starts:
    """Stands where runs are started, and notes the keys."""

    def __init__(self) -> None:
        self.keys: list[str] = []

    def __call__(self, document: object, given: object, *, key: str) -> str:
        self.keys.append(key)
        return f"run {len(self.keys)}"

    @property
    def hours(self) -> list[int]:
        """For which hours after `DUE`."""
        times = (datetime.fromisoformat(key.split(":", 2)[2]).timestamp() for key in self.keys)
        return [round(at - DUE) // HOUR for at in times]


# Firing.


def test_what_is_due_is_started_with_its_input_and_is_due_again_at_its_next_time(store: Schedules) -> None:
    add(store)
    fire_due(store, DUE)
    (run_id,) = started()
    assert runs.show(run_id).input == {"who": "Ada"}
    after = store.find("nightly")
    assert (after.fired_at, after.run_id, after.next_at, after.error) == (DUE, run_id, DUE + HOUR, None)


def test_nothing_is_started_before_its_time_and_the_time_to_wait_is_known(store: Schedules) -> None:
    add(store)
    assert fire_due(store, DUE - 0.5) == 0.5
    assert started() == []


def test_the_workflow_is_run_as_it_was_when_the_schedule_was_added(store: Schedules, tmp_path: Path) -> None:
    file = tmp_path / "nightly.yaml"
    file.write_text(yaml.safe_dump(WORKFLOW.to_dict()))
    added = store.add(Workflow.load(file), "0 * * * *", input={"who": "Ada"})
    file.unlink()
    plant(store, added, next=DUE)
    fire_due(store, DUE)
    assert runs.show(started()[0]).workflow == "nightly"


def test_many_beats_at_once_start_one_run(clean_redis: str, store: Schedules) -> None:
    add(store, missed=Missed.ALL)
    # Their clocks differ, and so does what each of them would do.
    clocks = [DUE + hours * HOUR for hours in range(8)]

    def beat(now: float) -> None:
        with opened(clean_redis) as own:
            fire_due(own, now)

    with ThreadPoolExecutor(len(clocks)) as pool:
        list(pool.map(beat, clocks))
    fire_due(store, clocks[-1])
    assert len(started()) == len(clocks)
    assert store.find("nightly").next_at == clocks[-1] + HOUR


def test_what_a_beat_decided_before_it_died_is_done_by_the_next(store: Schedules) -> None:
    schedule = add(store)
    store.decide(schedule, firing_of(schedule, DUE))
    later, starts = DUE + 5 * HOUR, Starts()
    fire_due(store, later, starts)
    assert starts.hours == [0]
    fire_due(store, later, starts)
    assert starts.hours == [0, 5]


def test_a_beat_that_died_once_the_run_was_started_starts_no_second_one(store: Schedules) -> None:
    add(store)

    def start_and_die(*arguments: Any, key: str) -> str:
        submit(*arguments, key=key)
        raise SystemExit

    with pytest.raises(SystemExit):
        fire_due(store, DUE, start_and_die)
    assert store.find("nightly").next_at == DUE
    fire_due(store, DUE + 90)
    assert [store.find("nightly").run_id] == started()


def test_a_beat_that_was_overtaken_takes_nothing_back(store: Schedules) -> None:
    schedule = add(store)
    mine = store.decide(schedule, firing_of(schedule, DUE))
    fire_due(store, DUE)
    fire_due(store, DUE + HOUR)
    assert mine is not None
    assert store.advance(schedule, mine, "run_mine", None) is False
    assert store.decide(schedule, mine) is None
    after = store.find("nightly")
    assert (after.fired_at, after.next_at) == (DUE + HOUR, DUE + 2 * HOUR)
    assert after.run_id != "run_mine"


def test_one_that_cannot_be_started_says_why_and_holds_up_no_other(store: Schedules) -> None:
    broken = add(store, due=DUE - HOUR, name="broken")
    plant(store, broken, document=json.dumps({"name": "x", "version": "0", "steps": {"a": {"type": "gone"}}}))
    add(store)
    fire_due(store, DUE)
    assert "gone" in (store.find("broken").error or "")
    assert store.find("broken").next_at == DUE + HOUR
    assert [store.find("nightly").run_id] == started()
    plant(store, broken, document=json.dumps(WORKFLOW.to_dict()))
    fire_due(store, DUE + HOUR)
    assert store.find("broken").error is None


def test_one_whose_time_zone_is_gone_is_paused_and_says_why(store: Schedules) -> None:
    plant(store, add(store), timezone="Mars/Olympus")
    fire_due(store, DUE)
    after = store.find("nightly")
    assert after.paused
    assert "Mars/Olympus" in (after.error or "")


def test_one_that_cannot_be_started_for_now_stays_due(store: Schedules) -> None:
    add(store)

    def away(*_: object, key: str) -> str:
        raise Unavailable("the artifact store is away")

    fire_due(store, DUE, away)
    assert store.find("nightly").next_at == DUE
    fire_due(store, DUE)
    assert len(started()) == 1


# What was missed.


@pytest.mark.parametrize(("missed", "hours"), [(Missed.SKIP, [10]), (Missed.ONCE, [10]), (Missed.ALL, list(range(11)))])
def test_a_time_that_has_just_come_is_never_missed(store: Schedules, missed: Missed, hours: list[int]) -> None:
    add(store, missed=missed)
    starts = Starts()
    fire_due(store, DUE + 10 * HOUR + 59, starts)
    assert starts.hours == hours
    assert store.find("nightly").next_at == DUE + 11 * HOUR


@pytest.mark.parametrize(("missed", "hours"), [(Missed.SKIP, []), (Missed.ONCE, [10]), (Missed.ALL, list(range(11)))])
def test_missed_times_are_skipped_or_made_up_for_by_one_run_or_by_all(
    store: Schedules, missed: Missed, hours: list[int]
) -> None:
    add(store, missed=missed)
    starts = Starts()
    fire_due(store, DUE + 10 * HOUR + 61, starts)
    fire_due(store, DUE + 10 * HOUR + 61, starts)
    assert starts.hours == hours
    assert store.find("nightly").next_at == DUE + 11 * HOUR


def test_a_long_outage_does_not_end_in_a_flood(store: Schedules) -> None:
    add(store, missed=Missed.ALL)
    starts = Starts()
    fire_due(store, DUE + 1000 * HOUR, starts)
    assert starts.hours == list(range(1001 - AT_MOST, 1001))


def test_ten_years_of_minutes_are_made_up_for_at_once(store: Schedules) -> None:
    add(store, "* * * * *")
    starts = Starts()
    fire_due(store, DUE + 3650 * DAY, starts)
    assert starts.hours == [3650 * 24]


def test_what_to_do_about_missed_times_is_a_setting(store: Schedules, monkeypatch: pytest.MonkeyPatch) -> None:
    from ferrum import settings

    assert add(store, name="a").missed is Missed.ONCE
    monkeypatch.setattr("ferrum.schedules.settings", lambda: settings.read({"FERRUM_MISSED": "skip"}))
    assert add(store, name="b").missed is Missed.SKIP
    assert add(store, name="c", missed=Missed.ALL).missed is Missed.ALL


# Pausing and deleting.


def test_a_paused_schedule_starts_nothing_and_makes_up_for_nothing(store: Schedules) -> None:
    add(store, missed=Missed.ALL)
    assert store.pause("nightly").next_at is None
    assert store.pause("nightly").paused
    fire_due(store, DUE + 3 * HOUR)
    resumed = store.resume("nightly")
    assert not resumed.paused
    assert resumed.next_at is not None
    assert resumed.next_at > store.now()
    fire_due(store)
    assert started() == []
    fire_due(store, resumed.next_at)
    assert len(started()) == 1


def test_resuming_what_is_not_paused_loses_no_missed_time(store: Schedules) -> None:
    add(store)
    assert store.resume("nightly").next_at == DUE


def test_a_schedule_that_is_paused_while_a_beat_looks_at_it_starts_nothing(store: Schedules) -> None:
    schedule = add(store)
    firing = firing_of(schedule, DUE)
    store.pause("nightly")
    assert store.decide(schedule, firing) is None


def test_a_schedule_that_was_paused_while_it_was_fired_knows_its_run(store: Schedules) -> None:
    schedule = add(store)

    def pause_meanwhile(*arguments: Any, key: str) -> str:
        store.pause("nightly")
        return submit(*arguments, key=key)

    fire_due(store, DUE, pause_meanwhile)
    after = store.find("nightly")
    assert (after.paused, after.fired_at, [after.run_id]) == (True, DUE, started())
    assert schedule.next_at == DUE


def test_a_deleted_schedule_is_gone_and_a_new_one_of_its_name_is_another(store: Schedules) -> None:
    old = add(store)
    firing = store.decide(old, firing_of(old, DUE))
    assert store.delete("nightly").id == old.id
    assert store.all() == []
    with pytest.raises(NotFound, match="no schedule 'nightly'"):
        store.find("nightly")
    new = add(store)
    assert firing is not None
    assert store.advance(old, firing, None, None) is False
    assert store.find("nightly") == new
    assert new.key(DUE) != old.key(DUE)


def test_schedules_outlive_a_restart_of_redis(redis_url: str, tmp_path: Path) -> None:
    server = PrivateRedis(tmp_path / "own").start()
    try:
        with opened(server.url) as store:
            added = add(store)
        server.stop()
        server.start()
        with opened(server.url) as store:
            assert store.all() == [added]
            assert store.due(DUE) == [added]
    finally:
        server.stop()


# At the door.


@pytest.mark.parametrize(
    ("cron", "said"),
    [
        ("0 0 31 2 *", "never comes: none of the months '2' has a day '31'"),
        ("0 0 30,31 FEB *", "never comes"),
        ("* * */20 * 1L", "never comes"),
        ("* * * *", "it has 4 fields and needs five, minute, hour, day of month, month, day of week"),
        ("0 * * * * *", "it has 6 fields"),
        ("", "it has 0 fields"),
        ("@daily", "@daily is '0 0 \\* \\* \\*'"),
        ("61 * * * *", "'61' is no minute \\(0-59"),
        ("* 24 * * *", "'24' is no hour"),
        ("* * 0 * *", "'0' is no day of month"),
        ("* * * JANUARY *", "'JANUARY' is no month"),
        ("* * * * MO", "'MO' is no day of week"),
        ("*/0 * * * *", "is no minute"),
        (f"{'1,' * 1000}1 * * * *", "needs five"),
    ],
)
def test_a_cron_that_cannot_be_is_refused_with_what_is_wrong(store: Schedules, cron: str, said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        add(store, cron)
    assert store.all() == []


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"timezone": "Europe/Berln"}, ScheduleError, "'Europe/Berln' is not known .did you mean 'Europe/Berlin'"),
        ({"timezone": "../../etc/passwd"}, ScheduleError, "is not known"),
        ({"timezone": ""}, ScheduleError, "'' is not known: they are named Europe/Berlin"),
        ({"name": "Not a name"}, ScheduleError, "made of a-z"),
        ({"input": {}}, InputError, "input 'who' is missing"),
        ({"input": {"who": 1}}, InputError, "'who'"),
        (
            {"workflow": Workflow.of({"name": "x", "steps": {"a": {"type": "llmm"}}})},
            WorkflowError,
            "did you mean 'llm'",
        ),
    ],
)
def test_what_could_not_be_started_is_refused_when_it_is_added(
    store: Schedules, change: dict[str, Any], error: type[FerrumError], said: str
) -> None:
    asked = {"workflow": WORKFLOW, "cron": "0 * * * *", "input": {"who": "Ada"}, **change}
    with pytest.raises(error, match=said):
        store.add(**asked)
    assert store.all() == []


def test_a_name_is_taken_once(store: Schedules) -> None:
    first = add(store)
    with pytest.raises(Conflict, match="there is a schedule 'nightly' already"):
        add(store)
    assert store.all() == [first]


@pytest.mark.parametrize("do", [Schedules.find, Schedules.pause, Schedules.resume, Schedules.delete])
def test_a_name_that_is_not_there_says_which_is(store: Schedules, do: Callable[[Schedules, str], object]) -> None:
    add(store)
    with pytest.raises(NotFound, match=r"no schedule 'nighly' .did you mean 'nightly'"):
        do(store, "nighly")


# Time zones.


def times(cron: str, zone: str, after: str, count: int = 3) -> list[str]:
    """The next times after a local one, as local times with their offset."""
    tz = ZoneInfo(zone)
    begin = datetime.fromisoformat(after).replace(tzinfo=tz)
    found = islice(Cron.of(cron, zone).after(int(begin.timestamp())), count)
    return [f"{datetime.fromtimestamp(at, tz):%d %H:%M %z}" for at in found]


def test_a_time_is_the_same_by_the_clock_on_the_wall_all_year() -> None:
    assert times("0 9 1 * *", "Europe/Berlin", "2026-03-01T10:00") == [
        "01 09:00 +0200",
        "01 09:00 +0200",
        "01 09:00 +0200",
    ]
    assert times("0 9 1 1,7 *", "America/New_York", "2026-03-01T10:00", 2) == ["01 09:00 -0400", "01 09:00 -0500"]


def test_a_time_that_the_spring_leaves_out_comes_right_after_the_gap_and_once() -> None:
    assert times("30 2 * * *", "Europe/Berlin", "2026-03-28T12:00", 2) == ["29 03:00 +0200", "30 02:30 +0200"]
    assert times("0,30 2 * * *", "Europe/Berlin", "2026-03-28T12:00", 2) == ["29 03:00 +0200", "30 02:00 +0200"]
    assert times("0 2,3 * * *", "Europe/Berlin", "2026-03-28T12:00", 2) == ["29 03:00 +0200", "30 02:00 +0200"]


def test_a_time_that_the_autumn_has_twice_comes_the_first_time_only() -> None:
    assert times("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00", 2) == ["25 02:30 +0200", "26 02:30 +0100"]
    # Also when it is looked for in the second of the two hours.
    second = datetime(2026, 10, 25, 2, 10, tzinfo=ZoneInfo("Europe/Berlin"), fold=1)
    following = next(Cron.of("30 2 * * *", "Europe/Berlin").after(int(second.timestamp())))
    assert datetime.fromtimestamp(following, UTC) == datetime(2026, 10, 26, 1, 30, tzinfo=UTC)


def test_every_so_many_minutes_goes_on_as_time_passes() -> None:
    assert times("*/30 * * * *", "Europe/Berlin", "2026-03-29T01:30") == [
        "29 03:00 +0200",
        "29 03:30 +0200",
        "29 04:00 +0200",
    ]
    assert times("*/30 * * * *", "Europe/Berlin", "2026-10-25T01:45", 5) == [
        "25 02:00 +0200",
        "25 02:30 +0200",
        "25 02:00 +0100",
        "25 02:30 +0100",
        "25 03:00 +0100",
    ]


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu", "UTC"])
@pytest.mark.parametrize("cron", ["30 2 * * *", "*/20 1-4 * * *", "0,30 1-3 * * *", "15 * * * SUN", "0 0 L * *"])
def test_the_newest_times_are_the_last_of_all_times(zone: str, cron: str) -> None:
    one, year = Cron.of(cron, zone), DUE + 365 * DAY
    everything = list(takewhile(lambda at: at <= year, one.after(DUE)))
    assert everything == sorted(set(everything))
    assert one.last(5, DUE, year) == everything[-5:]
    assert one.last(5, everything[-2], year) == everything[-2:]
    for at in everything[:: max(1, len(everything) // 50)][1:]:
        assert next(one.after(at - 1)) == at


# Real beats.


class Beats:
    """`celery -A ferrum beat` processes, all in one directory."""

    def __init__(self, url: str, home: Path) -> None:
        self._home = home
        self._environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("FERRUM_")},
            "FERRUM_REDIS_URL": url,
            "FERRUM_HOME": str(home),
            "FERRUM_ARTIFACTS": f"file://{home / 'artifacts'}",
        }
        self.running: list[Forked] = []

    def start(self) -> Forked:
        with (self._home / "beats.log").open("ab") as log:
            beat = Forked(
                ["-W", "ignore", "-m", "celery", "-A", "ferrum", "beat", "-l", "info"],
                env=self._environ,
                cwd=self._home,
                stdout=log,
            )
        self.running.append(beat)
        return beat

    def log(self) -> str:
        return (self._home / "beats.log").read_text()

    def stop(self) -> None:
        for beat in self.running:
            beat.terminate()
        for beat in self.running:
            try:
                beat.wait(60)
            except subprocess.TimeoutExpired:
                beat.kill()
                beat.wait()


@pytest.fixture
def beats(clean_redis: str, tmp_path: Path) -> Iterator[Beats]:
    some = Beats(clean_redis, tmp_path)
    try:
        yield some
    finally:
        some.stop()


def test_two_beats_that_are_killed_again_and_again_start_every_run_once(store: Schedules, beats: Beats) -> None:
    planted = int(store.now()) // DAY * DAY - 20 * DAY
    for number in range(4):
        add(store, "0 0 * * *", due=planted, name=f"daily-{number}", missed=Missed.ALL)
    beats.start()
    beats.start()
    for _ in range(2):
        before = len(started())
        eventually(lambda before=before: len(started()) > before or fired(store), every_s=0.005)
        for beat in beats.running[-2:]:
            beat.send_signal(signal.SIGKILL)
            beat.wait()
        beats.start()
        beats.start()
    eventually(lambda: fired(store))
    beats.stop()
    assert "Traceback" not in beats.log()
    wanted = [Cron.of(one.cron, "UTC").last(1000, planted, one.fired_at or 0) for one in store.all()]
    assert len(wanted[0]) in (21, 22)
    assert len(started()) == sum(map(len, wanted))
    assert len({one.run_id for one in store.all()}) == 4


def fired(store: Schedules) -> bool:
    now = store.now()
    return all((one.next_at or 0) > now for one in store.all())


def test_a_beat_hears_of_a_new_schedule_and_outlasts_a_redis_that_is_away(redis_url: str, tmp_path: Path) -> None:
    server = PrivateRedis(tmp_path / "own").start()
    beats = Beats(server.url, tmp_path)
    try:
        with opened(server.url) as store:
            beat = beats.start()
            eventually(store.beat_runs)
            add(store, name="before")
            eventually(lambda: store.find("before").run_id)
            server.kill()
            eventually(lambda: "Redis does not answer" in beats.log())
            server.start()
            add(store, name="after")
            eventually(lambda: store.find("after").run_id)
            assert beat.poll() is None
    finally:
        beats.stop()
        server.stop()


# The command line.


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ran(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process: its exit status, stdout and stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        status = cli.status_of(["schedule", *map(str, arguments)])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "nightly.yaml"
    path.write_text(yaml.safe_dump(WORKFLOW.to_dict()))
    return path


def test_a_schedule_is_added_seen_paused_resumed_and_deleted(store: Schedules, ran: Run, file: Path) -> None:
    status, out, err = ran("add", file, "--cron", "30 9 * * MON-FRI", "--timezone", "Europe/Berlin", "-i", "who=Ada")
    assert status == 0
    assert out.startswith("nightly is due at 20")
    assert "09:30:00 CE" in out
    assert "celery -A ferrum beat" in err
    assert "nightly  30 9 * * MON-FRI  Europe/Berlin  due 20" in ran("list")[1]
    shown = ran("show", "nightly")[1]
    assert "nightly 0" in shown
    assert shown.count(" 09:30:00 CE") == 3
    assert '"who": "Ada"' in shown
    assert "is paused" in ran("pause", "nightly")[1]
    assert "Europe/Berlin  paused" in ran("list")[1]
    assert "paused" in ran("show", "nightly")[1]
    assert ran("resume", "nightly")[1].startswith("nightly is due at 20")
    assert ran("delete", "nightly")[:2] == (0, "nightly is deleted\n")
    assert ran("list") == (0, "", "no schedules yet: add one with 'ferrum schedule add FILE --cron …'\n")


def test_every_command_prints_json(store: Schedules, ran: Run, file: Path) -> None:
    words = ("add", file, "--cron", "0 0 1 1 *", "-i", "who=Ada", "--name", "yearly", "--missed", "skip", "--json")
    added = json.loads(ran(*words)[1])
    assert (added["name"], added["workflow"], added["missed"], added["timezone"]) == (
        "yearly",
        "nightly",
        "skip",
        "UTC",
    )
    assert added["input"] == {"who": "Ada"}
    assert json.loads(ran("list", "--json")[1]) == [added]
    shown = json.loads(ran("show", "yearly", "--json")[1])
    assert shown["document"] == WORKFLOW.to_dict()
    assert shown["upcoming"][0] == added["next_at"]
    assert json.loads(ran("pause", "yearly", "--json")[1]) == {**added, "paused": True, "next_at": None}
    assert json.loads(ran("resume", "yearly", "--json")[1]) == added
    assert json.loads(ran("delete", "yearly", "--json")[1]) == added
    assert json.loads(ran("list", "--json")[1]) == []


def test_the_run_that_a_schedule_started_and_what_went_wrong_are_listed(store: Schedules, ran: Run) -> None:
    add(store)
    fire_due(store, DUE)
    assert started()[0] in ran("list")[1]
    assert "last      2026-01-15 00:00:00 UTC  run_" in ran("show", "nightly")[1]
    plant(store, store.find("nightly"), error="no such step type")
    assert "! no such step type" in ran("list")[1]
    assert "no such step type" in ran("show", "nightly")[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gone.yaml", "--cron", "* * * * *"], "gone.yaml: the file cannot be read"),
        (["FILE", "--cron", "* * * * *"], "input 'who' is missing"),
        (["FILE", "--cron", "* * * * *", "-i", "woh=Ada"], "there is no input 'woh' (did you mean 'who'?)"),
        (["FILE", "--cron", "0 0 31 2 *", "-i", "who=Ada"], "never comes"),
        (["FILE", "--cron", "* * * * *", "-i", "who=Ada", "--timezone", "Berlin"], "did you mean"),
        (["FILE", "--cron", "* * * * *", "-i", "who=Ada", "--missed", "twice"], "'twice' is not one of"),
        (["FILE", "-i", "who=Ada"], "Missing option '--cron'"),
    ],
)
def test_a_mistake_is_said_and_adds_nothing(
    store: Schedules, ran: Run, file: Path, words: list[str], said: str
) -> None:
    status, out, err = ran("add", *(file if word == "FILE" else word for word in words))
    assert (status, out) == (2, "")
    assert said in err
    assert store.all() == []


def test_no_schedule_is_left_where_it_was_deleted(store: Schedules, clean_redis: str) -> None:
    add(store)
    fire_due(store, DUE)
    store.delete("nightly")
    with redis.Redis.from_url(clean_redis, decode_responses=True) as client:
        assert client.keys("ferrum:{schedules}:*") == ["ferrum:{schedules}:beat"]
