"""The report of a run: one self-contained HTML page with the curves, phase times and sampled responses.

This file decides what is shown; template/ holds the page, its style and the script that draws it. Responses are
text that a model wrote: they enter the page as escaped JSON, reach the document as text nodes only, and the page's
content security policy forbids any request.
"""

import html
import importlib.metadata
import json
import math
import re
import statistics
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from plotly.offline import get_plotlyjs

from dapo_megatron.errors import ConfigError
from dapo_megatron.observe import catalog as m
from dapo_megatron.observe.metrics import Record, read_metrics
from dapo_megatron.observe.samples import read_samples
from dapo_megatron.run_folder import RunFolder

SAMPLED_STEPS = 40
"""Steps whose responses go into the page, spread evenly; samples.jsonl has all of them."""
SHOWN_CHARACTERS = 6000
"""Characters shown of a longer text: its beginning and its end."""
PACKAGES = ("torch", "megatron-core", "transformer-engine", "sglang", "transformers", "numpy")
NOT_DRAWN = {m.STEP, m.TIME, m.VERSION}


class Chart(NamedTuple):
    """One chart: metrics over steps."""

    title: str
    unit: str
    series: dict[str, str]
    """{metric name: label}"""
    kind: str = "line"
    """line (smoothed over the raw curve), exact (raw only), log (line, logarithmic) or stack (bars)."""


CHARTS = (
    Chart("Reward", "mean per response", {m.REWARD: "reward", m.OVERLONG: "overlong part"}),
    Chart("Training accuracy", "share of responses", {m.ACCURACY: "right"}),
    Chart(
        "Held-out accuracy",
        "share of responses",
        {m.EVAL_ACCURACY: "sampled", m.EVAL_GREEDY_ACCURACY: "greedy"},
    ),
    Chart(
        "Response length",
        "tokens",
        {m.LENGTH_MEAN: "mean", m.LENGTH_TRAINED: "mean of those trained", m.LENGTH_MAX: "longest in the step"},
    ),
    Chart("Truncated responses", "share of responses", {m.TRUNCATED: "truncated"}),
    Chart("Entropy", "nats per token", {m.ENTROPY: "entropy"}),
    Chart("Mean probability", "of a sampled token", {m.PROBABILITY: "mean probability"}),
    Chart(
        "Clipped tokens",
        "share of trained tokens",
        {m.CLIP_HIGH: "above 1 + ε high", m.CLIP_LOW: "below 1 − ε low"},
    ),
    Chart("Groups kept", "share of generated groups", {m.GROUPS_KEPT_SHARE: "kept"}),
    Chart(
        "Groups by outcome",
        "groups",
        {m.GROUPS_KEPT: "kept", m.GROUPS_ALL_RIGHT: "all right", m.GROUPS_ALL_WRONG: "all wrong"},
        "stack",
    ),
    Chart("Staleness", "versions", {m.LAG_MEAN: "mean of the trained tokens", m.LAG_MAX: "oldest"}, "exact"),
    Chart("Gradient norm", "before clipping", {m.GRAD_NORM: "gradient norm"}),
    Chart("Learning rate", "of the last update", {m.LR: "learning rate"}, "exact"),
    Chart(
        "Trainer against engine",
        "|log-prob difference| in nats",
        {
            m.SYNC_DIFFERENCE: "sampled after a push, largest",
            m.SYNC_DIFFERENCE_MEAN: "sampled after a push, mean",
            m.MISMATCH_MEAN: "responses, mean",
            m.MISMATCH_MAX: "responses, largest",
        },
        "log",
    ),
    Chart(
        "Speed",
        "tokens per second",
        {m.GENERATED_PER_SECOND: "generated", m.TRAINED_PER_SECOND: "trained"},
    ),
    Chart(
        "Time of each phase",
        "seconds per step",
        {
            m.time_of("generate"): "generate",
            m.time_of("old_logprobs"): "old log-probs",
            m.time_of("update"): "update",
            m.time_of("push"): "push weights",
            m.time_of("verify"): "verify",
            m.time_of("checkpoint"): "checkpoint",
            m.time_of("evaluate"): "evaluate",
        },
        "stack",
    ),
)


