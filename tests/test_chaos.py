"""The table of `python -m bench.chaos`: nothing is lost and nothing doubled, whatever the fault."""

from __future__ import annotations

import re

import pytest
from sizes import SIZE, sized

from bench import chaos

#: The others have tests of their own, with fewer runs.
ROWS = [row for row in chaos.ROWS if row not in chaos.FORGET] if SIZE > 1 else ["failover"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("row", ROWS)
def test_a_fault_loses_and_doubles_nothing(row: str, capsys: pytest.CaptureFixture[str]) -> None:
    runs = sized(4)
    assert chaos.main(["--rows", row, "--runs", str(runs), "--faults", "1", "--seconds", "2"])
    [_, line] = capsys.readouterr().out.splitlines()
    assert re.match(rf"{row} +{runs} +0 +0 +\d+$", line)


def test_a_row_that_there_is_not_is_told_with_those_that_there_are() -> None:
    with pytest.raises(SystemExit, match=r"no row has 'fialover' in its name; there are: kills, cuts, .*, failover"):
        chaos.main(["--rows", "fialover"])
