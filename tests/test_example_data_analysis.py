"""`examples/data_analysis.yaml`: a table in, an answer and a chart out, by a program that a model wrote."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from fleet import Fleet, ended, happened
from sandboxes import needs_sandbox

import ferrum
from ferrum.artifacts import Ref, process_artifacts
from ferrum.results import RunStatus
from ferrum.testing.model_server import ModelServer

pytestmark = needs_sandbox

EXAMPLE = Path(__file__).parent.parent / "examples" / "data_analysis.yaml"
TABLE = """region,product,sold
north,tea,3
north,coffee,8
south,tea,9
south,coffee,2
south,tea,4
"""
WRONG = """
import pandas
pandas.read_csv("data.csv").groupby("place")
"""
RIGHT = """
import json
import matplotlib.pyplot as plt
import pandas

table = pandas.read_csv("data.csv").groupby(["region", "product"])["sold"].sum().unstack()
table.plot.bar(title="Sold")
plt.savefig("chart.png", dpi=50)
json.dump(table.idxmax(axis=1).to_dict(), open("output.json", "w"))
"""


@pytest.fixture(scope="module")
def fleet(redis_url: str, tmp_path_factory: pytest.TempPathFactory, runtimes: Path) -> Iterator[Fleet]:
    """A worker and a model whose first program is wrong, and which gets it right when it is told why."""
    rules = [
        {"match": {"contains": "KeyError: 'place'"}, "json": {"code": RIGHT}},
        {"match": {"contains": "The table begins: region,product,sold"}, "json": {"code": WRONG}},
    ]
    script = yaml.safe_load((EXAMPLE.parent / "stub_script.yaml").read_text(encoding="utf-8"))
    with ModelServer({"rules": [*rules, *script["rules"]]}) as models:
        fleet = Fleet(
            redis_url, tmp_path_factory.mktemp("analysis"), {**models.environ, "FERRUM_RUNTIMES": str(runtimes)}
        )
        try:
            fleet.start()
            yield fleet
        finally:
            fleet.stop()


@pytest.mark.timeout(240)
def test_a_program_that_fails_is_written_again_and_its_chart_is_an_artifact(fleet: Fleet) -> None:
    run_id = ferrum.submit(EXAMPLE, {"csv": TABLE})
    view = ended(run_id, 200)
    assert view.status is RunStatus.COMPLETED, view
    outputs: Any = view.outputs
    assert outputs["answer"] == {"north": "coffee", "south": "tea"}
    assert [event.step for event in happened(run_id, "step.completed") if event.step.endswith(".done")] == [
        "work.1.done",
        "work.2.done",
    ]
    chart = outputs["chart"]
    assert (chart["name"], chart["media_type"]) == ("chart.png", "image/png")
    data = process_artifacts().get(Ref(digest=chart["artifact"], size=0, media_type=""))
    _is_a_chart(data)


@pytest.mark.timeout(240)
def test_the_scripted_model_of_the_examples_has_a_program_for_a_table_of_ones_own(fleet: Fleet) -> None:
    table = TABLE.replace("region,product", "place,what")
    view = ended(ferrum.submit(EXAMPLE, {"csv": table}), 200)
    assert view.status is RunStatus.COMPLETED, view
    outputs: Any = view.outputs
    assert outputs["answer"] == {"north": "coffee", "south": "tea"}
    _is_a_chart(process_artifacts().get(Ref(digest=outputs["chart"]["artifact"], size=0, media_type="")))


def _is_a_chart(png: bytes) -> None:
    """Something is drawn: bars in two colours on white."""
    from matplotlib.image import imread

    pixels = imread(BytesIO(png), format="png")
    height, width = pixels.shape[:2]
    assert (width, height) == (320, 240)
    colours = {tuple(round(float(part), 1) for part in pixel[:3]) for row in pixels for pixel in row}
    assert {(1.0, 1.0, 1.0), (0.1, 0.5, 0.7), (1.0, 0.5, 0.1)} <= colours
