"use strict";
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const panels = new Map(page.panels.map((panel) => [panel.key, panel]));
  const hidden = new Set(); // places of runs that are switched off
  const drawn = []; // {panel, document}: what to fill again when a switch changes

  // ---------------------------------------------------------------- plots

  const kinds = { u: Uint16Array, i: Int32Array, f: Float32Array, d: Float64Array };

  function numbers(packed) {
    if (packed === undefined) return null;
    const bytes = Uint8Array.from(atob(packed.slice(1)), (letter) => letter.charCodeAt(0));
    return Array.from(new kinds[packed[0]](bytes.buffer));
  }

  const shown = (value) => (Number.isFinite(value) ? String(Number(value.toPrecision(5))) : "");

  function fill({ panel, model }) {
    const lines = { xs: [], ys: [], color: [], dash: [] };
    const bands = { xs: [], ys: [], color: [] };
    const whiskers = { x: [], low: [], high: [], color: [] };
    const knees = { x: [], low: [], high: [], color: [] };
    const points = nothing();
    let lowest = Infinity;
    let highest = -Infinity;
    for (const series of panel.series) {
      if (hidden.has(series.run)) continue;
      const { name, color, dash } = page.runs[series.run] ?? { name: "", color: "#7a7d84", dash: "2 2" };
      const [x, y, low, high, steps] = ["x", "y", "low", "high", "steps"].map((n) => numbers(series[n]));
      if (!panel.dots) {
        lines.xs.push(x);
        lines.ys.push(y);
        lines.color.push(color);
        lines.dash.push(dash);
      }
      for (const values of [y, low ?? [], high ?? []]) {
        for (const value of values) {
          if (value < lowest) lowest = value;
          if (value > highest) highest = value;
        }
      }
      const known = low ? [...low.keys()].filter((i) => Number.isFinite(low[i] + high[i] + x[i])) : [];
      if (steps) {
        for (const i of known) {
          whiskers.x.push(x[i]);
          whiskers.low.push(low[i]);
          whiskers.high.push(high[i]);
          whiskers.color.push(color);
        }
      } else if (known.length > 1) {
        const back = [...known].reverse();
        bands.xs.push([...known, ...back].map((i) => x[i]));
        bands.ys.push([...known.map((i) => low[i]), ...back.map((i) => high[i])]);
        bands.color.push(color);
      }
      if (series.run < 0) continue;
      for (let i = 0; i < x.length; i++) {
        if (!Number.isFinite(x[i] + y[i])) continue;
        points.x.push(x[i]);
        points.y.push(y[i]);
        points.step.push(steps ? shown(steps[i]) : panel.x === "step" ? shown(x[i]) : "");
        points.run.push(name);
        points.color.push(color);
        points.alpha.push(panel.dots ? 0.5 : x.length > 60 ? 0 : 1);
        const ends = low && Number.isFinite(low[i] + high[i]);
        points.value.push(shown(y[i]) + (ends ? ` (95 % ${shown(low[i])} to ${shown(high[i])})` : ""));
      }
    }
    for (const [run, x] of panel.knees) {
      if (hidden.has(run) || lowest > highest) continue;
      knees.x.push(x);
      knees.low.push(lowest);
      knees.high.push(highest);
      knees.color.push(page.runs[run].color);
    }
    const bars = { left: [], right: [], top: [], bottom: [] };
    for (const [left, right, height] of panel.bars) {
      bars.left.push(left);
      bars.right.push(right);
      bars.top.push(height);
      bars.bottom.push(0);
    }
    for (const [name, data] of Object.entries({ bars, bands, whiskers, knees, lines, points })) {
      model.get_model_by_name(name).data = data;
    }
  }

  const nothing = () => ({ x: [], y: [], step: [], run: [], color: [], alpha: [], value: [] });

  // The nearest point, within 30 pixels, is the one that the tooltip is about.
  function follow(made, event) {
    const { model, view } = made;
    const { data } = model.get_model_by_name("points");
    const box = view.canvas_view.el.getBoundingClientRect();
    const [x, y] = [event.clientX - box.x, event.clientY - box.y];
    const { x_scale: across, y_scale: up } = view.frame;
    let nearest = -1;
    let least = 30 ** 2;
    for (let i = 0; i < data.x.length; i++) {
      const distance = (across.compute(data.x[i]) - x) ** 2 + (up.compute(data.y[i]) - y) ** 2;
      if (distance < least) [nearest, least] = [i, distance];
    }
    if (nearest === made.near) return;
    made.near = nearest;
    const one = nothing();
    if (nearest >= 0) for (const name of Object.keys(one)) one[name] = [data[name][nearest]];
    model.get_model_by_name("near").data = one;
  }

  let count = 0;

  async function draw(place) {
    const panel = panels.get(place.dataset.panel);
    count += 1;
    try {
      // Each plot is a document of its own, and its models need ids of their own.
      const item = JSON.parse(page.figure.replaceAll(/"p(\d+)"/g, `"plot${count}-$1"`));
      const before = Bokeh.documents.length;
      const views = await Bokeh.embed.embed_item(item, place);
      const model = Bokeh.documents[before];
      model.get_model_by_name("x_axis").axis_label = panel.x;
      model.get_model_by_name("y_axis").axis_label = panel.y || null;
      const made = { panel, model, view: [...views][0], near: -1 };
      fill(made);
      place.addEventListener("pointermove", (event) => follow(made, event), { capture: true });
      drawn.push(made);
      if (window.matchMedia("(pointer: fine)").matches) {
        model.get_model_by_name("toolbar").active_drag = model.get_model_by_name("zoom");
        place.addEventListener("dblclick", () => model.get_model_by_name("plot").reset.emit());
      }
      place.dataset.drawn = "yes";
    } catch (error) {
      place.textContent = "This plot could not be drawn.";
      place.dataset.drawn = "no";
      console.error(error);
    }
  }

  // What comes into view first, then what is open and further down while nothing else is to do.
  const waiting = new Set(document.querySelectorAll(".plot"));
  const wanted = [];
  const idle = window.requestIdleCallback ?? ((work) => setTimeout(work, 30));
  let busy = false;

  async function work() {
    if (busy) return;
    busy = true;
    for (;;) {
      let next = wanted.shift();
      if (next === undefined) {
        await new Promise((done) => idle(done));
        next = wanted.shift() ?? [...waiting].find((place) => place.offsetParent !== null);
        if (next === undefined) break;
      }
      if (waiting.delete(next)) await draw(next);
    }
    busy = false;
  }

  const watch = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        watch.unobserve(entry.target);
        wanted.push(entry.target);
      }
      work();
    },
    { rootMargin: "200px" },
  );
  waiting.forEach((place) => watch.observe(place));

  // Paper has another width, and a plot is not drawn anew for it: page.css makes it smaller.
  window.addEventListener("beforeprint", () => {
    for (const place of document.querySelectorAll(".plot")) place.style.setProperty("--width", place.clientWidth);
  });

  // ---------------------------------------------------------------- switches of runs

  const boxes = [...document.querySelectorAll(".switches input")];

  function switched() {
    hidden.clear();
    for (const box of boxes) if (!box.checked) hidden.add(Number(box.value));
    for (const element of document.querySelectorAll("[data-run]")) {
      element.hidden = hidden.has(Number(element.dataset.run));
    }
    document.getElementById("shown").textContent = `${boxes.length - hidden.size} of ${boxes.length}`;
    drawn.forEach(fill);
  }

  boxes.forEach((box) => box.addEventListener("change", switched));
  for (const button of document.querySelectorAll("[data-all]")) {
    button.addEventListener("click", () => {
      boxes.forEach((box) => (box.checked = button.dataset.all === "1"));
      switched();
    });
  }
  const runs = document.querySelector("details.runs");
  if (runs && window.innerWidth < 641) runs.open = false;

  // ---------------------------------------------------------------- lists: search and sorting

  for (const list of document.querySelectorAll(".list")) {
    const [search, sort, up] = ["input[type=search]", "select", ".up"].map((s) => list.querySelector(s));
    const items = [...list.querySelectorAll(".item")];
    const place = list.querySelector(".items");
    const words = (item) => [...item.querySelectorAll("h4, .tag, .whose, .answer p")].map((e) => e.textContent);
    const texts = new Map(items.map((item) => [item, words(item).join("\n").toLowerCase()]));
    const more = document.createElement("button");
    let most = 20;
    const update = () => {
      const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const key = sort.value;
      const way = key === "place" || up.checked ? 1 : -1;
      const value = (item) => (item.dataset[key] === undefined || item.dataset[key] === "" ? NaN : Number(item.dataset[key]));
      const order = [...items].sort((a, b) => {
        const [one, other] = [value(a), value(b)];
        if (Number.isNaN(one) || Number.isNaN(other)) return Number.isNaN(one) - Number.isNaN(other);
        return way * (one - other) || a.dataset.place - b.dataset.place;
      });
      const found = new Set(order.filter((item) => wanted.every((word) => texts.get(item).includes(word))));
      const first = new Set([...found].slice(0, most));
      for (const item of items) item.hidden = !first.has(item);
      place.append(...order);
      list.querySelector("output").textContent = `${first.size} of ${found.size} shown`;
      more.hidden = first.size === found.size;
    };
    more.type = "button";
    more.textContent = "20 more";
    more.addEventListener("click", () => {
      most += 20;
      update();
    });
    list.append(more);
    search.addEventListener("input", update);
    sort.addEventListener("change", update);
    up.addEventListener("change", update);
    update();
  }
})();
