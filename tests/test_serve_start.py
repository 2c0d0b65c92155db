"""Starting the server: adapters, keys, other machines, and the page in a browser."""

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys

import pytest
from checkpoints import httpx, save_checkpoint
from serving import ROOT, start

openai = pytest.importorskip("openai", reason="the openai client is not installed")
pytest.importorskip("fastapi", reason="the serve extra is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint("causal", tmp_path_factory.mktemp("serve") / "tiny-lm")


@pytest.mark.parametrize(
    "given",
    ["adapters=caller={folder}", "adapters=caller", "adapters=a={folder},a={folder}", "max_batch=0", "timeout=-1"],
)
def test_options_that_do_not_fit_are_one_sentence(given, folder, monkeypatch, capsys):
    argv = ["serve.py", f"--model={folder}", "--port=0", f"--{given.format(folder=folder)}"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / "serve.py"), run_name="__main__")
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and re.search("is no adapter of this model|must read name=folder|above 0", said)


def test_key_is_asked_for_and_running_answers_end_before_the_stop(folder):
    process, address = start(folder, FLASHLITE_API_KEY="the key")
    for key in (None, "Bearer wrong", "Basic the key"):
        answer = httpx.get(f"{address}/v1/models", headers={"Authorization": key} if key else {})
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{address}/health").status_code == 200
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="the key", max_retries=0, timeout=60)
    stream = client.completions.create(model="tiny-lm", prompt="x", max_tokens=200, seed=0, stream=True)
    next(stream)
    process.send_signal(signal.SIGTERM)
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] in ("stop", "length")
    output = "".join(process.communicate(timeout=60))
    assert "the key" not in output and "Traceback" not in output


def test_other_machines_need_a_key(folder):
    command = [sys.executable, str(ROOT / "scripts" / "serve.py"), "--model", str(folder), "--host", "0.0.0.0"]
    environment = {name: value for name, value in os.environ.items() if name != "FLASHLITE_API_KEY"}
    done = subprocess.run(
        command, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "set FLASHLITE_API_KEY" in done.stderr


def test_page_answers_in_a_browser(folder, tmp_path):
    pytest.importorskip("gradio", reason="the web extra is not installed")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("there is no chromium and chromedriver on this machine")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    process, address = start(folder, "--web", "--max-new-tokens=16")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    page = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        page.get(address)
        field = WebDriverWait(page, 60).until(lambda page: page.find_element(By.CSS_SELECTOR, "textarea"))
        field.send_keys("Who grants?", Keys.ENTER)
        answer = '[data-testid="bot"]'
        WebDriverWait(page, 60).until(lambda page: page.find_element(By.CSS_SELECTOR, answer).text.strip())
        assert "Who grants?" in page.find_element(By.TAG_NAME, "body").text
        assert page.save_screenshot(str(tmp_path / "page.png"))
        # the API stays where it was
        assert httpx.get(f"{address}/v1/models").json()["data"][0]["id"] == "tiny-lm"
    finally:
        page.quit()
        process.terminate()
        process.communicate(timeout=60)
