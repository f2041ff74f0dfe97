"""The HTML report, opened and measured in a real browser."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RunPytest = Callable[..., pytest.RunResult]
ROOT = Path(__file__).parents[2]
PACKAGES = Path(os.environ.get("DIFFOPT_BROWSER") or ROOT / ".tox" / "browser")

pytestmark = pytest.mark.skipif(
    not (PACKAGES / "node_modules" / "playwright-core").is_dir() or shutil.which("node") is None,
    reason=f"there is no browser in {PACKAGES}: python tools/browser.py {PACKAGES} puts one there, with node and npm",
)

MODEL = """
import os, torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(512, 512), torch.nn.Linear(512, 512)
        if os.environ.get("FAULT"):
            self.spare = torch.nn.Parameter(torch.zeros(500_000))

    def forward(self, x):
        return self.second(self.first(x).relu())

def inputs(call):
    return {"x": torch.ones(2, 512) * (call + 1)}
"""
RECIPES = """
[recipe."<b>compiled</b>"]
pipeline = "models:Net"
compilation = { component = "model", backend = "eager" }
call = { inputs = "models:inputs" }

[recipe.nf4]
pipeline = "models:Net"
quantization = { backend = "bitsandbytes_4bit", components = ["model"] }
call = { inputs = "models:inputs" }
"""


@pytest.mark.parametrize("html", ["no:html", "html"], ids=["our page", "pytest-html's"])
def test_the_page_shows_its_table_and_its_bars_light_and_dark(
    pytester: pytest.Pytester, run_pytest: RunPytest, monkeypatch: pytest.MonkeyPatch, html: str
) -> None:
    if html == "html":
        pytest.importorskip("pytest_html")
    pytester.makeini("[pytest]\npythonpath = .")
    pytester.makepyfile(models=MODEL)
    pytester.makefile(".recipes.toml", r=RECIPES.replace("<b>compiled</b>", "<b>compiled<b>"))
    run = ("-p", "no:cacheprovider", "--diffopt-baseline=base")
    assert run_pytest(*run, "--diffopt-update-baseline").ret == 0
    monkeypatch.setenv("FAULT", "fat")
    plugin = ("-p", "no:html") if html == "no:html" else ()
    assert run_pytest(*run, *plugin, "--diffopt-report=report.html").ret == 1
    seen = look(pytester.path / "report.html")

    assert seen["errors"] == []
    assert [url for url in seen["requests"] if not url.startswith(("file:", "data:"))] == []
    for scheme, width in (("light", 1280), ("dark", 1280), ("phone", 390)):
        page = seen[scheme]
        assert page["gate"].endswith("GATE FAILED: 2 failed; 9 verdicts of 2 recipes passed")
        assert [row[0] for row in page["rows"]] == ["<b>compiled<b>", "nf4"]
        assert all(len(row) == len(page["headings"]) for row in page["rows"])
        assert page["headings"][:2] == ["recipe", "verdict"]
        assert page["widest"] <= width  # nothing runs out of the page
        assert min(text["size"] for text in page["texts"]) >= 11  # pixels, as they are seen
        assert [text for text in page["texts"] if not text["within"]] == []
        assert all(area["width"] > 100 and area["height"] > 0 for area in page["areas"])
        assert next(at for at, text in enumerate(page["above"]) if "GATE FAILED" in text) == (
            0 if html == "html" else 1
        )
        assert all(
            picture["width"] > 300 and picture["height"] > 30 and picture["title"] for picture in page["pictures"]
        )
        assert len(page["pictures"]) >= 2 + 2 + 2  # memory and latency; parity and residency of each
        assert all(bar["width"] >= 1 and bar["height"] > 5 for bar in page["bars"])
    memory = [bar["width"] for bar in seen["light"]["bars"] if bar["kind"] == "bar first"][:2]
    assert memory[0] != memory[1]  # a bar is as long as its figure is large
    assert brightness(seen["light"]["text"]) < 100 < brightness(seen["dark"]["text"])


def look(page: Path) -> Any:
    """What `look.mjs` found on a page."""
    command = [
        "node",
        str(ROOT / "tests" / "browser" / "look.mjs"),
        str(PACKAGES),
        str(page),
        str(page.with_suffix("")),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    assert ran.returncode == 0, ran.stderr
    for scheme in ("light", "dark", "phone"):
        assert page.with_name(f"{page.stem}-{scheme}.png").stat().st_size > 10_000
    return json.loads(ran.stdout)


def brightness(colour: str) -> float:
    """Of a computed ``rgb(…)``, 0 to 255."""
    red, green, blue = (float(part.strip("rgba() ")) for part in colour.split(",")[:3])
    return (red + green + blue) / 3
