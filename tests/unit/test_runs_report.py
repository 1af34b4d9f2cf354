"""`megacpp-stp runs report`: what it shows, refuses and leaves out aloud, and that it overwrites nothing."""

import json
import math
import sys

import pytest

from megacpp_stp.errors import UserError
from megacpp_stp.runs.compare import compare_runs
from megacpp_stp.runs.files import read_json, write_json
from megacpp_stp.runs.invalid import invalidate
from megacpp_stp.runs.report import build_report
from megacpp_stp.runs.report_curves import difference_plot, loss_plot, machine_plot, thinning_note
from megacpp_stp.runs.report_depth import depth_plot, depths_of
from megacpp_stp.runs.report_files import write_report
from megacpp_stp.runs.report_series import MOST_POINTS, bin_size, thin
from megacpp_stp.runs.report_tables import differences_table, facts_table, runs_table
from megacpp_stp.runs.what_ran import NONE
from megacpp_stp.runs.window import parse_window
from tests.unit.made_runs import GATE, ITERATIONS, SUBSTRATE, answer, loss_of, make_run, noise, refused

WITHOUT = "stp=null"


@pytest.fixture
def pair(tmp_path):
    """A run without STP, and one that is better once its gate is open, the more the longer."""
    base = make_run(tmp_path / "base", WITHOUT, validation={20: 4.5, 40: 3.0})
    other = make_run(tmp_path / "stp", loss=lambda i: loss_of(i) - 0.01 * max(i - GATE, 0) + 0.01 * noise(i, 9))
    return [base, other]


