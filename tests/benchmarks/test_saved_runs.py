# SPDX-License-Identifier: Apache-2.0
"""What is done with saved runs: comparing two, and the pages of a folder, the HTML in a real browser."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import __main__ as runner
from benchmarks import compare, readme

SAVED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "cpu-2-cores.json"
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
PICTURES = 2
"""The saved run has at least these: speed, and whole models."""

COUNT = (
    "<script>window.onload=()=>{const all=[...document.images];"
    "document.body.dataset.pictures=all.filter(i=>i.naturalWidth>0).length+' of '+all.length}</script>"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    document = json.loads(SAVED.read_text(encoding="utf-8"))
    document["results"][0] |= {"status": "failed", "reason": "wrong <result>", "samples": [], "median": None}
    (tmp_path / "run.json").write_text(json.dumps(document), encoding="utf-8")
    return tmp_path


def opened(page: Path, scratch: Path) -> tuple[str, str]:
    """The page's document as Chromium has it after loading, and what its console said."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={scratch}", "--enable-logging=stderr", "--dump-dom", page.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return run.stdout, "\n".join(line for line in run.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")
def test_the_page_opens_in_a_browser(folder: Path) -> None:
    assert runner.main(["report", str(folder)]) == 0
    page = folder / "report.html"
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", COUNT + "</body>"), encoding="utf-8")
    dom, console = opened(page, folder / "profile")
    pictures = page.read_text(encoding="utf-8").count("<img ")
    assert f'data-pictures="{pictures} of {pictures}"' in dom and console == "" and pictures >= PICTURES
    broken = folder / "broken.html"
    text = page.read_text(encoding="utf-8").replace("data:image/png;base64,", "data:image/png;base64,AAAA")
    broken.write_text(text.replace("</body>", "<script>absent()</script></body>"), encoding="utf-8")
    dom, console = opened(broken, folder / "profile")
    assert f'data-pictures="0 of {pictures}"' in dom and "absent is not defined" in console


def test_the_pages_hold_every_row_and_how_to_repeat_it(folder: Path) -> None:
    assert runner.main(["report", str(folder)]) == 0
    document = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    page, markdown = ((folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    for text in (page, markdown):
        assert document["arguments"]["command"] in text and f"torch {document['versions']['torch']}" in text
    assert page.count("<tr class=") == len(document["results"])
    assert (
        '<tr class="failed">' in page and "FAILED: wrong &lt;result&gt;" in page and "http" not in page.split("<img")[0]
    )


def test_a_run_compared_with_a_slower_one() -> None:
    before = json.loads(SAVED.read_text(encoding="utf-8"))
    after = json.loads(SAVED.read_text(encoding="utf-8"))
    for row in after["results"]:
        if row["section"] == "kernels" and row["provider"] == "my_triton":
            row["samples"] = [2 * sample for sample in row["samples"]]
    for (section, _, _, provider), change in compare.compare(before, after).items():
        slowed, ratio = section == "kernels" and provider == "my_triton", change.ratio
        if change.relative is not None:
            assert change.relative.value == pytest.approx(0.5 if slowed else 1.0)
        assert ratio.value == pytest.approx(0.5 if slowed else 1.0)
        assert ratio.low <= ratio.value <= ratio.high
        assert slowed or ratio.verdict == "no difference seen"


def test_the_interval_holds_the_ratio_and_the_verdict_follows_it() -> None:
    assert compare.ratio_of([1.0, 1.1, 0.9] * 5, [0.5, 0.55, 0.45] * 5).verdict == "faster"
    assert compare.ratio_of([1.0, 1.1, 0.9] * 5, [2.0, 2.2, 1.8] * 5).verdict == "slower"
    assert compare.ratio_of([1.0, 3.0, 0.3], [1.1, 2.5, 0.4]).verdict == "no difference seen"


def test_noise_of_the_machine_does_not_change_relative_speeds() -> None:
    before = json.loads(SAVED.read_text(encoding="utf-8"))
    after = json.loads(SAVED.read_text(encoding="utf-8"))
    for row in after["results"]:
        row["samples"] = [3 * sample for sample in row["samples"]]
    changes = compare.compare(before, after)
    assert {round(change.ratio.value, 6) for change in changes.values()} == {round(1 / 3, 6)}
    relative = [change.relative for change in changes.values() if change.relative is not None]
    assert relative and all(each.value == pytest.approx(1.0) and each.low <= 1 <= each.high for each in relative)
    assert compare.widest(changes).startswith(f"Relative to their baselines {len(relative)} of {len(relative)} rows")


def test_a_run_is_compared_with_an_earlier_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, shared = tmp_path / "run.json", ["host", "--quick", "--device", "cpu", "--plot", str(tmp_path / "run.png")]
    assert runner.main([*shared, "--json", str(run)]) == 0
    assert "earlier one" not in capsys.readouterr().out
    assert runner.main([*shared, "--json", str(run), "--against", str(run)]) == 0
    assert "times as fast as the earlier one" in capsys.readouterr().out


def test_the_tables_of_the_documents_are_those_of_the_saved_run() -> None:
    document = compare.load(SAVED)
    for path, name, draw in readme.DRAWN:
        text, drawn = path.read_text(encoding="utf-8"), draw(document)
        assert drawn and readme.replaced(text, name, drawn) == text, "run `python -m benchmarks readme`"
        assert readme.replaced(text, name, "other") != text
        with pytest.raises(ValueError, match="must both be there"):
            readme.replaced("no marks", name, "")


def test_unusable_runs_end_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, bare, empty = (tmp_path / f"{name}.json" for name in ("other", "bare", "empty"))
    other.write_text('{"format": 0}', encoding="utf-8")
    bare.write_text('{"format": 1}', encoding="utf-8")
    empty.write_text(json.dumps({"format": 1, "machine": {}, "results": []}), encoding="utf-8")
    (tmp_path / "none").mkdir()
    for arguments, words in (
        (["compare", str(tmp_path / "no.json"), str(SAVED)], "is no saved run"),
        (["compare", str(other), str(SAVED)], "has format 0"),
        (["compare", str(bare), str(SAVED)], "has no machine and no results"),
        (["compare", str(empty), str(SAVED)], "no timed row in common"),
        (["kernels", "--against", str(other)], "--against"),
        (["readme", "--take", str(empty)], "must be a whole run on the CPU"),
        (["report", str(tmp_path / "none")], "holds no saved run"),
    ):
        with pytest.raises(SystemExit) as ending:
            runner.main(arguments)
        output = capsys.readouterr()
        assert ending.value.code == 2 and words in output.err and output.err.count("\n") == 1
