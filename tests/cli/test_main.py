"""The command line: verbs, exit codes, and the demo as a newcomer runs it."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from support import Classifier, loader, record, run_folder, trainer
from torch import nn
from torchvision.io import read_image

import lightning_gradaudit
from lightning_gradaudit import Auditor, Budget, GradAudit, Snapshot, Status, audit_snapshot
from lightning_gradaudit.attacks import DLG
from lightning_gradaudit.cli.architectures import BUILT_IN
from lightning_gradaudit.cli.main import BROKEN, MISUSE, UNKNOWN, build_parser, main
from lightning_gradaudit.cli.settings import ARCHITECTURES
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.risk.history import AuditHistory
from lightning_gradaudit.risk.release import read_evidence
from lightning_gradaudit.risk.run_log import RunLog
from lightning_gradaudit.utils.formatting import printable

CLEAN = [record(step, (0.0,) * 8) for step in range(29)]


@pytest.mark.parametrize(
    ("records", "engine", "code"),
    [(CLEAN, True, 0), ([record(0, (0.9, 0.0))], True, 1), (CLEAN[:1], True, 2), ([], True, 2), (CLEAN, False, 2)],
    ids=["clean", "leaky", "too few", "none", "engine failed"],
)
def test_gate_exits_with_the_verdict(tmp_path, capsys, records, engine, code):
    folder = run_folder(tmp_path / "run", records, engine=engine)
    assert main(["gate", str(folder), "--max-risk", "0.3", "--json", "--out", str(tmp_path / "out")]) == code
    printed = json.loads(capsys.readouterr().out)
    assert printed["status"] == ["PASS", "BLOCK", "UNKNOWN"][code]
    assert json.loads((tmp_path / "out" / "verdict.json").read_text()) == printed


def test_gate_fails_closed_on_what_it_cannot_read(tmp_path, capsys):
    missing = tmp_path / "missing.ckpt"
    plain = tmp_path / "plain.ckpt"
    torch.save({"state_dict": {}}, plain)
    pickled = tmp_path / "pickled.ckpt"
    torch.save({"hyper": AuditHistory()}, pickled)
    garbage = tmp_path / "garbage.ckpt"
    garbage.write_text("no checkpoint")
    for path in (missing, plain, pickled, garbage):
        assert main(["gate", str(path), "--max-risk", "0.3"]) == 2
        assert capsys.readouterr().out.startswith("UNKNOWN")
    with pytest.raises(InvalidInputError, match="--trust"):
        read_evidence(pickled)


def gated(path, capsys, *options):
    """Run the gate; return its exit status and the one line that it printed."""
    code = main(["gate", str(path), "--max-risk", "0.3", *options])
    printed = capsys.readouterr()
    (line,) = printed.out.splitlines()
    assert "Traceback" not in printed.err
    assert line == printable(line, 10_000)
    return code, line


def recompressed(whole):
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return out.getvalue()


DAMAGED = {
    "cut at 50%": lambda whole: whole[: len(whole) // 2],
    "cut at 99%": lambda whole: whole[: len(whole) * 99 // 100],
    "compressed": recompressed,
    "text": lambda whole: b"no checkpoint\xff",
    "empty": lambda whole: b"",
}
LOGS = {
    "no UTF-8": b"\xff\xfe\n",
    "deep": b"[" * 100_000 + b"]" * 100_000 + b"\n",
    "malformed": b'{"kind": "fault"}\n',
    "a list": b"[1]\n",
    "not JSON": b"hello\n",
    "not finite": b'{"kind": "record", "exposure": [NaN]}\n',
}


@pytest.mark.parametrize("trust", [(), ("--trust",)], ids=["", "trust"])
@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_gate_calls_a_damaged_checkpoint_unknown_in_one_sentence(tmp_path, capsys, damage, trust):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(10_000)}, "gradaudit": {"evidence": {}}}, path)
    path.write_bytes(damage(path.read_bytes()))
    code, line = gated(path, capsys, *trust)
    assert code == 2
    assert line.startswith("UNKNOWN: path: ")
    assert "model.ckpt" in line


@pytest.mark.parametrize("content", LOGS.values(), ids=LOGS)
def test_gate_calls_a_damaged_log_or_sidecar_unknown_in_one_sentence(tmp_path, capsys, content):
    log = run_folder(tmp_path / "run", CLEAN) / "records.jsonl"
    log.write_bytes(log.read_bytes() + content)
    torch.save({"state_dict": {}}, tmp_path / "model.ckpt")
    (tmp_path / "model.ckpt.gradaudit.json").write_bytes(content)
    for path in (log.parent, tmp_path / "model.ckpt", tmp_path / "model.ckpt.gradaudit.json"):
        code, line = gated(path, capsys)
        assert code == 2
        assert line.startswith("UNKNOWN")
    for verb in ("report", "audit"):
        assert main([verb, str(log.parent), "--out", str(tmp_path)]) == MISUSE
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_faults_message_cannot_clear_the_terminal_or_write_a_line(tmp_path, capsys):
    folder = run_folder(tmp_path / "run", CLEAN)
    RunLog(folder).append("fault", {"step": 3, "message": "\x1b[2Jgone\nPASS: all is well"})
    code, line = gated(folder, capsys)
    assert code == 2
    assert "gone PASS: all is well" in line


@pytest.mark.parametrize("error", [KeyError("a\nb"), MemoryError(), RecursionError(), SystemExit(0)], ids=repr)
def test_no_fault_of_the_program_exits_with_a_verdict(tmp_path, capsys, monkeypatch, error):
    def broken(*arguments, **options):
        raise error

    monkeypatch.setattr("lightning_gradaudit.cli.verbs.gate.judge", broken)
    monkeypatch.setattr("lightning_gradaudit.report.run.load_run", broken)
    code, line = gated(tmp_path, capsys, "--json")
    assert code == 2
    assert json.loads(line)["status"] == "UNKNOWN"
    assert type(error).__name__ in json.loads(line)["reasons"][0]
    assert main(["report", str(tmp_path), "--json"]) == BROKEN
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1
    assert type(error).__name__ in json.loads(printed.out)["error"]


def test_a_verdict_that_nobody_hears_releases_nothing(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    folder = run_folder(tmp_path / "run", CLEAN)
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "lightning_gradaudit.cli",
        "gate",
        str(folder),
        "--max-risk",
        "0.3",
    ]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2, "test_gate_exits_with_the_verdict has 0 for the same folder"
    assert "Traceback" not in done.stderr


def test_a_snapshot_loads_only_on_trust(tmp_path, capsys):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    batch = torch.rand(1, 1, 8, 8), torch.tensor([2])
    Snapshot.from_batch(model, batch, loss=nn.functional.cross_entropy).save(tmp_path / "step.pt")
    assert main(["audit", str(tmp_path / "step.pt")]) == MISUSE
    assert "--trust" in capsys.readouterr().err
    with pytest.raises(InvalidInputError, match="trust=True"):
        Snapshot.load(tmp_path / "step.pt")


def test_compare_refuses_damaged_data_and_weights(tmp_path, capsys):
    (tmp_path / "data.npz").write_bytes(b"PK\x03\x04 no archive")
    assert main(["compare", "--data", str(tmp_path / "data.npz")]) == MISUSE
    (line,) = capsys.readouterr().err.splitlines()
    assert "--data" in line
    np.savez(tmp_path / "data.npz", images=np.zeros((3, 1, 4, 4), np.uint8), labels=np.zeros(3, np.int64))
    (tmp_path / "net.py").write_text("from torch import nn\ndef build():\n    return nn.Linear(2, 2)\n")
    torch.save({"state_dict": {"weight": torch.zeros(2, 2)}}, tmp_path / "net.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "net.ckpt").read_bytes()[:-50])
    for weights in ("net.ckpt", "cut.ckpt", "none.ckpt"):
        own = f"{tmp_path / 'net.py'}:build={tmp_path / weights}"
        assert main(["compare", "--own", own, "--data", str(tmp_path / "data.npz")]) == MISUSE
        (line,) = capsys.readouterr().err.splitlines()
        assert "--own" in line


def test_gate_in_a_shell_pipeline_stops_a_leaky_run(tmp_path):
    folder = run_folder(tmp_path / "run", [record(0, (0.9, 0.0))])
    verb = f"{sys.executable} -W ignore -m lightning_gradaudit.cli gate"
    command = f"{verb} {folder} --max-risk 0.3 && echo released"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "released" not in done.stdout
    assert "BLOCK" in done.stdout


def test_misuse_exits_with_its_own_status_and_names_the_argument(tmp_path, capsys):
    folder = run_folder(tmp_path / "run", CLEAN)
    assert main(["gate", str(folder), "--max-risk", "3"]) == MISUSE
    assert "max_risk" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == MISUSE
    assert main(["audit", str(tmp_path / "none.pt")]) == MISUSE


def test_audit_of_a_saved_snapshot_equals_the_call(tmp_path, capsys):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))
    snapshot = Snapshot.from_batch(model, (torch.rand(1, 1, 8, 8), torch.tensor([2])), loss=nn.functional.cross_entropy)
    snapshot.save(tmp_path / "snapshot.pt")
    assert (
        main(
            ["audit", str(tmp_path / "snapshot.pt"), "--trust", "--evaluations", "20", "--json", "--out", str(tmp_path)]
        )
        == 0
    )
    printed = json.loads(capsys.readouterr().out)
    expected = audit_snapshot(snapshot, budget=Budget(evaluations=20), analysis=True).to_dict()
    for values in (printed, expected):  # what the clock says
        del values["leakage"]["seconds"], values["leakage"]["training_steps"]
    assert {k: v for k, v in printed.items() if k != "seconds"} == {k: v for k, v in expected.items() if k != "seconds"}
    assert printed["outcome"] == "exact"
    assert (tmp_path / "audit_step_00000000.json").is_file()


def test_a_snapshot_whose_model_cannot_be_imported_says_so(tmp_path, capsys, monkeypatch):
    (tmp_path / "their_net.py").write_text("from torch import nn\nclass Net(nn.Linear):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import their_net

    model = nn.Sequential(nn.Flatten(), their_net.Net(64, 3))
    batch = torch.rand(1, 1, 8, 8), torch.tensor([2])
    Snapshot.from_batch(model, batch, loss=nn.functional.cross_entropy).save(tmp_path / "step.pt")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
    monkeypatch.delitem(sys.modules, "their_net")
    assert main(["audit", str(tmp_path / "step.pt"), "--trust"]) == MISUSE
    said = capsys.readouterr().err
    assert "their_net" in said
    assert "PYTHONPATH" in said


VERBS = ("demo", "audit", "report", "compare", "gate")


def test_every_verb_explains_itself_with_an_example_and_the_exit_status(capsys):
    for verb in VERBS:
        with pytest.raises(SystemExit) as stop:
            build_parser().parse_args([verb, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert {"--json", "--out"} <= set(re.findall(r"--\w+", text))
        assert f"\n  gradaudit {verb}" in text
        for code in (0, 1, 2, MISUSE, BROKEN):
            assert re.search(rf"^  {code} +\w", text, flags=re.MULTILINE)


def test_examples_of_the_help_can_be_parsed(capsys):
    for verb in VERBS:
        with pytest.raises(SystemExit):
            build_parser().parse_args([verb, "--help"])
        shown = re.findall(r"^  gradaudit (.*?)(?: &&.*|   .*)?$", capsys.readouterr().out, flags=re.MULTILINE)
        assert shown
        for line in shown:
            assert build_parser().parse_args(shlex.split(line)).verb == verb


@pytest.mark.parametrize(
    "arguments", [["gate", "--json"], ["nothing"], ["gate", "x", "--max-risk", "much"]], ids=lambda a: " ".join(a)
)
def test_a_command_line_that_cannot_be_parsed_is_misuse_and_not_unknown(arguments):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "lightning_gradaudit.cli", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == MISUSE
    assert "usage" in done.stderr


def test_misuse_is_json_where_json_was_asked_for(tmp_path, capsys):
    assert main(["audit", str(tmp_path / "none.pt"), "--json"]) == MISUSE
    assert "none.pt" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize(("typed", "offered"), [("ga", {"gate"}), ("re", {"report"})])
def test_a_shell_completes_the_verbs(tmp_path, capsys, typed, offered):
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "gradaudit.bash"
    script.write_text(capsys.readouterr().out)
    ask = f'source {script}; COMP_WORDS=(gradaudit {typed}); COMP_CWORD=1; _shtab_gradaudit; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == offered


def test_an_audit_is_shown_as_a_table_with_and_without_rich(tmp_path, capsys, monkeypatch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    batch = torch.rand(1, 1, 8, 8), torch.tensor([2]), ["scan 7"]
    snapshot = Snapshot.from_batch(model, batch, loss=nn.functional.cross_entropy, sample_id=2)
    snapshot.save(tmp_path / "snapshot.pt")
    for module in ("", "rich.table"):
        if module:
            monkeypatch.setitem(sys.modules, module, None)
            monkeypatch.delitem(sys.modules, "lightning_gradaudit.report.terminal", raising=False)
        assert main(["audit", str(tmp_path / "snapshot.pt"), "--trust", "--evaluations", "5"]) == 0
        text = capsys.readouterr().out
        assert "scan 7" in text
        assert "worst exposure 1.00 of 1 images" in text


def test_notebooks_show_scores_and_no_images():
    audited = record(3, (0.25, 0.5), ids=("<b>one</b>", "two"), effort=torch.tensor([40.0, torch.inf]),
                     truth=torch.rand(2, 1, 8, 8), pixels=torch.rand(2, 1, 8, 8))  # fmt: skip
    page = audited._repr_html_()
    for cell in ("0.25", "0.50", "&lt;b&gt;one&lt;/b&gt;", "two", "<td>40</td>", "&gt; 100", "step 3"):
        assert cell in page
    assert "<img" not in page
    assert "<b>one" not in page
    auditor = Auditor(attack=DLG(), executor="inline")
    shown = auditor._repr_html_()
    assert "DLG" in shown or "GradientMatching" in shown
    assert "<td>0</td>" in shown


def test_a_log_cut_off_by_a_crash_is_still_read(tmp_path):
    folder = run_folder(tmp_path / "run", CLEAN)
    with (folder / "records.jsonl").open("a") as file:
        file.write('{"kind": "record", "step": ')
    assert len(RunLog(folder).evidence().records) == len(CLEAN)
    lines = (folder / "records.jsonl").read_text().splitlines()
    (folder / "records.jsonl").write_text("\n".join(["{broken", *lines]))
    with pytest.raises(InvalidInputError, match="line 1"):
        RunLog(folder).evidence()


def test_the_checkpoint_of_an_audited_run_can_be_judged(tmp_path):
    audit = GradAudit(every_n_steps=1, budget=Budget(evaluations=20), executor="inline", dirpath=tmp_path / "audit")
    run = trainer(audit)
    run.fit(Classifier(), loader(16))
    run.save_checkpoint(tmp_path / "model.ckpt")
    (bound,) = read_evidence(tmp_path / "model.ckpt")
    assert [r.step for r in bound.evidence.records] == [0, 1, 2, 3]
    assert bound.evidence.engine is not None


@pytest.mark.slow
def test_the_demo_recovers_faces_blocks_the_leaky_run_and_releases_the_defended_one(tmp_path, capsys):
    """The main job, with W&B (offline) and TensorBoard attached, as a process executor runs it."""
    out = tmp_path / "demo"
    arguments = ["demo", "--out", str(out), "--json", "--wandb", "--tensorboard", "--evaluations", "250"]
    assert main(arguments) == 0
    runs = json.loads(capsys.readouterr().out)

    leaky, defended = (runs[name]["evidence"]["records"] for name in ("undefended", "defended"))
    assert [len(leaky), len(defended)] == [14, 40]
    assert {r["step"] for r in leaky} <= {r["step"] for r in defended}, "the pictures show both at the same steps"

    def mean(records, key):
        values = [v for r in records for v in r[key]]
        return sum(values) / len(values)

    assert max(v for r in leaky for v in r["psnr"]) > 20
    assert max(v for r in leaky for v in r["exposure"]) > 0.5
    assert mean(defended, "exposure") < 0.2 * mean(leaky, "exposure")
    assert mean(defended, "identified") < 0.3 * mean(leaky, "identified")
    assert not runs["undefended"]["decisions"][-1]["released"]
    assert runs["defended"]["decisions"][-1]["released"]
    assert runs["undefended"]["decisions"][-1]["reasons"]

    released = list((out / "defended" / "checkpoints").glob("*.ckpt"))
    assert released
    assert not list((out / "undefended").glob("checkpoints/*.ckpt"))
    assert main(["gate", str(released[0]), "--max-risk", "0.3"]) == 0
    for name in ("undefended", "defended"):
        with (out / name / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["gradaudit/risk"]]
        last = {int(row["step"]): float(row["gradaudit/evaluations"]) for row in rows}  # of the rungs of a step
        assert last == {record["step"]: 250 for record in runs[name]["evidence"]["records"]}
        assert list((out / name / "wandb").glob("offline-run-*/*.wandb"))
        assert list((out / name / "demo").glob("events.out.tfevents.*"))
    assert read_image(str(out / "first_face.png")).shape[1:] == (2 + 25 + 2, 3 * 2 + 2 * 25), "photograph and copy"
    page = (out / "report.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == 12
    assert page.count('<script type="application/json">') == 12


@pytest.mark.parametrize("arguments", [[], *([verb] for verb in (*VERBS, "completion"))], ids=lambda a: " ".join(a))
def test_help_does_not_wait_for_torch(arguments):
    """What is asserted is what was imported, not the time it took."""
    code = (
        "import sys\nfrom lightning_gradaudit.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n    print(sorted({'torch', 'numpy', 'scipy'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "usage: gradaudit" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_the_help_says_without_torch_agrees_with_the_rest():
    assert tuple(BUILT_IN) == ARCHITECTURES
    assert Status.UNKNOWN.exit_code == UNKNOWN


def test_importing_the_package_needs_no_extra():
    """Only `report` and the demo may import optional libraries when they are imported; all else does so inside."""
    extras = {
        "wandb",
        "tensorboard",
        "mlflow",
        "comet_ml",
        "jinja2",
        "markupsafe",
        "matplotlib",
        "rich",
        "skimage",
        "tqdm",
    }
    package = Path(lightning_gradaudit.__file__).parent
    for path in package.rglob("*.py"):
        if path.parent.name == "report" or path == package / "cli" / "demo.py":
            continue
        for node in ast.parse(path.read_text()).body:  # top level only
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & extras, path
            inner = ("lightning_gradaudit.report", "lightning_gradaudit.cli.demo")
            assert not any(name.startswith(inner) for name in names), path


def test_a_missing_extra_is_named_with_the_command_that_brings_it():
    code = (
        "import sys, lightning_gradaudit.cli.main as cli\n"
        "sys.modules['plotly'] = None\n"
        "sys.exit(cli.main(['report', '.']))\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == MISUSE
    assert "pip install 'lightning-gradaudit[report]'" in done.stderr


def test_public_names_exist_and_are_documented():
    for name in lightning_gradaudit.__all__:
        thing = getattr(lightning_gradaudit, name)
        assert isinstance(thing, str) or thing.__doc__, name
