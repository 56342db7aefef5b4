// One slider of steps for everything: play, speed, arrow keys, curves with a moving cursor, and health flags as marks.
import {makeChart} from "./charts.js";
import {grouped, written} from "./numbers.js";
import {change, classOf, goTo, goToStep, now, rolesOf, runA, runB, shownLayer, view} from "./view.js";
import {el} from "./tiles.js";

const INSET = 9; // pixels: half of the slider's thumb, so that curves and slider share their steps

export function makeTimeline() {
  const play = el("button", {type: "button", class: "play", onclick: togglePlay});
  const back = el("button", {type: "button", class: "icon", title: "one step back (←)", "aria-label": "one step back", onclick: () => goTo(now.at - 1)}, "‹");
  const on = el("button", {type: "button", class: "icon", title: "one step on (→)", "aria-label": "one step on", onclick: () => goTo(now.at + 1)}, "›");
  const slider = el("input", {type: "range", class: "steps", "aria-label": "step", step: 1, oninput: () => goToStep(Number(slider.value))});
  const told = el("output", {class: "step"}), epoch = el("span", {class: "epoch"});
  const speed = el("select", {"aria-label": "speed", title: "snapshots a second", onchange: () => change({speed: Number(speed.value)})},
    ...[2, 4, 8, 15, 30].map(rate => el("option", {value: rate}, `${rate}/s`)));
  const metric = el("select", {"aria-label": "curve", onchange: () => change({metric: metric.value})});
  const marks = el("div", {class: "marks", role: "group", "aria-label": "health flags"});
  const chart = makeChart("curves", "curve over steps", {inset: INSET});
  const reading = el("div", {class: "reading"});
  const element = el("section", {class: "timeline", "aria-label": "timeline"},
    el("div", {class: "transport"}, back, play, on, el("div", {class: "when"}, told, epoch), speed),
    el("div", {class: "track"}, slider, marks),
    el("div", {class: "curve"}, el("div", {class: "which"}, metric, reading), chart.element));
  let flags = "";

  slider.addEventListener("keydown", event => {
    const to = {ArrowLeft: now.at - 1, ArrowDown: now.at - 1, ArrowRight: now.at + 1, ArrowUp: now.at + 1,
      Home: 0, End: runA().steps.length - 1, PageUp: now.at + 5, PageDown: now.at - 5}[event.key];
    if (to === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    goTo(to);
  });

  function draw() {
    const run = runA(), steps = run.steps, step = steps[now.at], domain = [steps[0].step, steps.at(-1).step];
    slider.min = domain[0];
    slider.max = domain[1];
    slider.value = step.step;
    const filled = domain[1] > domain[0] ? (step.step - domain[0]) / (domain[1] - domain[0]) : 1;
    slider.style.setProperty("--filled", `${100 * filled}%`);
    slider.setAttribute("aria-valuetext", `step ${step.step}, snapshot ${now.at + 1} of ${steps.length}`);
    told.textContent = `step ${grouped(step.step)}`;
    epoch.textContent = `${now.at + 1} of ${steps.length}, epoch ${step.epoch}${run.pending ? `, ${run.pending} to come` : ""}`;
    play.textContent = now.playing ? "❚❚" : "▶";
    play.setAttribute("aria-label", now.playing ? "pause" : "play");
    speed.value = String(view.speed);
    drawFlags(run, domain);
    drawMetrics(run);
    drawCurves(domain, step.step);
  }

  function drawFlags(run, [first, last]) {
    const found = run.flags, key = JSON.stringify([run.name, found, first, last]);
    if (key === flags) return;
    flags = key;
    const seen = {}; // flags of one step stand beside each other
    marks.replaceChildren(...found.map(flag => {
      const mark = el("button", {type: "button", class: "flag", title: flag.words, "aria-label": `health flag: ${flag.words}`, onclick: () => goToFlag(flag)}, "⚑");
      const at = last > first ? (flag.step - first) / (last - first) : 0.5;
      mark.style.setProperty("--at", String(at));
      mark.style.setProperty("--beside", String((seen[flag.step] = (seen[flag.step] ?? -1) + 1) * (at > 0.5 ? -1 : 1)));
      return mark;
    }));
  }

  function drawMetrics(run) {
    const names = metricsOf(run), shown = [...metric.options].map(option => option.value);
    if (String(names) !== String(shown)) {
      metric.replaceChildren(...names.map(name => el("option", {value: name}, name.replaceAll("_", " "))));
    }
    metric.value = metricShown();
    chart.element.parentElement.hidden = names.length === 0;
  }

  function drawCurves(domain, step) {
    const name = metricShown(), curves = [];
    [runA(), runB()].forEach((run, index) => run && rolesOf(run).forEach(role => {
      const values = at => run.steps[at].metrics[`${role}/${shownLayer(run)}/${name}`];
      const points = pick => run.steps.map((s, at) => [s.step, pick(values(at) ?? []) ?? null]);
      const id = `${run.name} ${role} ${name} ${shownLayer(run)} ${view.head}`, dashed = index ? " other" : "";
      const ofHead = view.head >= 0 ? points(found => found[view.head + 1]) : [];
      if (ofHead.some(point => point[1] !== null)) curves.push({className: `${classOf(role)} head${dashed}`, points: ofHead, id});
      curves.push({className: `${classOf(role)} mean${dashed}`, points: points(found => found[0]), dotted: true, id, role, index});
    }));
    chart.draw(curves, domain, step, written);
    chart.element.setAttribute("aria-label", `${name.replaceAll("_", " ")} over steps ${domain[0]} to ${domain[1]}`);
    reading.replaceChildren(...curves.filter(curve => curve.role).map(curve => {
      const at = curve.points.findLast(point => point[0] <= step && point[1] !== null);
      return el("span", {class: `value ${classOf(curve.role)}${curve.index ? " other" : ""}`}, `${curve.role}${runB() ? ` ${"AB"[curve.index]}` : ""} `, el("b", {}, written(at?.[1])));
    }));
  }
  return {element, draw};
}

const metricNames = new WeakMap();

// Names of the metrics that the shown layer has at any step.
function metricsOf(run) {
  const layer = shownLayer(run), key = `${layer} ${run.generation} ${run.steps.length}`;
  if (metricNames.get(run)?.key !== key) {
    const names = new Set(), wanted = [...new Set(run.layouts.flat().map(entry => `${entry.role}/${layer}/`))];
    for (const step of run.steps) for (const of of Object.keys(step.metrics)) {
      for (const start of wanted) if (of.startsWith(start)) names.add(of.slice(start.length));
    }
    metricNames.set(run, {key, names: [...names]});
  }
  return metricNames.get(run).names;
}

function metricShown() {
  const names = metricsOf(runA());
  return names.includes(view.metric) ? view.metric : names[0] ?? "";
}

function goToFlag(flag) {
  // Some are about a whole model, and are found between two snapshots.
  if (flag.layer !== null) change({layer: flag.layer, head: flag.heads.length ? flag.heads[0] : -1, all: false});
  goToStep(flag.step);
}

let due = 0;

// Play from here, or from the beginning where this is the end.
export function togglePlay() {
  now.playing = !now.playing;
  if (now.playing && now.at === runA().steps.length - 1) goTo(0);
  due = performance.now();
  change();
  if (now.playing) requestAnimationFrame(playOn);
}

function playOn(time) {
  if (!now.playing) return;
  const run = runA(), next = now.at + 1, at = Math.min(next, run.steps.length - 1), layer = shownLayer(run, at);
  const here = run.peek(at, layer);
  if (time >= due && here) {
    due = Math.max(due + 1000 / view.speed, time - 1000 / view.speed);
    if (next >= run.steps.length) {
      now.playing = false;
      change();
      return;
    }
    goTo(next);
  } else if (!here) {
    run.load(at, layer).catch(() => {
      now.playing = false;
      change();
    });
  }
  requestAnimationFrame(playOn);
}
