"""A page of another origin, open in a real browser that reaches the UI: whatever it sends, no run is launched.

Two foreign servers: one that is nothing but foreign, and one whose name is made to lead to the UI's own address
(``--host-resolver-rules`` stands for an attacker's name server). The UI itself works in the same browser.
"""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from selenium import webdriver

from alphapulse_encryption_tests.browser.chromium import Programs, open_browser
from alphapulse_encryption_tests.browser.conftest import HEIGHT, WIDTH
from alphapulse_encryption_tests.browser.demonstration import Demonstration
from alphapulse_encryption_tests.browser.pages import Pages
from alphapulse_encryption_tests.ui.test_processes import JOBS, LAUNCH, RUNS, Page

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

EVIL, REBOUND = "pictures.example", "rebound.example"
# Everything that a page can have a browser send, each told of as it ended, which says nothing of what it did.
ATTACK = """
const [api, body, address, done] = [arguments[0], arguments[1], arguments[2], arguments[arguments.length - 1]];
const told = {};
const tell = (name, promise) => Promise.race([promise, new Promise(r => setTimeout(() => r('no answer'), 20000))])
    .then(w => told[name] = String(w), e => told[name] = 'error: ' + e);
const element = (tag, more) => new Promise(resolve => {
    const made = Object.assign(document.createElement(tag), more);
    made.onload = () => resolve('loaded'); made.onerror = () => resolve('error');
    document.body.append(made);
});
const form = (type, fields, method) => new Promise(resolve => {
    const frame = document.createElement('iframe'), made = document.createElement('form');
    frame.name = 'f' + Math.random(); document.body.append(frame);
    Object.assign(made, {action: api, method, enctype: type, target: frame.name});
    for (const [name, value] of Object.entries(fields))
        made.append(Object.assign(document.createElement('input'), {name, value}));
    document.body.append(made); frame.onload = () => resolve('loaded'); made.submit();
});
const socket = () => new Promise(resolve => {
    const ws = new WebSocket(api.replace('http', 'ws'), 'graphql-ws');
    ws.onopen = () => {
        ws.send(JSON.stringify({type: 'connection_init'}));
        ws.send(JSON.stringify({type: 'start', id: '1', payload: JSON.parse(body)}));
        setTimeout(() => resolve('open'), 3000);
    };
    ws.onerror = () => resolve('refused');
});
const json = {'Content-Type': 'application/json'};
const sent = (more) => fetch(api, {method: 'POST', credentials: 'include', body, ...more}).then(r => r.status);
const whole = JSON.parse(body);
Promise.all([
    tell('img', element('img', {src: address})),
    tell('script', element('script', {src: address})),
    tell('iframe', element('iframe', {src: address})),
    tell('fetch GET', fetch(address, {mode: 'no-cors'}).then(r => r.type)),
    tell('form GET', form('application/x-www-form-urlencoded',
        {query: whole.query, variables: JSON.stringify(whole.variables)}, 'GET')),
    tell('form POST', form('application/x-www-form-urlencoded',
        {query: whole.query, variables: JSON.stringify(whole.variables)}, 'POST')),
    tell('form POST text/plain', form('text/plain', {[body.slice(0, -1) + ', "x": "']: '"}'}, 'POST')),
    tell('fetch no-cors', sent({mode: 'no-cors', headers: {'Content-Type': 'text/plain'}})),
    tell('fetch no-cors, in the address',
        fetch(address, {method: 'POST', mode: 'no-cors', body: 'x'}).then(r => r.type)),
    tell('fetch JSON', sent({headers: json})),
    tell('fetch JSON no-cors', sent({mode: 'no-cors', headers: json})),
    tell('fetch text/plain; application/json',
        sent({mode: 'no-cors', headers: {'Content-Type': 'text/plain; application/json'}})),
    tell('beacon', Promise.resolve(navigator.sendBeacon(api, new Blob([body], {type: 'text/plain'})))),
    tell('websocket', socket()),
]).then(() => done(JSON.stringify(told)));
"""