def write_report(folder: RunFolder) -> Path:
    """Write the report of a run from its metrics and, where they exist, its samples and config.

    Raises:
        ConfigError: the folder has no metrics.
    """
    records = read_metrics(folder)
    if not records:
        raise ConfigError(f"no metrics in {folder.path}: give the folder of a run that finished a step")
    config = folder.config.read_text() if folder.config.exists() else ""
    charts, others = _charts(records)
    page = {
        "name": html.escape(folder.name),
        "style": _template("style.css"),
        "script": _template("page.js"),
        "plotly": get_plotlyjs(),
        "config": html.escape(config or "config.yaml is not in the run folder"),
        "footer": html.escape(f"Written {time.strftime('%Y-%m-%d %H:%M')} · " + " · ".join(_versions())),
        "data": _script_json(
            {
                "subtitle": _subtitle(records, yaml.safe_load(config) or {}),
                "tiles": _tiles(records),
                "charts": charts,
                "others": others,
                "samples": _samples(folder),
            }
        ),
    }
    aside = folder.report.with_suffix(".new")
    aside.write_text(re.sub(r"\{\{(\w+)\}\}", lambda match: page[match[1]], _template("page.html")), "utf-8")
    aside.replace(folder.report)
    return folder.report


def _template(name: str) -> str:
    return (files("dapo_megatron.observe") / "template" / name).read_text("utf-8")


def _script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in, whatever text is inside."""
    text = json.dumps(value, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _charts(records: list[Record]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Charts by topic, and one for each metric that belongs to none; those without data are left out."""
    known = {name for chart in CHARTS for name in chart.series} | NOT_DRAWN
    rest = sorted({name for record in records for name in record} - known)
    drawn = [_chart(chart, records) for chart in CHARTS]
    others = [_chart(_chart_of(name), records) for name in rest]
    return [c for c in drawn if c["series"]], [c for c in others if c["series"]]


def _chart_of(name: str) -> Chart:
    metric = m.CATALOG.get(name)
    return Chart(name, metric.unit if metric else "", {name: name})


def _chart(chart: Chart, records: list[Record]) -> dict[str, Any]:
    series = []
    for name, label in chart.series.items():
        points = [(r["step"], r[name]) for r in records if name in r and math.isfinite(r[name])]
        if points:
            x, y = zip(*points, strict=True)
            series.append({"label": label, "x": x, "y": y})
    return {"title": chart.title, "unit": chart.unit, "kind": chart.kind, "series": series}


def _subtitle(records: list[Record], config: dict[str, Any]) -> str:
    parts = []
    if "model" in config:
        parts.append(f"model {config['model']['path']} ({config['model']['dtype']})")
    if "data" in config:
        train = config["data"]["train"]
        parts.append(f"data {train if isinstance(train, str) else ', '.join(train)}")
    times = [record["time"] for record in records if "time" in record]
    if times:
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(times[0]))
        parts.append(f"{began} · {(times[-1] - times[0]) / 60:.0f} min")
    return " · ".join(parts)


def _tiles(records: list[Record]) -> list[dict[str, str]]:
    """The figures at the top of the page."""
    tiles = [{"label": "steps", "value": f"{records[-1]['step']:.0f}", "note": ""}]

    def change(label: str, name: str, form: Callable[[float], str]) -> None:
        values = [r[name] for r in records if name in r and math.isfinite(r[name])]
        if values:
            note = f"from {form(values[0])}" if len(values) > 1 else ""
            tiles.append({"label": label, "value": form(values[-1]), "note": note})

    change("held-out accuracy", m.EVAL_ACCURACY, "{:.1%}".format)
    change("held-out, greedy", m.EVAL_GREEDY_ACCURACY, "{:.1%}".format)
    change("reward", m.REWARD, "{:+.2f}".format)
    change("response length", m.LENGTH_MEAN, "{:,.0f} tokens".format)
    for label, name, form in (
        ("generated tokens/s", m.GENERATED_PER_SECOND, "{:,.0f}"),
        ("step time", m.time_of("step"), "{:,.1f} s"),
    ):
        values = [r[name] for r in records if name in r and math.isfinite(r[name])]
        if values:
            tiles.append({"label": label, "value": form.format(statistics.median(values)), "note": "median"})
    return tiles


def _samples(folder: RunFolder) -> list[dict[str, Any]]:
    """Groups of at most SAMPLED_STEPS steps, with their texts shortened: the page must stay light enough to open."""
    steps = sorted({group["step"] for group in read_samples(folder)})
    if len(steps) > SAMPLED_STEPS:
        last = len(steps) - 1
        steps = [steps[round(i * last / (SAMPLED_STEPS - 1))] for i in range(SAMPLED_STEPS)]
    chosen = set(steps)
    groups = [group for group in read_samples(folder) if group["step"] in chosen]
    for group in groups:
        group["prompt"] = _shorten(group["prompt"])
        for response in group["responses"]:
            response["text"] = _shorten(response["text"])
    return groups


def _shorten(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"


def _versions() -> list[str]:
    installed = {dist.metadata["Name"].lower(): dist.version for dist in importlib.metadata.distributions()}
    return [f"{name} {installed[name]}" for name in PACKAGES if name in installed]
