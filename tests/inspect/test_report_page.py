"""The page of a report, in a browser: what it shows, where clicks lead, and that it asks nothing of a network."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

import graphpeft as gp
from graphpeft.inspect.report import page as report_page
from graphpeft.inspect.report import render
from graphpeft.inspect.report.collect import collect

VENDOR = Path(report_page.__file__).parent / "vendor"
HOSTILE = '</script><img src=x onerror="window.harm=1"><!-- {{ 7*7 }} \' \u2028'
Open = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    torch.manual_seed(0)
    model = gp.apply(zoo.llama(), rules="qv:rlora; mlp:lora(r=4)")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return collect(model)


@pytest.fixture(scope="module")
def window(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    page = context.new_page()
    page.seen = []
    page.on("pageerror", lambda error: page.seen.append(f"error: {error}"))
    page.on("console", lambda message: page.seen.append(f"console: {message.text}"))
    page.on("request", lambda request: page.seen.append(request.url))
    yield page
    context.close()


@pytest.fixture
def show(window: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens a report. Whatever the test does there: no error, no message and no request but for the file."""
    file = tmp_path / "report.html"
    window.seen.clear()

    def show(data: dict[str, Any]) -> Any:
        file.write_text(render(data), encoding="utf-8")
        window.goto(file.as_uri())
        window.wait_for_selector("body[data-ready]")
        return window

    yield show
    assert window.seen == [file.as_uri()]


def tab(page: Any, name: str) -> None:
    page.click(f"nav a[href='#{name}']")


def shown(page: Any, side: str = "after") -> set[str]:
    return set(page.evaluate(f"view.panes.{side}.nodes().map((node) => node.id())"))


def click(page: Any, node: str, double: bool = False) -> None:
    """With the mouse, on a node that is brought into view."""
    at = page.evaluate(
        """(id) => {
            const node = view.panes.after.getElementById(id);
            view.panes.after.center(node);
            const { left, top } = view.panes.after.container().getBoundingClientRect();
            return [left + node.renderedPosition("x"), top + node.renderedPosition("y")];
        }""",
        node,
    )
    (page.mouse.dblclick if double else page.mouse.click)(*at)


def test_overview_tells_rules_adapters_checks_and_versions(show: Open, data: dict[str, Any]) -> None:
    text = show(data).inner_text("#overview")
    for told in ("82,368", "qv:rlora", "mlp:lora(r=4)", "default", "10 sites rewritten", torch.__version__):
        assert told in text


def test_filter_leaves_the_rows_that_have_every_word(show: Open, data: dict[str, Any]) -> None:
    page = show(data)
    tab(page, "sites")
    rows = page.locator("#sites tbody tr:visible")
    assert rows.count() == 10
    page.fill("#filter", "gate layers.1")
    assert rows.count() == 1
    assert page.inner_text("#filter-count") == "1 of 10"
    page.fill("#filter", "")
    page.click("#show-skipped")
    assert rows.count() == len(data["skipped"])
    assert "no rule names this role" in rows.first.inner_text()


def test_heading_sorts(show: Open, data: dict[str, Any]) -> None:
    page = show(data)
    tab(page, "sites")
    page.click("th[data-key=update] button")
    page.click("th[data-key=update] button")
    largest = max(data["sites"], key=lambda site: site["update"])
    assert largest["weight"] in page.inner_text("#sites tbody tr >> nth=0")


def test_row_leads_to_its_node_and_the_numbers_of_its_layers(show: Open, data: dict[str, Any]) -> None:
    page = show(data)
    tab(page, "sites")
    site = data["sites"][2]
    page.click("#sites tbody tr >> nth=2")
    assert page.is_visible("#graph")
    assert page.evaluate("view.panes.after.$('.chosen').map((node) => node.id())") == [site["node"]]
    details = page.inner_text("#details")
    assert "Sites (2)" in details
    assert f"{site['update']:.3g}" in details


def test_node_tells_shape_place_rule_and_neighbours(show: Open, data: dict[str, Any]) -> None:
    page = show(data)
    tab(page, "graph")
    node = next(n for n in data["blocks"][0]["after"]["nodes"] if n["adapter"] == "default.gate" and n["op"] == "addmm")
    click(page, node["id"])
    details = page.inner_text("#details")
    for told in (
        node["shape"],
        node["path"],
        node["source"],
        "mlp:lora(r=4)",
        "default.gate",
        "Inputs (3)",
        "Users (1)",
    ):
        assert told in details
    page.click("#details .link >> nth=0")  # the first input
    first = next(e for e in data["blocks"][0]["after"]["edges"] if e["to"] == node["id"])
    assert page.evaluate("view.chosen") == first["from"]