class _Blank(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>pictures</title><body>pictures</body>")

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def foreign_server() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Blank)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def victim(programs: Programs) -> Iterator[webdriver.Chrome]:
    """A browser for which both names lead to this machine."""
    rules = f"--host-resolver-rules=MAP {EVIL} 127.0.0.1, MAP {REBOUND} 127.0.0.1"
    with open_browser(programs, WIDTH, HEIGHT, rules) as driver:
        driver.set_script_timeout(120)
        yield driver


def launching(page: Page) -> dict[str, Any]:
    """What launches a harmless job, as a body."""
    (node,) = page.ask(JOBS)["repositoriesOrError"]["nodes"]
    selector = {"repositoryLocationName": node["location"]["name"], "repositoryName": node["name"]}
    execution = {
        "selector": {**selector, "jobName": "list_approvals"},
        "runConfigData": "{}",
        "mode": "default",
    }
    return {"query": LAUNCH, "variables": {"p": execution}}


def runs(page: Page) -> set[str]:
    return {run["runId"] for run in page.ask(RUNS)["runsOrError"]["results"]}


def attack(driver: webdriver.Chrome, api: str, body: dict[str, Any]) -> dict[str, str]:
    address = f"{api}?query={quote(body['query'])}&variables={quote(json.dumps(body['variables']))}"
    told: dict[str, str] = json.loads(driver.execute_async_script(ATTACK, api, json.dumps(body), address))
    assert len(told) == 14, told
    return told


def test_a_page_of_another_origin_launches_nothing(victim: webdriver.Chrome, demo: Demonstration) -> None:
    page = Page(demo.address)
    body, before = launching(page), runs(page)
    ui = urlsplit(demo.address).port
    with foreign_server() as port:
        # Another site, another port of the same name (the same site), and the same machine by its other name.
        for at in (f"http://{EVIL}:{port}", f"http://localhost:{port}", f"http://127.0.0.1:{port}"):
            victim.get(at)
            for api in (f"http://localhost:{ui}/graphql", f"http://127.0.0.1:{ui}/graphql"):
                told = attack(victim, api, body)
                assert told["websocket"] == "refused", (at, api, told)
                assert told["fetch JSON"].startswith("error"), (at, api, told)
                assert runs(page) == before, (at, api, told)


def test_a_name_that_is_made_to_lead_to_the_ui_launches_nothing(
    victim: webdriver.Chrome, demo: Demonstration
) -> None:
    """To the browser it is of one origin with the UI: it may read each answer, and all of them are refusals."""
    page = Page(demo.address)
    body, before = launching(page), runs(page)
    origin = f"http://{REBOUND}:{urlsplit(demo.address).port}"
    victim.get(f"{origin}/runs")
    assert "ALPHAPULSE_UI_HOSTS" in victim.page_source
    told = attack(victim, f"{origin}/graphql", body)
    assert (told["websocket"], told["fetch JSON"]) == ("refused", "421")
    assert runs(page) == before


def test_no_other_page_shows_the_ui_in_a_frame(victim: webdriver.Chrome, demo: Demonstration) -> None:
    with foreign_server() as port:
        victim.get(f"http://{EVIL}:{port}")
        shown = victim.execute_async_script(
            "const frame = document.createElement('iframe'), done = arguments[1]; frame.src = arguments[0];"
            "frame.onload = () => { let seen; try { seen = frame.contentDocument && 'own' } catch (e) { seen = '' };"
            " done(seen || 'foreign'); }; document.body.append(frame);",
            demo.address,
        )
        # What the browser shows in place of a page that it may not show has no title of the UI's.
        victim.switch_to.frame(0)
        assert shown == "foreign" and "Dagster" not in victim.page_source
        victim.switch_to.default_content()


def test_a_link_from_elsewhere_leads_to_the_ui_and_it_works(
    victim: webdriver.Chrome, demo: Demonstration
) -> None:
    page = Page(demo.address)
    before = runs(page)
    with foreign_server() as port:
        victim.get(f"http://{EVIL}:{port}")
        victim.execute_script(
            "document.body.append(Object.assign(document.createElement('a'), {href: arguments[0], innerText: 'run'}))",
            f"{demo.address}/runs",
        )
        victim.find_element("link text", "run").click()
    pages = Pages(victim, demo.address)
    assert pages.wait_for_end(pages.materialize("preflight")) == "Success"
    assert len(runs(page) - before) == 1
