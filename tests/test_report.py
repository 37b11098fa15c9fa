"""The report: one file that holds every run, escapes all text, and works in a browser."""

import html
import html.parser
import json
import re
import shutil
import subprocess

import pytest

from experiments import report
from xlstm_jax import metrics

EVIL = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"


def row(number, accuracy, **more):
    overrides = {
        "model.backbone": "ab"[number % 2],
        "+model.width": number,
        "optimizer.learning_rate": 10.0 ** -(1 + number),
        "seed": number,
    }
    config = {"model": {"backbone": "ab"[number % 2], "width": number, "note": EVIL}, "seed": number, "steps": 20}
    config["optimizer"] = {"learning_rate": 10.0 ** -(1 + number)}
    found = {"id": f"run{number}", "overrides": overrides, "config": config, "versions": {"jax": "1.2.3"}, "steps": 20}
    return found | {"seconds": 1.5, "valid_accuracy": accuracy, "wall_seconds": 2.0} | more


@pytest.fixture
def sweep(tmp_path):
    """Three finished runs, a failed one, an unfinished one."""
    folder = tmp_path / "w"
    lengths = {"test_accuracy_by_length": {"40-67": 0.9, "68-95": 0.7}}
    with _lines(folder / "results.jsonl") as lines:
        for number, accuracy in enumerate((0.5, 0.9, float("nan"))):
            lines.write(**row(number, accuracy, **lengths))
    metrics.write_json(folder / "sweep.json", {"source": f"configs/{EVIL}.py", "config": {}})
    for name in ("run0", "run1", "failed", "late"):
        with _lines(folder / "runs" / name / "metrics.jsonl") as lines:
            for step in range(1, 1001):
                lines.write(step=step, split="train", loss=1.0 / step, accuracy=0.5)
            lines.write(step=1000, split="valid", loss=0.2, accuracy=0.6)
    with _lines(folder / "runs/run1/timing.jsonl") as lines:
        for step in (500, 1000):
            lines.write(step=step, seconds=1.0, goodput=0.5, spent={}, tokens_per_second=2.0 * step, mfu=0.25)
        lines.write(step=1000, seconds=2.0, goodput=0.4, spent={"lost": 0.7})  # after an evaluation
    (folder / "runs/failed/error.txt").write_text(f"Traceback\nValueError: {EVIL}\n")
    metrics.write_json(folder / "runs/late/config.json", {"id": "late", "config": {"seed": 7}, "commit": "abc"})
    return folder


