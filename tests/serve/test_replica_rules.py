"""Several servers behind one address, part by part: ids, lists, choices, processes."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time

import httpx
import pytest

from sora_engine.errors import ServeError
from sora_engine.serve.ids import moment, new_id, read_id
from sora_engine.serve.load import Load
from sora_engine.serve.replicas import children as children_module
from sora_engine.serve.replicas import homes as homes_module
from sora_engine.serve.replicas.children import Children, Place, places_in, share_of
from sora_engine.serve.replicas.homes import Home, Homes, shortest
from sora_engine.serve.replicas.merging import merged_list, merged_metrics
from sora_engine.serve.replicas.proxy import Proxy

# Ids.


def test_an_id_tells_its_home_and_its_moment():
    now = moment(1_790_000_000.123_456_7)
    name = new_id("r7", now)
    assert len(name) == len("video_r7_") + 26
    assert read_id(name) == ("r7", now)
    later = new_id("r7", moment(now + 2e-6))
    assert name < later  # as texts too
    assert len({new_id("0", now) for _ in range(1000)}) == 1000
    for odd in ("", "video_0_", "image_" + name[6:], name + "0", name.upper(), name[:-1] + "-"):
        assert read_id(odd) is None


def test_pages_of_several_servers_are_pages_of_one_list():
    """Against a plain sort of all ids, for every size of page and both orders."""
    rng = random.Random(3)
    own: dict[str, list[str]] = {"a": [], "b": [], "c": []}
    for i in range(40):
        home = rng.choice("abc")
        own[home].append(new_id(home, moment(1.8e9 + i // 3 * 1e-6)))  # three of one microsecond
    everything = sorted((read_id(name)[1], read_id(name)[0]) for home in own for name in own[home])

    def page(home: str, after: str | None, limit: int, newest: bool) -> dict:
        """What `/v1/videos` of one server answers, by its rule."""
        rows = [(read_id(name)[1], home, i, name) for i, name in enumerate(own[home])]
        if after in own[home]:
            place = next(row[:3] for row in rows if row[3] == after)
        elif after is not None:
            place = (*read_id(after)[::-1], -1 if read_id(after)[0] < home else 99)
        rows.sort(reverse=newest)
        if after is not None:
            rows = [row for row in rows if (row[:3] < place if newest else row[:3] > place)]
        data = [{"id": row[3], "created_at": int(row[0])} for row in rows]
        return {"data": data[:limit], "has_more": len(data) > limit}

    for newest in (False, True):
        for limit in (1, 2, 7, 100):
            got: list[str] = []
            after = None
            while True:
                told = merged_list(
                    [page(h, after, limit, newest) for h in own], limit, newest=newest
                )
                got += [video["id"] for video in told["data"]]
                if not told["has_more"]:
                    break
                assert len(told["data"]) == limit
                after = told["last_id"]
            assert len(set(got)) == len(got) == 40
            keys = [(read_id(name)[1], read_id(name)[0]) for name in got]
            assert keys == (everything[::-1] if newest else everything)


def test_an_empty_page_and_a_missing_server_are_told():
    none = {"data": [], "has_more": False}
    told = merged_list([none, none], 20, newest=True)
    assert (told["first_id"], told["has_more"]) == (None, False)
    assert "missing_replicas" not in told
    assert merged_list([none], 20, newest=True, missing=["b"])["missing_replicas"] == ["b"]
    assert merged_list([{"data": [], "has_more": True}], 0, newest=True)["has_more"]


# Who is next.


def homes_with(*loads: Load) -> list[Home]:
    return [
        Home(str(i), httpx.MockTransport(lambda _: httpx.Response(200)), "ready", load)
        for i, load in enumerate(loads)
    ]


def test_work_goes_where_the_fewest_tokens_wait():
    homes = homes_with(Load(9, 1, 50, 60), Load(0, 1, 400, 70), Load(0, 2, 51, 70))
    assert {shortest(homes).name for _ in range(20)} == {"0"}
    # What is on its way counts as jobs of the mean size: 501 tokens of 13 jobs.
    homes[0].sends()
    assert {shortest(homes).name for _ in range(20)} == {"2"}
    full = homes_with(Load(64, 16, 10, 0), Load(64, 15, 900, 1))
    assert shortest(full).name == "1"
    full[1].sends()
    assert shortest(full).name == "0"  # none has room: it will say so
    assert {shortest(homes_with(Load(), Load())).name for _ in range(60)} == {"0", "1"}


def test_a_burst_is_shared_out_before_any_of_it_is_counted():
    homes = homes_with(*[Load(room=80)] * 4)
    for _ in range(60):
        shortest(homes).sends()
    assert [len(home.sent) for home in homes] == [15] * 4


def test_clients_at_once_are_shared_out_evenly():
    """Whatever reports are under way meanwhile: no job counts twice or not at all for long."""
    uneven = [abs(asyncio.run(shares_of_two(random.Random(seed)))) for seed in range(20)]
    assert sum(uneven) / len(uneven) < 0.3, uneven


async def shares_of_two(rng: random.Random) -> int:
    """How many more of 24 jobs of 8 clients one of two servers has."""
    jobs = {"0": 0, "1": 0}

    def server(name: str) -> Home:
        async def answer(request: httpx.Request) -> httpx.Response:
            await asyncio.sleep(rng.uniform(0.001, 0.02))
            if request.method == "POST":
                jobs[name] += 1
            load = Load(jobs[name], 0, 1000 * jobs[name], 80, jobs[name])
            await asyncio.sleep(rng.uniform(0.001, 0.01))
            return httpx.Response(200, json={"status": "ready", "load": load.to_dict()})

        return Home(name, httpx.MockTransport(answer), "ready", Load(room=80))

    proxy = Proxy(Homes([server("0"), server("1")]))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(proxy), base_url="http://replicas"
    ) as http:
        clients = asyncio.Semaphore(8)

        async def create() -> None:
            async with clients:
                assert (await http.post("/v1/videos", json={})).status_code == 200

        await asyncio.gather(*(create() for _ in range(24)))
        await asyncio.sleep(0.1)
    return jobs["0"] - jobs["1"]


def test_a_video_that_is_made_at_once_counts_once():
    """Its request is under way for as long as its job, and its server has counted it long ago."""
    home = Home(
        "0",
        httpx.MockTransport(
            lambda _: httpx.Response(
                200, json={"status": "ready", "load": {"running": 1, "tokens": 9}}
            )
        ),
        "ready",
    )
    home.sends()
    asyncio.run(home.ask())
    assert len(home.sent) == 1  # it may not have been read yet
    home.sent = dict.fromkeys(home.sent, time.monotonic() - 0.01)  # COUNTED_S later
    asyncio.run(home.ask())
    assert (len(home.sent), home.load.tokens) == (0, 9)


def test_a_key_has_one_server_and_few_move_where_one_is_added():
    homes = Homes(homes_with(*[Load()] * 4))
    keys = [f"key-{i}".encode() for i in range(2000)]
    before = {key: homes.for_key(key).name for key in keys}
    assert before == {key: homes.for_key(key).name for key in keys}
    assert min(list(before.values()).count(str(i)) for i in range(4)) > 400  # 500 each
    more = Homes(homes_with(*[Load()] * 5))
    moved = [key for key in keys if more.for_key(key).name != before[key]]
    assert {more.for_key(key).name for key in moved} == {"4"}
    assert 300 < len(moved) < 500  # a fifth


def test_a_server_is_down_by_thresholds():
    answers: list[object] = []

    def answer(_request: httpx.Request) -> httpx.Response:
        given = answers.pop(0)
        if isinstance(given, Exception):
            raise given
        assert isinstance(given, int)
        state = {200: "ready", 503: "draining"}[given]
        return httpx.Response(given, json={"status": state, "load": {"waiting": 2}})

    home = Home("0", httpx.MockTransport(answer))

    def after(*given: object) -> str:
        answers.extend(given)
        for _ in given:
            asyncio.run(home.ask())
        return home.state

    slow, refused = httpx.ReadTimeout("slow"), httpx.ConnectError("refused")
    assert after(200) == "down"  # not at the first answer
    assert after(200) == "ready"
    assert home.load.waiting == 2
    assert after(slow, slow) == "ready"
    assert after(200, slow, slow) == "ready"  # it counts anew
    assert after(slow) == "down"
    assert after(200, 503) == "draining"
    assert after(200) == "ready"
    assert after(refused) == "down"  # nobody listens
    assert after(200, slow, 200) == "down"
    assert after(200) == "ready"


def asked_of_one(*answers: httpx.Response | Exception, method: str = "GET", **options):
    """What a client is told where its server gives these answers, one after the other."""
    left = list(answers)

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/ready":
            return httpx.Response(200, json={"status": "ready"})
        given = left.pop(0)
        if isinstance(given, Exception):
            raise given
        return given

    async def ask() -> httpx.Response:
        home = Home("0", httpx.MockTransport(answer), "ready")
        homes = Homes([home])
        await homes.start()
        try:
            transport = httpx.ASGITransport(app=Proxy(homes))
            async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
                return await client.request(method, "/v1/videos/video_0_" + "a" * 26, **options)
        finally:
            await homes.stop()

    told = asyncio.run(ask())
    assert not left
    return told


def test_what_only_reads_is_asked_again():
    done = httpx.Response(200, json={"id": "x"})
    loading = httpx.Response(503, headers={"x-sora-state": "loading"})
    assert asked_of_one(loading, done).json() == {"id": "x"}
    assert asked_of_one(httpx.ReadError("ended"), done).status_code == 200
    assert asked_of_one(httpx.ConnectError("none"), loading, done).status_code == 200
    full = asked_of_one(httpx.Response(503, json={"error": {"code": "disk_full"}}))
    assert full.json()["error"]["code"] == "disk_full"


def test_what_may_have_been_done_is_not():
    ended = httpx.ReadError("ended")
    told = asked_of_one(ended, method="DELETE")
    assert (told.status_code, told.json()["error"]["code"]) == (503, "replica_lost")
    assert told.headers["x-should-retry"] == "false"
    loading = httpx.Response(503, headers={"x-sora-state": "loading"}, json={})
    assert asked_of_one(loading, httpx.Response(200), method="DELETE").status_code == 200


def test_a_server_that_stays_away_is_told_of(monkeypatch):
    monkeypatch.setattr(homes_module, "HOLD_S", 0.2)
    monkeypatch.setattr(homes_module, "POLL_S", 5.0)
    told = asked_of_one(httpx.ConnectError("none"))
    assert (told.status_code, told.json()["error"]["code"]) == (503, "replica_down")
    assert told.headers["retry-after"] == "2"


# The processes.


def test_places_lose_no_jobs_of_before(tmp_path):
    assert [place.name for place in places_in(tmp_path, 3, tmp_path)] == ["0", "1", "2"]
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "jobs.sqlite").touch()
    places_in(tmp_path, 3, tmp_path)
    with pytest.raises(ServeError, match="has jobs of a replica 2, which none of 2 would do"):
        places_in(tmp_path, 2, tmp_path)
    (tmp_path / "jobs.sqlite").touch()
    with pytest.raises(ServeError, match="is that of one server"):
        places_in(tmp_path, 3, tmp_path)


def test_threads_and_devices_are_shared_out():
    def shares(count, devices, **environment):
        return [share_of(i, count, 8, devices, environment) for i in range(count)]

    assert shares(3, []) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert shares(2, [], OMP_NUM_THREADS="1") == [{}] * 2
    own = [share["CUDA_VISIBLE_DEVICES"] for share in shares(2, ["0", "1", "2", "3"])]
    assert own == ["0,1", "2,3"]
    own = [share["CUDA_VISIBLE_DEVICES"] for share in shares(3, ["a", "b"])]
    assert own == ["a", "b", "a"]
    own = [share["CUDA_VISIBLE_DEVICES"] for share in shares(3, ["0", "1", "2", "3"])]
    assert sorted(",".join(own).split(",")) == ["0", "1", "2", "3"]


class Script:
    """A process that ends as it is told."""

    def __init__(self, code: int | None) -> None:
        self.code, self.signals = code, []

    def poll(self) -> int | None:
        return self.code

    def send_signal(self, number: int) -> None:
        self.signals.append(number)
        self.code = 0


def watched(made: Children) -> None:
    """Until all have ended for good; TimeoutError where they do not."""
    asyncio.run(asyncio.wait_for(made.watch(), 20))


def test_a_server_that_ends_is_started_anew_ever_later(tmp_path, monkeypatch):
    monkeypatch.setattr(children_module, "BACK_OFF_S", (0.1, 0.4))
    began: list[float] = []

    def spawn(_place: Place) -> Script:
        began.append(time.monotonic())
        return Script(-9 if len(began) < 5 else None)

    made = Children([Place("0", tmp_path, tmp_path)], spawn)
    threading.Timer(2.0, lambda: made.stop(15)).start()
    watched(made)
    pauses = [after - before for before, after in itertools.pairwise(began)]
    assert len(began) == 5
    for pause, least in zip(pauses, (0.1, 0.2, 0.4, 0.4), strict=True):
        assert least <= pause < least + 0.3  # it looks every 0.05 s, on a busy machine
    assert (made.restarts, made.code) == ({"0": 4}, 0)


def test_a_server_that_cannot_start_ends_them_all(tmp_path):
    processes = {"0": Script(None), "1": Script(2)}
    made = Children(
        [Place(name, tmp_path, tmp_path) for name in processes], lambda place: processes[place.name]
    )
    watched(made)
    assert (made.code, processes["0"].signals, made.restarts["1"]) == (2, [15], 0)


def test_figures_keep_their_kinds():
    text = (
        '# HELP a_total jobs\n# TYPE a_total counter\na_total{code="x"} 3.0\n'
        '# HELP b seconds\n# TYPE b histogram\nb_bucket{le="1.0"} 2.0\nb_bucket{le="+Inf"} 4.0\n'
        "b_count 4.0\nb_sum 9.0\n"
    )
    told = merged_metrics({"0": text, "1": text}, {"sora_replica_up": {"0": 1.0}}).decode()
    assert "# TYPE a_total counter" in told
    assert "# TYPE b histogram" in told
    assert told.count("# TYPE b histogram") == 1
    assert 'a_total{code="x",replica="1"} 3.0' in told
    assert 'b_bucket{le="+Inf",replica="0"} 4.0' in told
