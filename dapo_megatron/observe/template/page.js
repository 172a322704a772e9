"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

// Text reaches the page through textContent only: responses may hold any markup.
function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

// ---- header ----

byId("subtitle").textContent = data.subtitle;
for (const tile of data.tiles) {
  const box = make("div", "tile");
  box.append(make("div", "label", tile.label), make("div", "value", tile.value), make("div", "note", tile.note));
  byId("tiles").append(box);
}

// ---- charts ----

const COLORS = ["#2563eb", "#e8710a", "#0f9d76", "#a142c4", "#64748b", "#d6336c", "#c2a000"];
const OF_OUTCOME = { kept: "#2563eb", "all right": "#15803d", "all wrong": "#d0493c" };
const SMOOTH_FROM = 30; // points from which a moving average is drawn over the faint raw curve

function movingAverage(values) {
  const reach = Math.max(2, Math.round(values.length / 40));
  return values.map((_, i) => {
    const near = values.slice(Math.max(0, i - reach), i + reach + 1);
    return near.reduce((sum, value) => sum + value, 0) / near.length;
  });
}

function lineTraces(series, color, named, smoothed) {
  const few = series.x.length < 15;
  const line = { type: "scatter", mode: few ? "lines+markers" : "lines", name: series.label, x: series.x };
  const shown = { ...line, y: series.y, marker: { size: 6, color }, line: { color, width: 2 }, showlegend: named };
  if (!smoothed || series.x.length < SMOOTH_FROM) return [shown];
  const smooth = { ...line, y: movingAverage(series.y), line: { color, width: 2.2 }, showlegend: named, hoverinfo: "skip" };
  return [{ ...shown, line: { color, width: 1 }, opacity: 0.35, showlegend: false }, smooth];
}

function traces(chart) {
  return chart.series.flatMap((series, i) => {
    const color = OF_OUTCOME[series.label] || COLORS[i % COLORS.length];
    if (chart.kind !== "stack") return lineTraces(series, color, chart.series.length > 1, chart.kind !== "exact");
    return [{ type: "bar", name: series.label, x: series.x, y: series.y, marker: { color } }];
  });
}

function draw(chart, parent, height) {
  const box = make("div", "card chart" + (chart.title === "Time of each phase" ? " wide" : ""));
  const title = make("h3", "", chart.title);
  title.append(make("span", "", chart.unit));
  const plot = make("div");
  box.append(title, plot);
  parent.append(box);
  const axis = { gridcolor: "#eef0f3", zeroline: false, linecolor: "#cfd4dc", automargin: true };
  const share = chart.unit.startsWith("share");
  Plotly.newPlot(plot, traces(chart), {
    height,
    margin: { l: 48, r: 12, t: 10, b: 36 },
    font: { family: "system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif", size: 12, color: "#475467" },
    xaxis: { ...axis, title: { text: "step", standoff: 6 }, showgrid: false, tickformat: "d" },
    yaxis: {
      ...axis,
      type: chart.kind === "log" ? "log" : "linear",
      rangemode: chart.kind === "stack" ? "tozero" : "normal",
      tickformat: share ? ".3~%" : chart.kind === "log" ? ".0e" : "",
      exponentformat: "e",
      dtick: chart.kind === "log" ? 1 : undefined,
    },
    barmode: "stack",
    bargap: 0.15,
    hovermode: "x unified",
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12 } },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
  }, { responsive: true, displayModeBar: false });
}

for (const chart of data.charts) draw(chart, byId("charts"), 260);

byId("more").hidden = data.others.length === 0;
byId("more").addEventListener("toggle", () => {
  for (const chart of data.others) draw(chart, byId("others"), 190);
}, { once: true });

// ---- sampled responses ----

const OUTCOMES = { mixed: "mixed", all_right: "all right", all_wrong: "all wrong" };
const steps = [...new Set(data.samples.map((group) => group.step))];
const groupsOf = (step) => data.samples.filter((group) => group.step === step);
const signed = (number) => (number === null ? "none" : (number < 0 ? "−" : "+") + Math.abs(number).toFixed(2));

function option(value, text) {
  const element = make("option", "", text);
  element.value = value;
  return element;
}

function listGroups() {
  byId("group").replaceChildren(...groupsOf(Number(byId("step").value)).map((group, i) => {
    const right = group.responses.filter((response) => response.verdict === "right").length;
    return option(i, `${group.prompt_id} · ${right} of ${group.responses.length} right · ${OUTCOMES[group.outcome]}`);
  }));
}

function card(response) {
  const box = make("div", `card response ${response.verdict}`);
  const facts = make("div", "facts");
  const fact = (text, className) => facts.append(make("span", className || "", text));
  const reward = response.accuracy_reward + response.overlong_penalty;
  fact(response.verdict === "unknown" ? "no verdict" : response.verdict, "verdict");
  fact(`reward ${signed(reward)}` + (response.overlong_penalty ? ` (overlong ${signed(response.overlong_penalty)})` : ""));
  fact(`advantage ${signed(response.advantage)}`, response.advantage > 0 ? "positive" : response.advantage < 0 ? "negative" : "");
  fact(`${response.tokens.toLocaleString("en")} tokens` + (response.finish_reason === "length" ? ", truncated" : ""));
  fact(`version ${response.versions.join(", ")}`);
  box.append(facts, make("div", "text", response.text || "(empty)"));
  return box;
}

function show() {
  const group = groupsOf(Number(byId("step").value))[Number(byId("group").value)];
  const truth = make("div", "truth", "ground truth ");
  truth.append(make("b", "", group.ground_truth));
  byId("prompt").replaceChildren(make("div", "text", group.prompt), truth);
  const wanted = byId("verdict").value;
  const shown = group.responses.filter((response) => !wanted || response.verdict === wanted);
  const none = make("p", "empty", "No such response in this group.");
  byId("responses").replaceChildren(...(shown.length ? shown.map(card) : [none]));
}

function move(by) {
  const [step, group] = [byId("step"), byId("group")];
  const to = group.selectedIndex + by;
  if (to >= 0 && to < group.options.length) {
    group.selectedIndex = to;
  } else if (step.selectedIndex + by >= 0 && step.selectedIndex + by < step.options.length) {
    step.selectedIndex += by;
    listGroups();
    group.selectedIndex = by > 0 ? 0 : group.options.length - 1;
  }
  show();
}

if (steps.length) {
  byId("step").append(...steps.map((step) => option(step, step)));
  byId("step").selectedIndex = steps.length - 1;
  byId("step").addEventListener("change", () => { listGroups(); show(); });
  byId("group").addEventListener("change", show);
  byId("verdict").addEventListener("change", show);
  byId("previous").addEventListener("click", () => move(-1));
  byId("next").addEventListener("click", () => move(1));
  listGroups();
  show();
} else {
  byId("samples").hidden = true;
}