def _lines(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return metrics.Lines(path)


class Page(html.parser.HTMLParser):
    """The elements of a page, and the data in it."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.title, self._open, self._data = [], [], "", None, ""
        self.feed(text)
        self.runs = {run["id"]: run for run in json.loads(self._data)["runs"]}

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        self._open = dict(attributes).get("id") if tag == "script" else tag

    def handle_data(self, data):
        if self._open == "data":
            self._data += data
        if self._open == "title":
            self.title += data

    def handle_endtag(self, tag):
        self._open = None


def test_the_page_holds_all_and_escapes_all(sweep, capsys):
    assert report.main([f"--workdir={sweep}"]) == 0
    assert capsys.readouterr().out.strip() == str(sweep / "index.html")
    text = (sweep / "index.html").read_text()
    page = Page(text)
    assert page.tags.count("script") == 2 and "img" not in page.tags and page.links == []
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)
    assert page.title == f"w · {EVIL.rpartition('/')[2]}.py"
    states = {name: run["state"] for name, run in page.runs.items()}
    assert states == {"run0": "done", "run1": "done", "run2": "done", "failed": "failed", "late": "unfinished"}
    run = page.runs["run1"]
    assert run["config"] == row(1, 0.9)["config"] and run["environment"]["versions"] == {"jax": "1.2.3"}
    assert run["environment"]["seconds spent, but on training"] == {"lost": 0.7}
    assert run["numbers"]["valid_accuracy"] == 0.9 and page.runs["run2"]["numbers"]["valid_accuracy"] == "nan"
    assert run["fields"].keys() >= {"model.backbone", "model.width", "optimizer.learning_rate", "seed"}
    assert "+model.width" not in run["fields"]  # an option that a run adds is the field of its config
    assert run["lengths"] == {"test_accuracy_by_length": {"40-67": 0.9, "68-95": 0.7}}
    assert run["numbers"].items() >= {"tokens_per_second": 2000.0, "mfu": 0.25, "goodput": 0.4}.items()
    assert (
        run["curves"]["speed"]["tokens_per_second"] == [1000.0, 2000.0] and "speed" not in page.runs["run0"]["curves"]
    )
    train = run["curves"]["train"]
    assert len(train["steps"]) <= report.POINTS and train["steps"][-1] == 1000 and train["loss"][-1] == 0.001
    assert run["curves"]["valid"] == {"steps": [1000], "loss": [0.2], "accuracy": [0.6]}
    assert EVIL in page.runs["failed"]["error"] and page.runs["late"]["environment"] == {"commit": "abc"}


def test_rows_alone_and_one_run_are_enough(sweep, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(sweep / "results.jsonl", alone)
    page = Page(report.write(alone).read_text())
    assert list(page.runs) == ["run0", "run1", "run2"] and page.runs["run0"]["curves"] == {}
    page = Page(report.write(sweep / "runs" / "late", tmp_path / "one.html").read_text())
    assert page.runs["late"]["state"] == "unfinished" and page.runs["late"]["fields"] == {}
    assert len(page.runs["late"]["curves"]["train"]["loss"]) > 300


@pytest.mark.parametrize("name,message", [("absent", "there is no such folder"), ("empty", "no results.jsonl")])
def test_a_folder_without_runs_is_refused(tmp_path, capsys, name, message):
    (tmp_path / "empty").mkdir()
    assert report.main([f"--workdir={tmp_path / name}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / name / "index.html").exists()


ACTIONS = """<script>
const found = {}, ids = () => [...document.querySelectorAll("#runs tbody tr")].map(row => row.dataset.id);
const lines = id => document.querySelectorAll("#" + id + " path").length;
const press = name => [...document.querySelectorAll("#runs th button")].find(
  button => button.textContent.startsWith(name)).click();
const type = text => {
  const box = document.getElementById("filter"); box.value = text; box.dispatchEvent(new Event("input"));
};
found.start = ids();
found.lines = [lines("curves"), lines("lengths"), lines("parallel")];
press("valid_accuracy"); found.up = ids();
press("valid_accuracy"); found.down = ids();
found.order = document.querySelector("#runs th[aria-sort=descending]").textContent;
type("backbone=b"); found.word = ids();
type("valid_accuracy>0.4 done"); found.number = ids();
found.few = lines("curves");
document.querySelector("#runs tbody tr").click();
found.config = JSON.parse(document.getElementById("config").textContent).model.note;
type("failed"); document.querySelector("#runs tbody tr").click();
found.error = document.getElementById("error").textContent;
type(""); document.getElementById("log").click(); found.log = lines("curves");
found.title = document.title; found.images = document.images.length;
const out = document.createElement("pre"); out.id = "found"; out.textContent = JSON.stringify(found);
document.body.append(out);
</script>"""


def browser():
    """The first Chromium-like browser on the machine, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.mark.skipif(browser() is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
def test_it_works_in_a_browser(sweep, tmp_path):
    page = report.write(sweep).read_text()
    (tmp_path / "page.html").write_text(page.replace("</body>", ACTIONS + "</body>"))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'u'}",
    ]
    command = [browser(), *flags, "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", f"file://{tmp_path}/page.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    shown = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert shown, done.stderr[-2000:]
    found = json.loads(html.unescape(shown[1]))
    assert found["start"] == ["run0", "run1", "run2", "failed", "late"]
    assert found["lines"] == [4, 3, 2]
    assert found["up"][:2] == ["run0", "run1"] and found["down"].index("run1") < found["down"].index("run0")
    assert found["order"].startswith("valid_accuracy")
    assert found["word"] == ["run1"] and sorted(found["number"]) == ["run0", "run1"] and found["few"] == 2
    assert found["config"] == EVIL and EVIL in found["error"]
    assert found["log"] == 4 and "broken" not in found["title"].replace(EVIL.rpartition("/")[2], "")
    assert found["images"] == 0