def test_keys_walk_the_graph(show: Open, data: dict[str, Any]) -> None:
    page = show(data)
    tab(page, "graph")
    page.focus("#after .canvas")
    for key in ("ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
    assert page.evaluate("view.chosen") == "module input_layernorm"
    page.keyboard.press("Enter")
    assert "rsqrt" in shown(page)
    page.keyboard.press("Escape")
    assert page.evaluate("view.chosen") is None


def test_modules_open_and_close(show: Open, data: dict[str, Any]) -> None:
    page = show(data)
    tab(page, "graph")
    assert {"module self_attn", "module input_layernorm", "addcmul"} <= shown(page)
    assert "rsqrt" not in shown(page)  # it is in a module without an adapter
    click(page, "module input_layernorm", double=True)
    assert "rsqrt" in shown(page)
    page.click("#collapse")
    assert shown(page) == {"module input_layernorm", "module self_attn", "module post_attention_layernorm", "module mlp",
                           "add_6", "add_8", "out add_8", *(n for n in shown(page) if n.startswith("in "))}  # fmt: skip
    between = "view.panes.after.edges().map((e) => `${e.source().id()} ${e.target().id()}`)"
    assert page.evaluate(between).count("module input_layernorm module self_attn") == 1
    page.click("#expand")
    ops = {node["id"] for node in data["blocks"][0]["after"]["nodes"] if node["kind"] == "op"}
    assert ops <= shown(page)


def test_weights_and_constants_are_hidden_until_asked_for(show: Open, data: dict[str, Any]) -> None:
    page = show(data)
    tab(page, "graph")
    held = {
        n["id"] for n in data["blocks"][0]["after"]["nodes"] if n["kind"] in {"weight", "constant"} and n["adapter"]
    }
    assert not held & shown(page)
    page.check("#held")
    assert held <= shown(page)


def test_boxes_of_one_module_do_not_overlap(show: Open, data: dict[str, Any]) -> None:
    page = show(data)
    tab(page, "graph")
    page.click("#expand")
    overlapping = """() => {
        const inside = (item) => (item.children ?? []).map((child) => [child.id, view.layout.boxes.get(child.id)]);
        const apart = (a, b) => 2 * Math.abs(a.x - b.x) >= a.width + b.width || 2 * Math.abs(a.y - b.y) >= a.height + b.height;
        return [view.root, ...groups(view.root)].flatMap((item) => inside(item).flatMap(([id, box], i, all) =>
            all.slice(i + 1).filter(([, other]) => !apart(box, other)).map(([other]) => [id, other])));
    }"""
    assert page.evaluate(overlapping) == []


def test_search_finds_what_is_in_closed_modules(show: Open, data: dict[str, Any]) -> None:
    page = show(data)
    tab(page, "graph")
    page.fill("#find", "rsqrt")
    assert page.inner_text("#find-count").startswith("2 found")
    assert page.evaluate("view.panes.after.$('.found').map((node) => node.id())") == [
        "module input_layernorm",
        "module post_attention_layernorm",
    ]
    page.press("#find", "Enter")
    assert page.evaluate("view.chosen") == "rsqrt"
    page.fill("#find", "default.q")
    found = page.evaluate("view.found.length")
    assert found == sum(n["adapter"] == "default.q" and n["kind"] == "op" for n in data["blocks"][0]["after"]["nodes"])


def test_before_and_after_stand_side_by_side_and_move_together(show: Open, data: dict[str, Any]) -> None:
    page = show(data)
    tab(page, "graph")
    page.check("#compare")
    before, after = shown(page, "before"), shown(page)
    assert "addcmul" in after - before
    assert "scaled_dot_product_attention" in before & after
    assert page.evaluate("view.panes.after.getElementById('addcmul').hasClass('added')")
    place = "view.panes.{}.getElementById('linear').position()"
    assert page.evaluate(place.format("before")) == page.evaluate(place.format("after"))
    zoom = page.evaluate("view.panes.after.zoom()")
    box = page.locator("#before .canvas").bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 300)
    page.mouse.wheel(0, -200)
    page.wait_for_timeout(200)
    assert page.evaluate("view.panes.before.zoom()") > zoom
    looks = "[view.panes.{0}.zoom(), view.panes.{0}.pan()]"
    assert page.evaluate(looks.format("before")) == page.evaluate(looks.format("after"))
    page.uncheck("#compare")
    assert not page.is_visible("#before")


def test_heat_map_tells_its_values(show: Open, data: dict[str, Any]) -> None:
    page = show(data | {"heat": [data["heat"][0], *hand_made()["heat"]]})
    tab(page, "numbers")
    cells = page.locator("table.heat >> nth=0").locator("td")
    heat = data["heat"][0]
    titles = [f"{r}, layer {c}: {float(f'{v:.3g}'):g}" for r, row in zip(heat["rows"], heat["values"], strict=True)
              for c, v in zip(heat["columns"], row, strict=True)]  # fmt: skip
    assert cells.evaluate_all("cells => cells.map((cell) => cell.title)") == titles
    cells.nth(1).click()
    assert page.locator("article output").first.inner_text() == titles[1]
    odd = page.locator("table.heat >> nth=1").locator("td")
    assert odd.evaluate_all("cells => cells.map((cell) => cell.className)") == ["", "none", "odd"]


