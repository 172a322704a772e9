import json
import math
from html.parser import HTMLParser

import pytest

from dapo_megatron.errors import DapoError
from dapo_megatron.observe.metrics import MetricsWriter
from dapo_megatron.observe.report import CHARTS, SAMPLED_STEPS, SHOWN_CHARACTERS, write_report
from dapo_megatron.observe.samples import SampleWriter
from dapo_megatron.run_folder import RunFolder
from tests.unit.observe.test_samples import make_group

HOSTILE = "</script><script>alert(1)</script><!-- <script> {{plotly}} \u2028 <img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """Tags, and the text of each script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data
        self.text += data

    @property
    def data(self):
        return json.loads(self.scripts[0], parse_constant=pytest.fail)


def make_run(run_dir, steps=4, text=HOSTILE, **extra):
    metrics = MetricsWriter(RunFolder(run_dir), tensorboard=False, wandb_project=None, resume_step=None)
    samples = SampleWriter(RunFolder(run_dir), resume_step=None)
    names = [name for chart in CHARTS for name in chart.series]
    for step in range(1, steps + 1):
        metrics.write({"step": step, "time": 60.0 * step, "version": step} | dict.fromkeys(names, step / 10) | extra)
        samples.write(step, [make_group(["right", "wrong"], text)])
    (run_dir / "config.yaml").write_text(
        "model: {path: models/tiny, dtype: float32}\ndata: {train: a.jsonl, eval: </pre><script>alert(3)</script>}\n"
    )


def read_page(run_dir):
    return Page(write_report(RunFolder(run_dir)).read_text("utf-8"))


def test_the_page_has_every_curve_and_the_summary(tmp_path):
    make_run(tmp_path)
    page = read_page(tmp_path)

    assert [chart["title"] for chart in page.data["charts"]] == [chart.title for chart in CHARTS]
    for chart, expected in zip(page.data["charts"], CHARTS, strict=True):
        assert [series["label"] for series in chart["series"]] == list(expected.series.values())
        assert all(series["x"] == [1, 2, 3, 4] and series["y"] == [0.1, 0.2, 0.3, 0.4] for series in chart["series"])
    tiles = {tile["label"]: (tile["value"], tile["note"]) for tile in page.data["tiles"]}
    assert tiles["steps"] == ("4", "")
    assert tiles["held-out accuracy"] == ("40.0%", "from 10.0%")
    assert "model models/tiny (float32)" in page.data["subtitle"] and "3 min" in page.data["subtitle"]
    assert "models/tiny" in page.text and "numpy" in page.text and tmp_path.name in page.text


@pytest.mark.parametrize(("train", "shown"), [("'a.jsonl'", "data a.jsonl"), ("[a.jsonl, b]", "data a.jsonl, b")])
def test_the_data_are_named_whether_one_path_or_several(tmp_path, train, shown):
    make_run(tmp_path)
    RunFolder(tmp_path).config.write_text(f"data: {{train: {train}}}\n")
    assert read_page(tmp_path).data["subtitle"].startswith(shown + " ·")


def test_the_page_needs_no_network(tmp_path):
    make_run(tmp_path)
    page = read_page(tmp_path)

    assert not any("src" in attributes or "href" in attributes for _, attributes in page.tags)
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "plotly.js" in page.scripts[1][:200]


def test_hostile_text_stays_text(tmp_path):
    make_run(tmp_path)
    page = read_page(tmp_path)

    assert page.data["samples"][0]["responses"][0]["text"] == HOSTILE
    assert len(page.scripts) == 3
    assert not any(tag == "img" for tag, _ in page.tags)
    assert "alert(3)" in page.text  # the configuration is escaped, not dropped


def test_metrics_of_no_topic_get_charts_of_their_own(tmp_path):
    make_run(tmp_path, **{"custom/thing": 7.0, "optimizer/skipped": math.nan})
    others = read_page(tmp_path).data["others"]
    assert [(chart["title"], chart["series"][0]["y"]) for chart in others] == [("custom/thing", [7.0] * 4)]


def test_values_that_are_not_finite_leave_a_gap(tmp_path):
    make_run(tmp_path, **{"optimizer/grad_norm": math.nan, "policy/entropy": math.inf})
    titles = {chart["title"] for chart in read_page(tmp_path).data["charts"]}
    assert "Gradient norm" not in titles and "Entropy" not in titles and "Reward" in titles


def test_long_runs_and_long_texts_stay_light(tmp_path):
    make_run(tmp_path, steps=100, text="a" * 5000 + "b" * 5000)
    samples = read_page(tmp_path).data["samples"]

    steps = [group["step"] for group in samples]
    assert len(steps) == SAMPLED_STEPS and steps[0] == 1 and steps[-1] == 100
    text = samples[0]["responses"][0]["text"]
    assert len(text) < SHOWN_CHARACTERS + 100 and text.startswith("aaa") and text.endswith("bbb")
    assert "4,000 characters left out" in text


def test_metrics_alone_are_enough(tmp_path):
    metrics = MetricsWriter(RunFolder(tmp_path), tensorboard=False, wandb_project=None, resume_step=None)
    metrics.write({"step": 0, "eval/accuracy": 0.25})
    page = read_page(tmp_path)
    assert [chart["title"] for chart in page.data["charts"]] == ["Held-out accuracy"]
    assert page.data["samples"] == []


def test_a_folder_without_metrics_is_named(tmp_path):
    with pytest.raises(DapoError, match=f"no metrics in {tmp_path}"):
        write_report(RunFolder(tmp_path))


def test_the_figures_of_speed_are_medians(tmp_path):
    """One slow step, as the first is, says nothing of the run."""
    metrics = MetricsWriter(RunFolder(tmp_path), tensorboard=False, wandb_project=None, resume_step=None)
    for step, seconds in enumerate((100.0, 2.0, 3.0), start=1):
        metrics.write({"step": step, "time/step": seconds, "speed/response_tokens_per_second": 6000 / seconds})
    data = Page(write_report(RunFolder(tmp_path)).read_text("utf-8")).data
    tiles = {tile["label"]: (tile["value"], tile["note"]) for tile in data["tiles"]}
    assert tiles["step time"] == ("3.0 s", "median") and tiles["generated tokens/s"] == ("2,000", "median")
