"""The report: one file, the verdict first, every figure drawn from the run; looked at in a browser where one is."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import plotly.graph_objects as go
import pytest
import torch
from markdown_it import MarkdownIt
from rich.console import Console
from support import record, run_folder
from torchvision.utils import save_image

from lightning_gradaudit.analysis.ceiling import Leakage
from lightning_gradaudit.cli.main import MISUSE, main
from lightning_gradaudit.report import load_run, terminal, write_report
from lightning_gradaudit.report.content import markdown
from lightning_gradaudit.report.html import write_markdown
from lightning_gradaudit.report.interactive import DRAWN, charts
from lightning_gradaudit.risk.run_log import RunLog

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
]
CHARTS = [
    "Risk over training",
    "Images",
    "Reconstruction and null",
    "Gradient and data similarity",
    "Effort",
    "Leaking layers",
]


def leakage(shares):
    return Leakage(
        leak_r2=torch.ones(2),
        leak_r2_low=torch.ones(2),
        reach=torch.ones(2),
        first_step=torch.ones(2),
        curve=((1e-4, 1.0, 0.9),),
        noise_to_hide=torch.ones(2),
        hidden=0.1,
        layers=shares,
        precision=1e-4,
        declared_noise=0.0,
        products=4,
        training_steps=30.0,
        seconds=0.1,
        assumptions=(),
    )


def audits(count, batch=2):
    """Audits whose risk rises in the middle, with everything that a chart can show."""
    generator = torch.Generator().manual_seed(0)
    for step in range(count):
        exposure = torch.rand(batch, generator=generator) * (0.2 + 0.7 * (step == count // 2))
        yield record(
            10 * step,
            tuple(exposure.tolist()),
            ceiling=torch.full((batch,), 0.9),
            gradient_similarity=0.5 + float(exposure.mean()) / 2,
            effort=torch.where(exposure > 0.3, 40.0, math.inf),
            effort_exposure=0.3,
            leakage=leakage({"fc": 0.75, "conv": 0.25}),
            ids=tuple(f"patient <{step}-{index}>" for index in range(batch)),
        )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A run with pictures, decisions and a fault; return its folder and the report's text."""
    folder = run_folder(tmp_path_factory.mktemp("report") / "leaky", list(audits(20)))
    lines = (folder / "records.jsonl").read_text().splitlines()
    kept = []
    for line in lines:
        event = json.loads(line)
        if event["kind"] == "run":
            event["settings"]["layers"] = "conv, fc"
        if event["kind"] == "record" and event["step"] >= 100:
            event["pairs"] = f"step_{event['step']}.png"
            save_image(torch.rand(3, 60, 60), folder / event["pairs"])
        kept.append(json.dumps(event))
    for step, released in ((50, True), (150, False)):
        verdict = json.loads(lines[-2])["risk"] | {
            "step": step,
            "released": released,
            "checkpoint": f"step={step}.ckpt",
        }
        kept.append(json.dumps({"kind": "verdict", **verdict}))
    kept.append(json.dumps({"kind": "fault", "step": 7, "message": "the audit tripped"}))
    (folder / "records.jsonl").write_text("\n".join(kept) + "\n")
    path = write_report([load_run(folder)], folder / "report.html")
    return folder, path.read_text()


