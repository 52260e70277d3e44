"""The picture shows what the files hold."""

from pathlib import Path

import matplotlib.pyplot as plt

from lightning_radam.monitor.incidents import IncidentLog
from lightning_radam.tracking.curves import _figure, draw_runs

ROWS = """step,radam/lr,radam/rect,train_loss,val_loss
0,0.1,0.0,2.0,
1,0.2,0.5,1.0,
1,,,,1.5
2,0.1,0.7,0.5,
"""


def runs(folder: Path) -> dict[str, Path]:
    """Two runs with the same rows, of which the second has an incident, and a remark."""
    for name in ("one", "two"):
        (folder / name).mkdir()
        (folder / name / "metrics.csv").write_text(ROWS)
    log = IncidentLog(folder / "two/incidents.jsonl")
    log.append({"step": 1, "severity": "warning"})
    log.append({"step": 2, "severity": "info"})
    return {name: folder / name for name in ("one", "two")}


def test_each_panel_has_each_runs_curve_and_the_incident(tmp_path: Path) -> None:
    figure = _figure(runs(tmp_path), "Test")
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles == ["learning rate", "rectification $r_t$", "training loss", "validation loss"]
    expected = [[0.1, 0.2, 0.1], [0.0, 0.5, 0.7], [2.0, 1.0, 0.5], [1.5]]
    for axis, values in zip(figure.axes, expected, strict=True):
        one, two, mark = axis.lines
        assert list(one.get_ydata()) == list(two.get_ydata()) == values
        assert list(mark.get_xdata()) == [1, 1]
        assert mark.get_color() == two.get_color()
    assert figure.get_suptitle() == "Test (1 incident, each a dotted line)"
    plt.close(figure)


def test_it_writes_the_file(tmp_path: Path) -> None:
    draw_runs(runs(tmp_path), tmp_path / "curves.png", "Test")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
