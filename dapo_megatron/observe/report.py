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

from dapo_megatron.errors import DapoError
from dapo_megatron.observe.metrics import Record, read_metrics
from dapo_megatron.observe.samples import read_samples

SAMPLED_STEPS = 40
"""Steps whose responses go into the page, spread evenly; samples.jsonl has all of them."""
SHOWN_CHARACTERS = 6000
"""Characters shown of a longer text: its beginning and its end."""
PACKAGES = ("torch", "megatron-core", "transformer-engine", "sglang", "transformers", "numpy")
NOT_DRAWN = {"step", "time", "version"}


class Chart(NamedTuple):
    """One chart: metrics over steps."""

    title: str
    unit: str
    series: dict[str, str]
    """{metric name: label}"""
    kind: str = "line"
    """line (smoothed over the raw curve), exact (raw only), log (line, logarithmic) or stack (bars)."""


CHARTS = (
    Chart("Reward", "mean per response", {"reward/mean": "reward", "reward/overlong": "overlong part"}),
    Chart("Training accuracy", "share of responses", {"reward/accuracy": "right"}),
    Chart(
        "Held-out accuracy",
        "share of responses",
        {"eval/accuracy": "sampled", "eval/greedy_accuracy": "greedy"},
    ),
    Chart(
        "Response length",
        "tokens",
        {"response/length_mean": "mean", "response/length_max": "longest in the step"},
    ),
    Chart("Truncated responses", "share of responses", {"response/truncated_share": "truncated"}),
    Chart("Entropy", "nats per token", {"policy/entropy": "entropy"}),
    Chart("Mean probability", "of a sampled token", {"policy/mean_probability": "mean probability"}),
    Chart(
        "Clipped tokens",
        "share of trained tokens",
        {"policy/clip_high_share": "above 1 + ε high", "policy/clip_low_share": "below 1 − ε low"},
    ),
    Chart("Groups kept", "share of generated groups", {"groups/kept_share": "kept"}),
    Chart(
        "Groups by outcome",
        "groups",
        {"groups/kept": "kept", "groups/all_right": "all right", "groups/all_wrong": "all wrong"},
        "stack",
    ),
    Chart("Gradient norm", "before clipping", {"optimizer/grad_norm": "gradient norm"}),
    Chart("Learning rate", "of the last update", {"optimizer/lr": "learning rate"}, "exact"),
    Chart(
        "Trainer against engine",
        "|log-prob difference| in nats",
        {
            "sync/logprob_difference": "fixed prompts, after a push",
            "mismatch/abs_mean": "responses, mean",
            "mismatch/abs_max": "responses, largest",
        },
        "log",
    ),
    Chart(
        "Speed",
        "tokens per second",
        {"speed/response_tokens_per_second": "generated", "speed/trained_tokens_per_second": "trained"},
    ),
    Chart(
        "Time of each phase",
        "seconds per step",
        {
            "time/generate": "generate",
            "time/old_logprobs": "old log-probs",
            "time/update": "update",
            "time/push": "push weights",
            "time/verify": "verify",
            "time/checkpoint": "checkpoint",
            "time/evaluate": "evaluate",
        },
        "stack",
    ),
)


def write_report(run_dir: str | Path) -> Path:
    """Write run_dir/report.html from metrics.jsonl and, where they exist, samples.jsonl and config.yaml.

    Raises:
        DapoError: the folder has no metrics.
    """
    run_dir = Path(run_dir)
    records = read_metrics(run_dir)
    if not records:
        raise DapoError(f"no metrics in {run_dir}: give the folder of a run that finished a step")
    config_file = run_dir / "config.yaml"
    config = config_file.read_text() if config_file.exists() else ""
    name = run_dir.resolve().name
    charts, others = _charts(records)
    page = {
        "name": html.escape(name),
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
                "samples": _samples(run_dir),
            }
        ),
    }
    path = run_dir / "report.html"
    path.write_text(re.sub(r"\{\{(\w+)\}\}", lambda match: page[match[1]], _template("page.html")), "utf-8")
    return path


def _template(name: str) -> str:
    return (files("dapo_megatron.observe") / "template" / name).read_text("utf-8")


def _script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in, whatever text is inside."""
    text = json.dumps(value, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _charts(records: list[Record]) -> tuple[list[dict], list[dict]]:
    """Charts by topic, and one for each metric that belongs to none; those without data are left out."""
    known = {name for chart in CHARTS for name in chart.series} | NOT_DRAWN
    rest = sorted({name for record in records for name in record} - known)
    drawn = [_chart(chart, records) for chart in CHARTS]
    others = [_chart(Chart(name, "", {name: name}), records) for name in rest]
    return [c for c in drawn if c["series"]], [c for c in others if c["series"]]


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
        parts.append(f"data {config['data']['train']}")
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

    change("held-out accuracy", "eval/accuracy", "{:.1%}".format)
    change("held-out, greedy", "eval/greedy_accuracy", "{:.1%}".format)
    change("reward", "reward/mean", "{:+.2f}".format)
    change("response length", "response/length_mean", "{:,.0f} tokens".format)
    for label, name, form in (
        ("generated tokens/s", "speed/response_tokens_per_second", "{:,.0f}"),
        ("step time", "time/step", "{:,.1f} s"),
    ):
        values = [r[name] for r in records if name in r and math.isfinite(r[name])]
        if values:
            tiles.append({"label": label, "value": form.format(statistics.median(values)), "note": "median"})
    return tiles


def _samples(run_dir: Path) -> list[dict[str, Any]]:
    """Groups of at most SAMPLED_STEPS steps, with their texts shortened: the page must stay light enough to open."""
    steps = sorted({group["step"] for group in read_samples(run_dir)})
    if len(steps) > SAMPLED_STEPS:
        last = len(steps) - 1
        steps = [steps[round(i * last / (SAMPLED_STEPS - 1))] for i in range(SAMPLED_STEPS)]
    chosen = set(steps)
    groups = [group for group in read_samples(run_dir) if group["step"] in chosen]
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