class Outline(HTMLParser):
    """Collect the page's own text, tags and what they load; Plotly's script is left out."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.loads = [], "", []
        self.feed(re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] not in ("style", "script"):
            self.text += data


def test_the_page_loads_nothing_and_forbids_the_browser_to(page):
    outline = Outline(page[1])
    assert all(value.startswith(("data:", "#")) for value in outline.loads)
    (policy,) = (a["content"] for tag, a in outline.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_the_verdict_comes_first_and_every_section_is_there(page):
    outline = Outline(page[1])
    headings = re.findall(r"<h[23]>(.*?)</h[23]>", page[1])
    assert headings == ["leaky", *CHARTS, "Truth and reconstruction", "Most exposed images", "Audits", "Checkpoints",
                        "Threat model", "Settings and cost", "How to read this"]  # fmt: skip
    assert page[1].index(">BLOCK<") < page[1].index("Risk over training")
    text = outline.text
    for said in ("honest but curious", "InvertingGradients()", "demonstrated, not proven", "the audit tripped"):
        assert said in text
    assert "20 audits in 20 s" in " ".join(text.split())


def test_what_users_named_is_shown_and_escaped(page):
    folder, text = page
    worst = load_run(folder).evidence.most_exposed()
    outline = Outline(text)
    for image in worst:
        assert image["id"] in outline.text
    assert not [tag for tag, _ in outline.tags if tag.startswith("10-")]
    assert "patient &lt;10-" in text


def test_pictures_are_blurred_until_asked_for_and_everything_has_a_name(page):
    outline = Outline(page[1])
    pictures = [a for tag, a in outline.tags if tag == "img"]
    assert len(pictures) == 6
    assert all(a["alt"] for a in pictures)
    assert re.search(r"figure img \{[^}]*filter: blur", page[1])
    boxes = [a for tag, a in outline.tags if tag == "input"]
    labels = [a["for"] for tag, a in outline.tags if tag == "label"]
    assert [a["id"] for a in boxes] == labels
    assert len(set(labels)) == 6
    assert all(a["aria-label"] for _, a in outline.tags if a.get("role") in ("img", "region"))
    assert sum(a.get("role") == "img" for _, a in outline.tags) == len(CHARTS)


def luminance(color):
    """Relative luminance of "#rrggbb" as WCAG 2 defines it."""
    channels = (int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_and_lines_stand_out_light_and_dark(page):
    drawn = {
        trace[part]["color"]
        for chart in charts(load_run(page[0]))
        for trace in chart["figure"]["data"]
        for part in ("line", "marker")
        if part in trace and isinstance(trace[part].get("color"), str)
    }
    assert len(drawn) >= 5
    schemes = [
        dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", page[1], re.DOTALL)
    ]
    assert len(schemes) == 2
    for colors in schemes:
        for name in ("text", "soft", "pass", "block", "unknown"):
            assert contrast(colors[name], colors["card"]) >= 4.5, name
            assert contrast(colors[name], colors["page"]) >= 4.5, name
        for color in drawn:
            assert contrast(color, colors["card"]) >= 3, color


def test_figures_are_valid_and_hold_the_runs_numbers(page):
    run = load_run(page[0])
    drawn = {chart["name"]: chart["figure"] for chart in charts(run)}
    assert list(drawn) == CHARTS
    for figure in drawn.values():
        go.Figure(figure)  # refuses what Plotly does not know
    traces = {trace["name"]: trace for trace in drawn["Risk over training"]["data"]}
    assert traces["risk"]["x"] == [row.record.step for row in run.rows]
    assert traces["risk"]["y"] == [row.risk["risk"] for row in run.rows]
    assert traces["95% bounds"]["y"] == [row.risk["low"] for row in run.rows]
    assert traces["upper bound"]["y"] == [row.risk["high"] for row in run.rows]
    assert traces["limit 0.30"]["y"] == [0.3, 0.3]
    assert traces["checkpoint released"]["x"] == [50]
    assert traces["checkpoint refused"]["x"] == [150]
    assert len(drawn["Images"]["data"][0]["x"]) == 40
    (bars,) = drawn["Leaking layers"]["data"]
    assert dict(zip(bars["y"], bars["x"], strict=True)) == pytest.approx({"conv": 0.25, "fc": 0.75})
    assert bars["y"] == ["fc", "conv"], "bars grow upwards, so that the first layer is on top"
    (curve,) = drawn["Effort"]["data"]
    exposed = sum(math.isfinite(e) for row in run.rows for e in row.record.effort.tolist())
    assert curve["y"][-1] == pytest.approx(exposed / 40)


def test_a_figure_beside_a_limit_shows_how_it_differs_and_an_unknown_what_settles_it(tmp_path):
    log = RunLog(run_folder(tmp_path / "close", []))
    risk = {"status": "UNKNOWN", "risk": 0.3004, "low": 0.1, "high": 1.0, "limit": 0.3}
    log.append("record", next(audits(1)).to_dict() | {"risk": risk, "lag_steps": 3.0})
    decided = {"step": 3, "released": False, "checkpoint": "a.ckpt", "reasons": ["Few."], "action": "wait longer"}
    log.append("verdict", risk | decided)
    drawn = {chart["name"]: chart for chart in charts(load_run(log.path))}
    traces = {trace["name"]: trace for trace in drawn["Risk over training"]["figure"]["data"]}
    assert "limit 0.3000" in traces
    assert traces["risk"]["text"] == ["0.3004"]
    assert traces["checkpoint refused"]["customdata"] == ["0.3004"]
    text = write_report([load_run(log.path)], tmp_path / "report.html").read_text()
    assert "<td>0.3004</td>" in text
    assert "To settle it: wait longer." in text


def test_thousands_of_audits_are_thinned_and_none_of_the_worst_is_lost(tmp_path):
    folder = RunLog(run_folder(tmp_path / "long", []))
    for each in audits(3000):
        worst = float(each.exposure.max())
        risk = {"status": "UNKNOWN", "risk": worst, "low": 0.5 * worst, "high": 0.5 + 0.5 * worst, "limit": 0.3}
        folder.append("record", each.to_dict() | {"risk": risk, "lag_steps": 3.0})
    run = load_run(folder.path)
    drawn = {chart["name"]: chart for chart in charts(run)}
    risk = {trace["name"]: trace for trace in drawn["Risk over training"]["figure"]["data"]}
    assert len(risk["risk"]["x"]) <= DRAWN
    assert max(risk["risk"]["y"]) == max(row.risk["risk"] for row in run.rows)
    assert max(risk["upper bound"]["y"]) == max(row.risk["high"] for row in run.rows)
    dots = drawn["Images"]["figure"]["data"][0]
    assert len(dots["x"]) <= 2 * DRAWN * 5
    values = [value for row in run.rows for value in row.record.exposure.tolist()]
    assert (min(dots["y"]), max(dots["y"])) == pytest.approx((min(values), max(values)))
    assert "3000 audits are drawn as" in drawn["Risk over training"]["text"]
    text = Outline(write_report([run], tmp_path / "report.html").read_text()).text
    assert "of 3000 audits" in text


def test_a_run_without_any_audit_says_so(tmp_path):
    page = write_report([load_run(run_folder(tmp_path / "empty", []))], tmp_path / "report.html").read_text()
    assert "No audit has finished" in page
    assert len(page) < 50_000, "without charts there is no need of their library"


def test_markdown_says_the_same_and_its_tables_hold(page, tmp_path, capsys):
    folder, _ = page
    assert main(["report", str(folder), "--format", "md", "--json", "--out", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert text.index("BLOCK") < text.index("Threat model") < text.index("What this means")
    for image in load_run(folder).evidence.most_exposed():
        assert f"| {image['step']} | {image['index']} | {html.escape(image['id'])} | {image['exposure']:.2f} |" in text
    tables = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE)
    assert len(tables) == 3
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "the audit tripped" in text


# What others wrote into a log

NASTY = (
    "<script>alert(1)</script><img src=x onerror=alert(2)> ![p](http://e.org/p.png) [l](javascript:alert(3)) `x` | a | "
    "**b** https://e.org www.e.org <http://e.org> $\\a$ &lt;\n\n# heading\n\n- item\x1b[2J\u202e"
)


def nasty_run(folder):
    """A log whose every text is hostile."""
    log = RunLog(run_folder(folder, []))
    for audited in audits(2):
        each = dataclasses.replace(
            audited,
            ids=(NASTY, "1. item"),
            threat_model={"view": NASTY, "defences": [NASTY]},
            leakage=leakage({NASTY: 1.0}),
        )
        log.append("record", each.to_dict())
    log.append("fault", {"step": 3, "message": NASTY})
    verdict = {"status": "BLOCK", "risk": 1.0, "limit": 0.3, "step": 3, "released": False}
    log.append("verdict", verdict | {"checkpoint": NASTY, "reasons": [NASTY, "# heading"]})
    return log.path


def test_markdown_shows_what_others_wrote_and_obeys_none_of_it(tmp_path):
    """CommonMark with tables, raw HTML and links as GitHub has them, by markdown-it."""
    text = write_markdown([load_run(nasty_run(tmp_path / "run"))], tmp_path / "report.md", title=NASTY).read_text()
    reader = MarkdownIt("commonmark", {"html": True}).enable("table")
    outline = Outline(reader.render(text))
    harmless = {"h2", "h3", "p", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "strong"}
    assert {tag for tag, _ in outline.tags} <= harmless
    assert not outline.loads
    assert [tag for tag, _ in outline.tags].count("h2") == 1
    assert outline.text.count("<script>alert(1)</script>") >= 6, "everything is still shown"
    assert "**b**" in outline.text
    assert "&lt;" in outline.text
    assert not re.search(r"[^\S\n ]|[\x00-\x09\x0b-\x1f\u202e]", text)
    assert not re.search(r"(?<!\\)://|www\.", text), "nothing that GitHub would make a link of"


@pytest.mark.parametrize("text", ["# a", "- a", "+ a", "1. a", "2) a", "=== a", "> a", "    a", "``` a", "~~~", "***"])
def test_text_begins_no_block_of_markdown(text):
    page = MarkdownIt("commonmark").render(markdown(text))
    assert page == f"<p>{html.escape(' '.join(text.split()))}</p>\n"


def test_the_page_shows_what_others_wrote_and_obeys_none_of_it(tmp_path):
    run = load_run(nasty_run(tmp_path / "run"))
    text = write_report([run], tmp_path / "report.html", title=NASTY).read_text()
    outline = Outline(text)
    tags = [tag for tag, _ in outline.tags]
    assert "img" not in tags
    assert "a" not in tags
    assert set(outline.loads) == set()
    page = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert page.count("<script") == page.count('<script type="application/json">') == len(charts(run))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", page)
    (bars,) = next(chart["figure"]["data"] for chart in charts(run) if chart["name"] == "Leaking layers")
    dots = next(t for t in charts(run)[0]["figure"]["data"] if t["name"] == "checkpoint refused")
    for name in (*bars["y"], *dots["text"]):
        assert "<" not in name, "Plotly reads tags"
        assert "<script>" in html.unescape(name)


def test_the_terminal_shows_what_others_wrote_and_obeys_none_of_it(tmp_path):
    folder = nasty_run(tmp_path / "run")
    run = load_run(folder, name="\x1b[31m[link=http://e.org]x[/link]")
    out = io.StringIO()
    console = Console(file=out, width=300, no_color=True)
    for table in (terminal.audits_table(run), terminal.decisions_table([run]),
                  terminal.text_table([["a", "b"], [NASTY, "[red]x"]], NASTY)):  # fmt: skip
        console.print(table)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", out.getvalue())
    for said in ("[link=http://e.org]x[/link]: audits", "<script>alert(1)</script>", "[red]x"):
        assert said in out.getvalue()


def test_only_pictures_of_the_run_folder_are_embedded_and_the_page_says_so(page, tmp_path):
    secret, real = tmp_path / "secret.png", tmp_path / "run" / "real.png"
    log = RunLog(run_folder(tmp_path / "run", []))
    save_image(torch.rand(3, 9, 9), secret)
    save_image(torch.rand(3, 8, 8), real)
    (log.path / "link.png").symlink_to(secret)
    (log.path / "text.png").write_text("SECRET")
    names = ["real.png", "../secret.png", str(secret), "link.png", "text.png", "/etc/passwd"]
    for each, pairs in zip(audits(len(names)), names, strict=True):
        log.append("record", each.to_dict() | {"pairs": pairs})
    text = write_report([load_run(log.path)], tmp_path / "report.html").read_text()
    embedded = [base64.b64decode(found) for found in re.findall(r'<img src="data:image/png;base64,([^"]*)', text)]
    assert embedded == [real.read_bytes()]
    assert Outline(text).text.count("Left out. Step") == len(names) - 1


EVENTS = {
    "no risk": {"kind": "record", "risk": 3},
    "risk is text": {"kind": "record", "risk": {"risk": "high"}},
    "status": {"kind": "record", "risk": {"status": "FINE"}},
    "lag": {"kind": "record", "lag_steps": [1]},
    "decision without reasons": {"kind": "verdict", "released": True, "checkpoint": "a", "status": "PASS"},
    "decision of another type": {"kind": "verdict", "released": "yes", "reasons": [], "checkpoint": "a"},
    "fault without a step": {"kind": "fault", "message": "x"},
    "engine": {"kind": "engine"},
    "record of nothing": {"kind": "record", "exposure": []},
}


@pytest.mark.parametrize("event", [pytest.param(event, id=name) for name, event in EVENTS.items()])
def test_a_log_of_something_else_is_misuse_and_no_traceback(tmp_path, capsys, event):
    log = RunLog(run_folder(tmp_path / "run", []))
    values = next(audits(1)).to_dict() | event if event["kind"] == "record" else dict(event)
    log.append(event["kind"], {key: value for key, value in values.items() if key != "kind"})
    for options in ((), ("--format", "md")):
        assert main(["report", str(log.path), "--out", str(tmp_path), *options]) == MISUSE
        assert len(capsys.readouterr().err.splitlines()) == 1


# In a browser

MEASURE = """
<script>addEventListener("load", () => setTimeout(() => {
  const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  parent.postMessage({width: innerWidth, scroll: document.documentElement.scrollWidth,
    headings: [...document.querySelectorAll("h1, h2, h3")].map(e => [e.textContent, ...box(e)]),
    blocks: [...document.querySelectorAll("main .chart, main .card:not(figure):not(li)")].map(box),
    drawn: [...document.querySelectorAll(".chart > div")].map(e => [e.querySelectorAll("svg.main-svg").length,
      e.getBoundingClientRect().width, ...[...e.querySelectorAll("svg.main-svg")].map(s => s.clientWidth)]),
    text: getComputedStyle(document.body).color,
    axis: [...document.querySelectorAll(".xtick text")].map(e => getComputedStyle(e).fill)[0],
    blur: [...document.querySelectorAll("figure")].map(f => {
      const seen = [getComputedStyle(f.querySelector("img")).filter];
      f.querySelector("label").click(); seen.push(getComputedStyle(f.querySelector("img")).filter); return seen;
    })}, "*");
}, 500));</script>
"""
FRAMES = """
<body><script>addEventListener("message", e => {
  const found = document.createElement("pre"); found.textContent = JSON.stringify(e.data); document.body.append(found);
});</script>
<iframe src="page.html" style="width:390px;height:3000px"></iframe>
<iframe src="page.html" style="width:1440px;height:3000px;color-scheme:dark"></iframe>
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: the report is checked without a browser")
def test_a_browser_draws_it_whole_on_a_phone_and_on_a_desk_light_and_dark(page, tmp_path):
    (tmp_path / "page.html").write_text(page[1].replace("</body>", MEASURE + "</body>"))
    (tmp_path / "frames.html").write_text(FRAMES)
    done = subprocess.run(
        [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000",
         "--window-size=2000,3000", "--dump-dom", (tmp_path / "frames.html").as_uri()],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, "a script complained, or something was to be loaded"
    seen = {found["width"]: found for found in map(json.loads, re.findall(r"<pre>(.*?)</pre>", done.stdout))}
    assert set(seen) == {390, 1440}, done.stderr[-2000:]
    for width, found in seen.items():
        assert found["scroll"] <= width, "nothing sticks out at the side"
        assert {heading[0] for heading in found["headings"]} >= {*CHARTS, "Threat model", "How to read this"}
        for _, left, top, right, bottom in found["headings"]:
            assert left >= 0
            assert right <= width
            assert bottom > top
        for layers, box, *drawn in found["drawn"]:
            assert layers >= 1, "every chart was drawn"
            assert all(0 < each <= box + 1 for each in drawn), "and fits its box"
        assert len(found["drawn"]) == len(CHARTS)
        for above, below in zip(found["blocks"], found["blocks"][1:], strict=False):
            assert above[3] <= below[1] + 1, "no block overlaps the next"
        assert len(found["blur"]) == 6
        assert all("blur" in before and after == "none" for before, after in found["blur"])
        assert found["axis"] == found["text"], "the text of charts follows the page"
    assert seen[390]["text"] != seen[1440]["text"], "light and dark"


def test_a_picture_on_the_terminal_has_two_pixels_to_a_character():
    pixels = torch.stack([torch.zeros(3, 4), torch.ones(3, 4), torch.ones(3, 4)])  # green and blue: cyan
    pixels[:, 2, 3] = 0
    colours = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=40)
    colours.print(terminal.picture(pixels, colours))
    drawn = colours.file.getvalue()
    assert drawn.count("▀") == 2 * 4, "three rows of pixels are two of characters"
    assert drawn.count("38;2;0;255;255") == 7, "the upper halves"
    assert drawn.count("38;2;0;0;0") == 1
    plain = Console(file=io.StringIO(), width=40)
    plain.print(terminal.picture(torch.tensor([[[0.0, 0.5, 1.0], [0.0, 0.5, 1.0]]]), plain))
    assert plain.file.getvalue().rstrip() == "@=", "black, grey and white"
    assert "\x1b" not in plain.file.getvalue()


def test_a_report_says_whether_declared_defences_acted(tmp_path):
    model = {"view": "update", "defences": ["GaussianNoise(relative=30.0)"], "defences_act": True}
    run = load_run(run_folder(tmp_path / "acting", [record(0, threat_model=model)]))
    said = " ".join(write_report([run], tmp_path / "report").read_text().split())
    assert "They acted in training: the optimizer stepped with the defended gradient." in said
    assert "imagined" not in said


def test_a_report_says_that_training_went_on_without_the_declared_defences(tmp_path):
    clean = "training itself went on with the clean gradient"
    for defences in ((), ("GaussianNoise(relative=30.0)",)):
        model = {"view": "local", "defences": list(defences)}
        run = load_run(run_folder(tmp_path / f"run{len(defences)}", [record(0, threat_model=model)]))
        for write in (write_report, write_markdown):
            text = write([run], tmp_path / "report").read_text()
            assert (clean in " ".join(text.split())) is bool(defences)
