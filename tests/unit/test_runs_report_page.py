"""The page of a report: self-contained, escaped, the same bytes for the same runs."""

import json
import re
from html.parser import HTMLParser

import matplotlib
import pytest

from megacpp_stp.runs.files import read_json, write_json
from megacpp_stp.runs.invalid import invalidate
from megacpp_stp.runs.report import build_report
from megacpp_stp.runs.report_files import plots_of
from megacpp_stp.runs.report_ink import DARK, LIGHT, label, png, svg
from megacpp_stp.runs.report_page import page
from tests.unit.made_runs import DATA, GATE, SUBSTRATE, loss_of, make_run

HOSTILE = "<script>alert('x')<|script>&\"$x$ \N{GRINNING FACE}"
VOID = {"meta"}


class Page(HTMLParser):
    """Elements, ids, references and visible text of a page; refuses tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.used, self.text, self._open = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            self.used += re.findall(r"url\(#([^)]*)\)", value or "")
            if name in ("href", "xlink:href") and not value.startswith("data:image/png;base64,"):
                assert value.startswith("#")
                self.used.append(value[1:])

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.text.append(data)

    @property
    def words(self):
        return " ".join("".join(self.text).split())


def made(folder):
    alike = {"substrate": {**SUBSTRATE, "python": "3.12 <i>"}}
    base = make_run(folder / "base", "stp=null", validation={20: 4.5}, **alike)
    other = make_run(folder / HOSTILE, loss=lambda i: loss_of(i) - 0.5 * (i > GATE), **alike)
    bad = make_run(folder / "bad <b>", "stp.weight=0.7")
    invalidate(bad, "read <i>the wrong</i> data")
    return [base, other, bad]


def page_of(runs):
    report = build_report(runs)
    return page(report, plots_of(report))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    runs = made(tmp_path_factory.mktemp("runs"))
    return runs, page_of(runs)


def test_a_page_fetches_and_runs_nothing(written):
    found = Page(written[1])
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "img", "base", "form", "a", "b", "i"}
    assert not any(name.startswith("on") or name == "src" for _, attrs in found.tags for name in attrs)
    assert "://" not in written[1]
    assert "@import" not in written[1]
    policies = [attrs["content"] for _, attrs in found.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_ids_are_one_of_a_kind_and_found(written):
    found = Page(written[1])
    assert len(found.ids) == len(set(found.ids))
    assert set(found.used) == set(found.ids)
    assert found.ids  # figures clip, and repeat their marks


def test_text_of_files_stays_text(written):
    found = Page(written[1])
    assert f"B {HOSTILE} against A base" in found.words
    assert "INVALID: bad <b>: read <i>the wrong</i> data." in found.words
    assert found.words.count("bad <b>") == 1  # nowhere else
    assert "<script" not in written[1]
    assert label(HOSTILE) in found.words  # in the figures, with its dollars


def test_a_page_says_it_all(written):
    found = Page(written[1])
    for words in (
        "controlled comparison: lm_loss, iterations 11 to 40",
        "Window: iterations 11 to 40, 30 iterations: STP has all of its weight in each run that has it.",
        "\N{MINUS SIGN}0.5 nats a token",
        "lower; 95% interval \N{MINUS SIGN}0.5 to \N{MINUS SIGN}0.5",
        "controlled: only stp differs",
        "an interval over iterations says nothing of other seeds",
        "0.02 from 11",
        "lm loss, nats a token",
        "throughput, tokens/s",
        "peak memory, GiB",
        "dormant",
        "active",
        "no STP",
        "6 E",
        "12 R",
        "straightness",
        "stp.weight",
        "7,000 tokens, sha256 ab",
    ):
        assert words in found.words, words
    figures = [attrs for tag, attrs in found.tags if tag == "svg"]
    assert [attrs["class"] for attrs in figures] == ["wide", "narrow"] * 4
    assert all(attrs["role"] == "img" and len(attrs["aria-label"]) > 40 for attrs in figures)
    assert "opens at iteration 11" in figures[0]["aria-label"]


def test_figures_follow_the_page_into_the_dark(written):
    drawn = " ".join(re.findall(r'style="([^"]*)"', written[1]))
    assert {f"var(--{name})" for name in ("ink", "soft", "line", "shade", "a0", "a1")} <= set(
        re.findall(r"var\(--\w+\)", drawn)
    )
    # Left as they are: the gate over the heat map, and where it has no value.
    assert set(re.findall(r"#[0-9a-f]{6}", drawn)) <= {"#101010", "#fdfdfd", "#b9bec6"}
    sheet = written[1].partition("</style>")[0]
    assert all(f"--{name}: {colour};" in sheet for colours in (LIGHT, DARK) for name, colour in colours.items())


def test_the_same_runs_give_the_same_bytes(written):
    with matplotlib.rc_context({"font.size": 20, "svg.hashsalt": "other", "xtick.direction": "in"}):
        before = dict(matplotlib.rcParams)
        assert page_of(written[0]) == written[1]
        assert dict(matplotlib.rcParams) == before
    plot = plots_of(build_report(written[0]))[0]
    assert png(plot) == png(plot)


def test_one_run_has_no_comparison_on_its_page(written):
    text = page_of(written[0][:1])
    found = Page(text)
    headings = re.findall(r"<h2>([^<]*)</h2>", text)
    assert headings == ["Runs", "Loss", "Throughput and memory", "What ran"]
    assert "nam56r-tiny: one run, base" in found.words
    assert "all of the run." in found.words


def test_a_loud_title_is_loud(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", "optimizer.lr=1.0e-3")
    report = build_report([tmp_path / "a", tmp_path / "b"])
    text = page(report, [])
    assert '<h1 class="loud">NOT CONTROLLED: lm_loss, iterations 1 to 40</h1>' in text
    assert 'class="loud"' not in page(build_report([tmp_path / "a"]), [])


def test_hostile_files_are_drawn_all_the_same(tmp_path):
    """Names that no XML can hold, numbers at the ends of what is taken."""
    strange = {**SUBSTRATE, "python": "\x1b[2J<b>", "hardware": ["\ud800", {"x": None}], "packages": "<i>"}
    run = make_run(tmp_path / "run", substrate=strange, data={**DATA, "tokenizer": []}, loss=lambda i: 1e18 * (-1) ** i)
    receipt = read_json(run / "receipt.json")
    receipt |= {"status": "incomplete", "reason": "\x00</h1>\u2028", "seeds": {"training": 10**300}}
    receipt["parameters"] = {"total": 10**300, "by_pipeline_rank": []}
    receipt["validation"] = [{"iteration": 40, "lm_loss": 1e-320, "bits_per_byte": -1e17}]
    write_json(run / "receipt.json", receipt)
    (run / "plan.json").unlink()  # which would say otherwise
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record["stp_loss_by_tap"] = {"\x1b]0;": 0.0, "\ud800": 2.0, "": 1.0, **{str(i): 1e-320 for i in range(5)}}
        record["tokens_per_s"] = -1e18
        record["peak_memory_bytes"] = 0
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    report = build_report([run])
    plots = plots_of(report)
    assert [plot.name for plot in plots] == ["loss", "straightness", "machine"]
    text = page(report, [])
    for part in (text, *(svg(plot, narrow=True) for plot in plots)):
        part.encode()
        Page(part)
        assert not re.search(r"[\x00-\x09\x0b-\x1f]", part)
