"""`gp.report` of deep models, whole: the file that a user gets, opened in a browser."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from zoo import llama

import graphpeft as gp
from graphpeft.errors import FileError


@pytest.mark.parametrize("layers", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (32, 80))])
def test_a_report_opens_in_time_and_finds_a_site(layers: int, browser: Any, tmp_path: Path) -> None:
    model = gp.apply(llama(layers=layers).eval(), "qv:rlora(r=16); mlp:lora(r=4)")
    path = gp.report(model, tmp_path / "report.html")
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    try:
        seen: list[str] = []
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        start = time.perf_counter()
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready]")
        assert time.perf_counter() - start < 2
        page.get_by_role("tab", name="Sites").click()
        assert page.locator("#table tbody tr:visible").count() == 5 * layers
        page.get_by_role("searchbox", name="Filter").fill(f"layers.{layers - 1}.self_attn.q_proj")
        page.locator("#table tbody tr:visible").click()
        assert page.locator("#block option").first.inner_text() == f"model.layers.*  × {layers}, layers 0-{layers - 1}"
        told = page.inner_text("#details")
        assert "qv:rlora(r=16)" in told
        assert "2 × 7 × 64" in told
        assert "modeling_llama.py:" in told
        assert seen == []
    finally:
        page.close()


def test_the_file_is_replaced_whole_and_a_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    path = gp.report(model, tmp_path / "report.html")
    before = path.read_text(encoding="utf-8")
    assert "LlamaForCausalLM" in before
    with pytest.raises(FileError, match="is a folder"):
        gp.report(model, tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        gp.report(gp.apply(model, "q:lora"), path)
    assert path.read_text(encoding="utf-8") == before
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]
