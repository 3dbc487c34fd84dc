"""The status page, in headless Chromium."""

import shutil
import time

import httpx
import pytest

from tests.serve.server import bundles
from tests.serve.server.servers import Process

pytestmark = pytest.mark.slow

webdriver = pytest.importorskip("selenium.webdriver")
if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
    pytest.skip("no Chromium", allow_module_level=True)
By = pytest.importorskip("selenium.webdriver.common.by").By
Service = pytest.importorskip("selenium.webdriver.chrome.service").Service
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait


@pytest.fixture
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1300"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def test_page(browser, folder, checkpoint, tmp_path):
    bundles.add(checkpoint, folder, 1)
    (folder / "9").mkdir()
    (folder / "9" / "manifest.json").write_text("<b>not json</b>")
    with Process(folder) as server:

        def text(id_):
            return browser.find_element(By.ID, id_).text

        def wait(condition):
            WebDriverWait(browser, 20).until(lambda _: condition())

        browser.get(server.url)
        wait(lambda: text("state") == "ready")
        assert text("version") == "1"
        assert "users\n" not in text("tables")
        assert "users 50 4 float32 800 B" in text("tables")
        assert "failed" in text("versions")
        assert browser.find_elements(By.CSS_SELECTOR, "#versions b") == []  # text, never markup

        browser.find_element(By.ID, "send").click()
        wait(lambda: '"version": 1' in text("answer"))
        assert text("took").startswith("200 in ")
        body = browser.find_element(By.ID, "body")
        good = body.get_attribute("value")
        body.clear()
        body.send_keys(good.replace('"user": [0]', '"user": [99]'))
        browser.find_element(By.ID, "send").click()
        wait(lambda: "id 99 is outside" in text("answer"))

        for _ in range(30):
            httpx.post(server.url + "/v1/models/model:predict", content=good)
        wait(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#plot circle")) >= 31)

        buttons = browser.find_elements(By.CSS_SELECTOR, "#versions button")
        time.sleep(2.5)  # the page has asked for the state again, and a button is still the one that it was
        assert [button.text for button in buttons] == ["Serve this", "Serve this"]
        buttons[1].click()
        wait(lambda: text("version") == "0")
        assert "serves, pinned" in text("versions")
        (follow,) = (
            b for b in browser.find_elements(By.CSS_SELECTOR, "#versions button") if "newest" in b.text
        )
        follow.click()
        wait(lambda: text("version") == "1")
        browser.save_screenshot(str(tmp_path / "page.png"))
        errors = [e for e in browser.get_log("browser") if e["level"] == "SEVERE" and "400" not in e["message"]]
        assert [e for e in errors if "favicon" not in e["message"]] == []