def edit_records(run, change):
    path = run / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        change(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_it_says_what_compare_says(pair):
    report, found = build_report(pair), compare_runs(pair)
    assert report.comparison == found
    assert (report.title, report.window, report.results) == (found.title, found.window, found.runs)
    assert not report.is_loud
    (pairing,) = report.pairings
    differences = report.differences(pairing)
    assert sorted(differences) == list(range(1, ITERATIONS + 1))  # those outside the window are drawn, too
    inside = [differences[i] for i in found.window.iterations]
    assert math.fsum(inside) / len(inside) == pytest.approx(found.pairs[0].difference)
    assert f"B minus A {found.pairs[0].difference:+.4g}".replace("-", "\N{MINUS SIGN}") in difference_plot(report).alt


def test_speed_is_in_the_table_where_the_runs_have_it(pair):
    assert not {"MFU", "goodput"} & set(runs_table(build_report(pair)).columns)

    def faster(record):
        late = record["iteration"] > GATE
        record.update(tflops_per_gpu=2000.0 if late else 1.0, mfu=None, goodput=0.5 + record["iteration"] / 1000)

    edit_records(pair[1], faster)
    table = runs_table(build_report(pair))
    start = table.columns.index("tokens/s")
    assert table.columns[start : start + 4] == ("tokens/s", "TFLOP/s a GPU", "goodput", "peak memory")
    assert [row[start + 1 : start + 3] for row in table.rows] == [(NONE, NONE), ("2,000", "54.0%")]
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_seeds_are_pooled_as_compare_does(tmp_path):
    for seed in (1, 2, 3):
        make_run(tmp_path / f"a{seed}", WITHOUT, f"training.seed={seed}", loss=lambda i, s=seed: loss_of(i, s))
        make_run(
            tmp_path / f"b{seed}", f"training.seed={seed}", loss=lambda i, s=seed: loss_of(i, s) - 0.1 * s * (i > GATE)
        )
    make_run(tmp_path / "b4", "training.seed=4")
    runs = [tmp_path / name for name in ("a1", "b1", "a2", "b2", "a3", "b3", "b4")]
    report = build_report(runs)
    assert [[run.name for run in arm.runs] for arm in report.arms] == [["a1", "a2", "a3"], ["b1", "b2", "b3"]]
    assert report.differences(report.pairings[0])[ITERATIONS] == pytest.approx(-0.2)
    assert report.differences(report.pairings[0])[1] == pytest.approx(0.0)
    assert report.mean_of(report.arms[0])[7] == pytest.approx(sum(loss_of(7, seed) for seed in (1, 2, 3)) / 3)
    assert [row[1] for row in runs_table(report).rows] == ["a1", "a2", "a3", "b1", "b2", "b3"]
    assert "b4 (seed 4) has no partner of its seed: left out" in report.comparison.notes
    assert "Thin lines are single seeds" in loss_plot(report).caption


def test_the_table_of_runs(pair):
    write_json(pair[1] / "exit.json", {"status": 0, "signal": None})
    base, other = runs_table(build_report(pair)).rows
    mean = math.fsum(map(loss_of, range(GATE + 1, ITERATIONS + 1))) / (ITERATIONS - GATE)
    best = min(range(GATE + 1, ITERATIONS + 1), key=loss_of)
    assert base[:7] == ("A", "base", "1234", "none", NONE, f"{mean:.5g}", f"{loss_of(best):.5g} @ {best}")
    assert base[8:] == ("3 @ 40", "1,026", f"{1e6 / 2**30:,.2f} GiB", "complete")
    assert other[2:5] == ("1234", "0.02 from 11", "30 active")
    assert other[-1] == "complete, exit 0"
    make_run(pair[0].with_name("short"), complete=False, iterations=20)
    assert runs_table(build_report([pair[0].with_name("short")])).rows[0][-1] == "incomplete: killed by a test"


def test_what_differs_has_the_groups_of_diff(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", "stp.weight=0.5")
    other = {**SUBSTRATE, "packages": {"torch": "3.0.0"}}
    make_run(tmp_path / "c", "stp.weight=0.5", "optimizer.lr=2.0e-3", substrate=other)
    report = build_report([tmp_path / name for name in "abc"], allow_unlike=True)
    assert report.is_loud
    assert report.title.startswith("UNLIKE RUNS (substrate): ")
    assert differences_table(report).groups == (
        ("optimisation", (("optimizer.lr", "0.003", "0.003", "0.002"),)),
        ("STP", (("stp.weight", "0.02", "0.5", "0.5"),)),
        (
            "substrate",
            (
                ("substrate.packages.numpy", "2.5.5", "2.5.5", NONE),
                ("substrate.packages.torch", "2.15.0", "2.15.0", "3.0.0"),
            ),
        ),
    )
    facts = {row[0]: row[1:] for row in facts_table(report).rows}
    assert facts["pattern"] == ("AEMEAEMEAEMR",) * 3
    assert facts["software"][2] == "torch 3.0.0"


def test_what_compare_refuses_is_refused_in_its_words(pair, tmp_path):
    out = tmp_path / "report.html"
    other = make_run(tmp_path / "else", substrate={**SUBSTRATE, "python": "3.13.0"})
    late = make_run(tmp_path / "late", "training.iterations=200", "stp.start_step=100")
    nowhere = tmp_path / "nowhere"
    for words in (
        (pair[0], other),
        (pair[0], late),
        (*pair, "--window", "1:5"),
        (*pair, "--window", "5:1"),
        (*pair, "--window", "90:"),
        (pair[0], pair[0]),
        (pair[0], nowhere),
    ):
        assert str(refused("report", *words, "--output", out)) == str(refused("compare", *words))
    assert not out.exists()
    assert build_report([pair[0], other], allow_unlike=True).title.startswith("UNLIKE RUNS (substrate)")
    wanted = build_report(pair, window=parse_window("5:15"))
    assert (wanted.window.first, wanted.window.last, wanted.window.why) == (5, 15, "as asked for")


def test_invalid_runs_are_left_out_and_named(pair, tmp_path):
    worse = make_run(tmp_path / "worse", "stp.weight=0.5")
    invalidate(pair[0], "read the wrong data")
    report = build_report([*pair, worse])
    (left_out,) = report.invalid
    assert (left_out.name, left_out.reason, left_out.was_base) == ("base", "read the wrong data", True)
    assert [run.name for run in report.runs] == ["stp", "worse"]
    alone = build_report(pair)
    assert alone.comparison is None
    assert [run.name for run in alone.runs] == ["stp"]
    invalidate(pair[1], "so did this")
    assert "is INVALID: read the wrong data" in str(refused("report", *pair, "--output", tmp_path / "x.html"))


def test_one_run_has_no_comparison(pair, tmp_path):
    report = build_report(pair[1:])
    assert report.title == "nam56r-tiny: one run, stp"
    assert (report.window.first, report.window.last) == (GATE + 1, ITERATIONS)
    assert report.results[0].regimes == {"active": ITERATIONS - GATE}
    # It says of the run what a comparison over the same window says of it.
    (_, compared) = compare_runs(pair).runs
    (single,) = report.results
    for name in ("mean", "best", "last", "best_validation", "gate", "stp_weight", "seed", "status"):
        assert getattr(single, name) == getattr(compared, name)
    assert build_report(pair[:1]).window.why == "all of the run"
    early = make_run(tmp_path / "early", iterations=5, complete=False)
    assert (build_report([early]).window.first, build_report([early]).window.last) == (1, 5)
    assert build_report(pair[1:], window=parse_window("3:4")).window.iterations == (3, 4)


def test_bits_a_byte(pair):
    report = build_report(pair, metric="bits_per_byte")
    assert report.results[0].mean == pytest.approx(build_report(pair).results[0].mean / 3)
    assert "bits a byte" in loss_plot(report).alt
    assert report.evaluations[report.runs[0]] == ((20, 1.5), (40, 1.0))
    with pytest.raises(UserError, match="is no loss"):
        build_report(pair, metric="tokens_per_s")


def test_straightness_by_layer(pair):
    def change(record):
        i = record["iteration"]
        record["stp_loss_by_tap"] = {"final-norm": 0.5, "12": None if i < 5 else 0.75, "6": 0.01 * i}

    edit_records(pair[1], change)
    report = build_report(pair)
    (depth,) = depths_of(report)
    assert depth.arm is report.arms[1]
    assert depth.labels == ["6 E", "12 R", "final-norm"]
    assert depth.rows[0][39] == pytest.approx(0.6)
    assert [math.isnan(value) for value in depth.rows[1]] == [True] * 4 + [False] * 36
    plot = depth_plot(report)
    assert "6 E 0.99 to 0.60, 12 R 0.25 to 0.25, final-norm 0.50 to 0.50" in plot.alt
    assert "nothing is measured in A" in plot.caption
    (pair[1] / "plan.json").unlink()
    assert depths_of(build_report(pair))[0].labels == ["6", "12", "final-norm"]
    assert depth_plot(build_report(pair[:1])) is None


def test_straightness_of_an_arm_is_the_mean_of_its_seeds(tmp_path):
    for seed in (1, 2):
        for name, weight in (("a", 0.02), ("b", 0.5)):
            run = make_run(tmp_path / f"{name}{seed}", f"training.seed={seed}", f"stp.weight={weight}")
            edit_records(run, lambda record, s=seed: record.update(stp_loss_by_tap={"6": 0.25 * s}))
    depths = depths_of(build_report([tmp_path / name for name in ("a1", "a2", "b1", "b2")]))
    assert [depth.rows[0][0] for depth in depths] == [pytest.approx(0.625)] * 2


@pytest.mark.parametrize("value", [2.5, -0.5, "x", True])
def test_what_is_no_stp_loss_is_refused(pair, value):
    edit_records(pair[1], lambda record: record.update(stp_loss_by_tap={"6": value}))
    with pytest.raises(UserError, match="is no STP loss"):
        depths_of(build_report(pair))


def test_no_words_of_a_narrow_heat_map_touch(tmp_path):
    from megacpp_stp.runs.report_ink import _drawn, _style

    run = make_run(tmp_path / "run")
    edit_records(run, lambda record: record.update(stp_loss_by_tap={"6": 1.2, "12": 1.75}))
    plot = depth_plot(build_report([run]))
    with _style():
        figure = _drawn(plot, narrow=True)
        figure.draw_without_rendering()
        panel, bar = figure.axes
        low, high = bar.get_xlim()
        numbers = [label for label in bar.get_xticklabels() if low <= label.get_position()[0] <= high]
        words = [*numbers, panel.xaxis.label, bar.xaxis.label, bar.title]
        boxes = [word.get_window_extent() for word in words if word.get_text()]
    assert len(boxes) >= 4
    assert not [(a, b) for place, a in enumerate(boxes) for b in boxes[:place] if a.overlaps(b)]


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("evaluated", [{}, {5: 4.0}])
def test_curves_keep_their_room_where_nothing_was_evaluated(tmp_path, evaluated, narrow):
    """A run that was killed before its first evaluation, or a window without one."""
    runs = [
        make_run(tmp_path / name, *settings, validation=evaluated)
        for name, settings in (("a", ["stp=null"]), ("b", []))
    ]
    figure = pytest.importorskip("matplotlib.figure").Figure(layout="constrained")
    loss_plot(build_report(runs)).draw(figure, narrow)
    figure.draw_without_rendering()
    widths = [axes.get_position().width for axes in figure.axes]
    assert min(widths) > (0.8 if narrow else 0.25)


def test_window_gates_and_all_evaluations_are_where_they_belong(tmp_path):
    a = make_run(tmp_path / "a", "stp=null", validation={20: 4.0, 40: 3.0})
    b = make_run(tmp_path / "b", validation={20: 4.5})
    late = make_run(tmp_path / "c", f"stp.start_step={GATE + 10}", validation={})
    receipt = read_json(a / "receipt.json")
    again = {"iteration": 40, "lm_loss": 2.0, "bits_per_byte": 1.0}  # of the end of the run
    write_json(a / "receipt.json", {**receipt, "validation": [*receipt["validation"], again]})
    figure = pytest.importorskip("matplotlib.figure").Figure(layout="constrained")
    loss_plot(build_report([a, b, late])).draw(figure, False)
    whole = next(axes for axes in figure.axes if axes.get_title() == "lm loss, nats a token")
    rings = [list(zip(*line.get_data(), strict=True)) for line in whole.lines if line.get_marker() == "o"]
    assert rings == [[(20, 4.0), (40, 3.0), (40, 2.0)], [(20, 4.5)]]
    upright = [line.get_xdata()[0] for line in whole.lines if list(line.get_ydata()) == [0, 1]]
    assert upright == [GATE + 0.5, GATE + 10.5]  # between the last iteration before and the first with the term
    (shade,) = whole.patches
    assert (shade.get_x(), shade.get_x() + shade.get_width()) == (GATE + 10.5, ITERATIONS + 0.5)
    strip = next(axes for axes in figure.axes if [text.get_text() for text in axes.texts])
    bars = [(bar.get_paths()[0].get_extents().intervalx.tolist(), bar.get_alpha()) for bar in strip.collections]
    active = [(ends, alpha) for ends, alpha in bars if alpha == 1.0]
    assert active == [([GATE + 0.5, 40.5], 1.0), ([GATE + 10.5, 40.5], 1.0)]
    assert [ends for ends, alpha in bars if alpha == 0.16] == [[0.5, GATE + 0.5], [0.5, GATE + 10.5]]


@pytest.mark.parametrize("name", ["lm_loss", "tokens_per_s", "peak_memory_bytes"])
def test_what_cannot_be_drawn_is_refused(pair, name):
    edit_records(pair[1], lambda record: record.update({name: 1e30} if record["iteration"] < ITERATIONS else {}))
    with pytest.raises(UserError, match=f"{name} 1e\\+30 of iteration 1 is nothing that a run measures"):
        report = build_report(pair)
        _ = report.values, machine_plot(report)


def test_an_evaluation_that_cannot_be_drawn_is_refused(pair):
    receipt = read_json(pair[1] / "receipt.json")
    receipt["validation"][0]["lm_loss"] = 1e300
    write_json(pair[1] / "receipt.json", receipt)
    with pytest.raises(UserError, match="nothing that a run measures"):
        loss_plot(build_report(pair))


def test_bins():
    assert [bin_size(last, most=10) for last in (1, 10, 11, 20, 21)] == [1, 1, 2, 2, 3]
    found = thin({1: 4.0, 2: 2.0, 3: 9.0, 6: 1.0, 7: 5.0}, size=3)  # 4 to 6 has one value; 8 and 9 have none
    assert found.x == (2.0, 6.0, 7.0)
    assert found.mean == (5.0, 1.0, 5.0)
    assert found.low == (2.0, 1.0, 5.0)
    assert found.high == (9.0, 1.0, 5.0)
    same = thin({i: float(i) for i in range(1, 9)}, size=1)
    assert same.mean == same.low == same.high == same.x == tuple(map(float, range(1, 9)))


def test_long_runs_are_thinned_and_the_page_says_so(tmp_path):
    count = 2 * MOST_POINTS
    run = make_run(tmp_path / "long", f"training.iterations={count}", iterations=count)
    report = build_report([run])
    assert "each point is the mean of 2 iterations" in loss_plot(report).caption
    assert "(2 in the window alone)" in loss_plot(report).caption
    assert "each point is the mean of 2 iterations" in machine_plot(report).caption
    assert "Each column is the mean of 8 iterations" in depth_plot(report).caption
    assert thinning_note(build_report([make_run(tmp_path / "short")])) == ""


def test_nothing_is_ever_overwritten(pair, tmp_path):
    out, folder = tmp_path / "report.html", tmp_path / "png"
    out.write_text("mine")
    assert "exists already" in str(refused("report", *pair, "--output", out))
    assert out.read_text() == "mine"
    out.unlink()
    folder.mkdir()
    (folder / "machine.png").symlink_to(tmp_path / "nowhere")
    assert refused("report", *pair, "--output", out, "--png", folder).field == "--png"
    # Where a file appears in between, none of the others is left either.
    with pytest.raises(UserError, match="exists already"):
        write_report(build_report(pair[:1]), output=out, directory=folder)
    assert sorted(path.name for path in folder.iterdir()) == ["machine.png"]
    assert not out.exists()
    assert refused("report", pair[0], "--output", tmp_path / "no" / "x.html").field == "--output"
    assert "cannot be written" in str(refused("report", pair[0], "--output", tmp_path / "no" / "x.html"))


def test_the_command_writes_the_page_and_the_pictures(pair, tmp_path):
    before = {path: path.read_bytes() for run in pair for path in run.iterdir()}
    bad = make_run(tmp_path / "bad", "stp.weight=0.7")
    invalidate(bad, "wrong data")
    said = answer("report", *pair, bad, "--output", tmp_path / "x.html", "--png", tmp_path / "deep" / "png")
    assert "INVALID: bad: wrong data" in said
    assert "controlled comparison: lm_loss, iterations 11 to 40" in said
    pictures = sorted((tmp_path / "deep" / "png").iterdir())
    assert [path.name for path in pictures] == ["difference.png", "loss.png", "machine.png", "straightness.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert (tmp_path / "x.html").read_text().startswith("<!DOCTYPE html>")
    assert {path: path.read_bytes() for run in pair for path in run.iterdir()} == before


def test_without_matplotlib_it_says_what_to_install(pair, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    error = refused("report", *pair, "--output", tmp_path / "x.html")
    assert "needs matplotlib" in str(error)
    assert error.fix == "pip install 'megacpp-stp[plots]'"