def test_opens_and_draws_in_time_at_80_layers(show: Open, data: dict[str, Any]) -> None:
    deep = deepened(data, 80)
    assert len(deep["sites"]) + len(deep["skipped"]) >= 560
    begin = time.perf_counter()
    page = show(deep)
    opened = time.perf_counter() - begin
    tab(page, "graph")
    assert page.evaluate("view.panes.after.nodes().length")
    assert opened < 2
    assert time.perf_counter() - begin < 5  # a first drawing, on a machine that runs other tests beside this


def test_hostile_names_do_no_harm(show: Open) -> None:
    page = show(hand_made())
    for name in ("sites", "graph", "numbers", "overview"):
        tab(page, name)
    assert page.inner_text("h1").startswith("</script><img")
    tab(page, "sites")
    page.click("#sites tbody tr >> nth=0")
    assert "</script><img" in page.inner_text("#details")
    page.check("#compare")
    page.check("#held")
    page.fill("#find", "onerror")
    assert page.evaluate("window.harm") is None
    assert page.locator("img").count() == 0


def test_page_of_a_model_without_anything(show: Open) -> None:
    empty = {"facts": [], "adapters": [], "rules": [], "verification": [], "environment": [], "unreached": []}
    page = show({"title": "Empty", "overview": empty, "sites": [], "skipped": [], "blocks": [], "heat": []})
    for name in ("sites", "graph", "numbers"):
        tab(page, name)
        assert page.is_visible(f"#{name}")


def test_vendored_files_are_those_that_were_copied() -> None:
    """The list holds package.json too, so that a version cannot change without its file: `npm run vendor`."""
    lines = [line.split() for line in (VENDOR / "SHA256SUMS").read_text().splitlines()]
    assert {name for _, name in lines} == {path.name for path in VENDOR.iterdir() if path.is_file()} - {
        "SHA256SUMS",
        ".gitignore",
    }
    for digest, name in lines:
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest, f"{name}: run npm run vendor"
    for name, version in json.loads((VENDOR / "package.json").read_text())["dependencies"].items():
        assert f'"{version}"' in (VENDOR / f"{name.rpartition('/')[2]}.min.js").read_text(encoding="utf-8")


def deepened(data: dict[str, Any], layers: int) -> dict[str, Any]:
    """What a report on a deeper model of this kind holds: its layers look alike."""
    deep = copy.deepcopy(data)
    for key in ("sites", "skipped"):
        first = [site for site in data[key] if site["layer"] == 0]
        deep[key] = [
            site | {"id": i, "layer": layer, "weight": site["weight"].replace(".0.", f".{layer}.")}
            for layer in range(layers)
            for i, site in enumerate(first, layer * len(first))
        ]
    for heat in deep["heat"]:
        heat["columns"] = list(range(layers))
        heat["values"] = [[row[0]] * layers for row in heat["values"]]
    return deep


def hand_made() -> dict[str, Any]:
    """Every string is hostile that can be."""
    words = (
        "op",
        "module",
        "type",
        "path",
        "shape",
        "dtype",
        "source",
        "code",
        "weight",
        "adapter",
        "role",
        "rule",
        "method",
    )
    node = dict.fromkeys(words, HOSTILE) | {"id": f"1{HOSTILE}", "kind": "op"}
    other = node | {"id": "__proto__", "kind": "weight", "module": "constructor.__proto__"}
    graph = {"nodes": [node, other], "edges": [{"from": other["id"], "to": node["id"], "port": HOSTILE}]}
    site = dict.fromkeys(
        ("adapter", "role", "weight", "rows", "shape", "method", "form", "rule", "source", "gates", "bits"), HOSTILE
    )
    numbers = {
        "id": 0,
        "layer": None,
        "rank": 1,
        "parameters": 2,
        "update": float("nan"),
        "effective_rank": float("inf"),
    }
    rule = {"rule": HOSTILE, "matched": 1, "skipped": 0, "rejected": 0, "notes": [HOSTILE]}
    return {
        "title": HOSTILE,
        "overview": {
            "facts": [[HOSTILE, HOSTILE]],
            "adapters": [{"name": HOSTILE, "status": HOSTILE, "rules": HOSTILE, "sites": 1, "parameters": 2}],
            "rules": [rule],
            "verification": [{"check": HOSTILE, "result": HOSTILE, "figure": HOSTILE}],
            "environment": [[HOSTILE, HOSTILE]],
            "unreached": [{"path": HOSTILE, "reason": HOSTILE}],
        },
        "sites": [site | numbers | {"block": 0, "node": node["id"]}],
        "skipped": [{**site, "layer": 1, "reason": HOSTILE, "block": 0, "node": None}],
        "blocks": [{"name": HOSTILE, "label": HOSTILE, "layers": [0], "before": {"nodes": [other], "edges": []}, "after": graph}],
        "heat": [{"measure": HOSTILE, "rows": [HOSTILE], "columns": [0, 1, 2], "values": [[0.5, None, float("nan")]]}],
    }  # fmt: skip
