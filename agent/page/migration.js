"use strict";
// Draws one migration, for the agent's page and for the file of `ferry migrate --html`. What it draws is
// the object of `GET /v1/migrations/ID` of the page: `record` and `rounds` as the guest's control socket
// has them, and `samples` of its progress. All text is put in as text: names and sentences come from
// guests, peers and kernels.
const ferryMigration = (() => {
  const PAGE_BYTES = 4096;
  const SVG = "http://www.w3.org/2000/svg";
  // The most columns of the heat map; more rounds than that share columns.
  const COLUMNS = 80;
  const SHADES = 5;

  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes ?? {})) node.setAttribute(name, value);
    node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
    return node;
  }
  const html = (tag, attributes, ...children) =>
    fill(document.createElement(tag), attributes, children);
  const svg = (tag, attributes, ...children) =>
    fill(document.createElementNS(SVG, tag), attributes, children);

  const number = (value, digits = 0) =>
    value.toLocaleString("en", { maximumFractionDigits: digits });
  const significant = (value) => number(value, value >= 100 ? 0 : value >= 10 ? 1 : 2);
  const BYTES = [[1, "B"], [2 ** 10, "KiB"], [2 ** 20, "MiB"], [2 ** 30, "GiB"], [2 ** 40, "TiB"]];
  const RATES = [[1e3, "kB/s"], [1e6, "MB/s"], [1e9, "GB/s"]];
  const TIMES = [[1e-3, "µs"], [1, "ms"], [1e3, "s"], [60e3, "min"], [3600e3, "h"]];
  const unitOf = (value, units) => units.findLast(([size]) => value >= size) ?? units[0];
  function quantity(value, units) {
    const [size, name] = unitOf(value, units);
    return `${significant(value / size)} ${name}`;
  }
  const bytes = (value) => quantity(value, BYTES);
  const rate = (value) => quantity(value, RATES);
  const time = (ms) => (ms === 0 ? "0 ms" : quantity(ms, TIMES));
  const moment = (unixMs) => new Date(unixMs).toISOString().replace("T", " ").replace(/\.\d+Z$/, " UTC");

  // Steps of 1, 2 or 5 from 0 to beyond `most`, in a unit that fits.
  function axis(most, units, count) {
    const [size, unit] = unitOf(most, units);
    const rough = Math.max(most, Number.MIN_VALUE) / size / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999) * power;
    const ticks = [];
    for (let at = 0; ticks.length < 20; at += 1) {
      ticks.push(at * step * size);
      if (at * step * size >= most) break;
    }
    return { ticks, most: ticks.at(-1), unit, label: (value) => number(value / size, 3) };
  }

  function picture(width, height, title, ...children) {
    return svg("svg",
      { viewBox: `0 0 ${width} ${height}`, width: "100%", role: "img", "aria-label": title },
      svg("title", {}, title), ...children);
  }

  // A line over time. `marks` are moments with a name.
  function line(width, { title, points, units, most, marks }) {
    const box = { left: 64, right: 12, top: 24, bottom: 38 };
    const height = 190;
    const [inner, tall] = [width - box.left - box.right, height - box.top - box.bottom];
    const last = points.at(-1)?.[0] ?? 0;
    const across = axis(Math.max(last, 1e-3), TIMES, Math.max(2, Math.floor(inner / 110)));
    const up = axis(Math.max(most, units[0][0]), units, 4);
    const x = (value) => box.left + (value / across.most) * inner;
    const y = (value) => box.top + tall - (value / up.most) * tall;
    const grid = up.ticks.map((tick) => [
      svg("line", { class: "grid", x1: box.left, x2: width - box.right, y1: y(tick), y2: y(tick) }),
      svg("text", { x: box.left - 6, y: y(tick) + 4, "text-anchor": "end" }, up.label(tick)),
    ]);
    const below = across.ticks.map((tick, at) =>
      svg("text", { x: x(tick), y: box.top + tall + 16, "text-anchor":
        at === across.ticks.length - 1 ? "end" : at === 0 ? "start" : "middle" }, across.label(tick)));
    const named = marks.filter(([at]) => at <= across.most).map(([at, name], n) => {
      const late = x(at) > width - 110;
      return [
        svg("line", { class: "mark", x1: x(at), x2: x(at), y1: box.top, y2: box.top + tall }),
        svg("text", { x: x(at) + (late ? -4 : 4), y: box.top + 10 + n * 14,
          "text-anchor": late ? "end" : "start" }, name),
      ];
    });
    const path = points.map(([at, value], n) =>
      `${n ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`).join("");
    const area = points.length > 1
      ? `${path}L${x(last).toFixed(1)} ${y(0)}L${x(points[0][0]).toFixed(1)} ${y(0)}Z` : "";
    return picture(width, height, title, grid, below,
      svg("text", { x: 4, y: 11 }, up.unit),
      svg("text", { x: width - box.right, y: height - 5, "text-anchor": "end" },
        `time since the request, ${across.unit}`),
      svg("path", { class: "area", d: area }),
      svg("path", { class: "line", d: path || "M0 0" }),
      points.length === 1 ? svg("circle", { class: "dot", cx: x(last), cy: y(points[0][1]), r: 3 }) : null,
      named);
  }

  const rounds = (view) => view.record.report?.rounds ?? view.rounds;
  const policyOf = (view) => view.record.report?.policy || view.record.policy;

  // When the guest stood still, and when it ran at the destination, as the samples saw it.
  function marks(view) {
    const first = (phases) => view.samples.find((sample) => phases.includes(sample.phase));
    return [
      [first(["stopped", "committed"]), "pause"],
      [first(["post-copy"]), "runs there"],
    ].filter(([sample]) => sample).map(([sample, name]) => [sample.at_ms, name]);
  }

  function summary(view) {
    const { record } = view;
    const { report, progress } = record;
    const rows = [];
    const row = (name, value) => value && rows.push(html("div", {}, html("dt", {}, name), html("dd", {}, value)));
    row("guest", view.guest);
    row("from", view.host);
    row("to", record.to);
    row("policy", policyOf(view));
    row("begun", record.begun_unix_ms ? moment(record.begun_unix_ms) : null);
    if (report) {
      row("took", time(report.total_ms));
      row("downtime", record.status === "completed" || report.downtime_ms > 0 ? time(report.downtime_ms) : null);
      row("sent", bytes(report.bytes_wire));
      row("on average", report.total_ms > 0 ? rate(report.mbps * 1e6) : null);
      row("pages", `${number(report.pages.sent)} sent (${number(report.pages.resent)} again), `
        + `${number(report.pages.zero + report.pages.skipped)} empty`);
      row("given back meanwhile", report.freed ? bytes(report.freed.bytes) : null);
      row("memory compared", { true: "equal", false: "NOT equal" }[report.verified]);
    } else if (progress) {
      row("phase", progress.phase);
      row("for", time(progress.elapsed_ms));
      row("this round", `${number(progress.round_sent)} of ${number(progress.round_pages)} pages`);
      row("pending", bytes(progress.pending_pages * PAGE_BYTES));
      row("disks", progress.disk_total ? `${bytes(progress.disk_pending)} of ${bytes(progress.disk_total)} to go` : null);
      row("sent", bytes(progress.bytes_wire));
    }
    const sentences = [report?.error ?? view.lost, report?.why ?? view.choice].filter(Boolean);
    return [
      html("p", { class: "outcome", "data-status": record.status }, outcome(view)),
      ...sentences.map((text) => html("p", {}, text)),
      html("dl", {}, rows),
    ];
  }

  // How it stands, in words and with a sign: colour says nothing that these do not.
  function outcome(view) {
    return {
      "under-way": "▶ under way",
      completed: view.record.report?.verified === false
        ? "✗ moved, and its memory is not equal" : "✓ moved",
      failed: "✗ failed: the guest runs on at the source",
      cancelled: "■ cancelled: the guest runs on at the source",
      "in-doubt": view.lost ? "? not known" : "? in doubt: neither side runs the guest by itself",
      interrupted: "! interrupted: the guest runs at the destination and misses pages",
    }[view.record.status] ?? view.record.status;
  }

  function pending(view, width) {
    let points = view.samples.map((sample) => [sample.at_ms, sample.pending_pages * PAGE_BYTES]);
    let how = "";
    if (points.length < 2) {
      // Without samples: what each round had to send when it began.
      let at = 0;
      points = rounds(view).map((round) => {
        const point = [at, round.pages * PAGE_BYTES];
        at += round.ms;
        return point;
      });
      if (points.length) points.push([at, 0]);
      how = " (by rounds)";
    }
    if (!points.length) return null;
    const most = Math.max(...points.map(([, value]) => value));
    const title = `Pending memory over time${how}: at most ${bytes(most)}, at last ${bytes(points.at(-1)[1])}`;
    return [line(width, { title, points, units: BYTES, most, marks: marks(view) })];
  }

  function bandwidth(view, width) {
    const points = [];
    let before = { at_ms: 0, bytes_wire: 0 };
    for (const sample of view.samples) {
      // Shorter spans than this are mostly noise.
      if (sample.at_ms - before.at_ms < 50) continue;
      const sent = Math.max(0, sample.bytes_wire - before.bytes_wire);
      points.push([sample.at_ms, (sent / (sample.at_ms - before.at_ms)) * 1e3]);
      before = sample;
    }
    if (points.length < 2) return null;
    const most = Math.max(...points.map(([, value]) => value));
    const title = `Bandwidth over time: at most ${rate(most)}, at last ${rate(points.at(-1)[1])}`;
    return [line(width, { title, points, units: RATES, most, marks: marks(view) })];
  }

  // Dirtied pages by part of memory and by round.
  function heat(view, width) {
    const all = rounds(view).filter((round) => round.dirtied_regions.length);
    if (!all.length) return null;
    const share = Math.ceil(all.length / COLUMNS);
    const columns = [];
    for (let at = 0; at < all.length; at += share) {
      const part = all.slice(at, at + share);
      const regions = part[0].dirtied_regions.map((_, n) =>
        Math.max(...part.map((round) => round.dirtied_regions[n] ?? 0)));
      const name = part.length > 1 ? `rounds ${part[0].n} to ${part.at(-1).n}` : `round ${part[0].n}`;
      columns.push({ n: part[0].n, name, regions });
    }
    const parts = Math.max(...columns.map((column) => column.regions.length));
    const most = Math.max(1, ...columns.flatMap((column) => column.regions));
    // Shades double several times each: the logarithm is cut into equal parts.
    const shade = (pages) => Math.min(SHADES, 1 + Math.floor((Math.log(pages) / Math.log(most + 1)) * SHADES));
    const box = { left: 64, right: 12, top: 8, bottom: 34 };
    const tall = parts * Math.max(3, Math.floor(192 / parts));
    const height = box.top + tall + box.bottom;
    const wide = Math.min(48, (width - box.left - box.right) / columns.length);
    const high = tall / parts;
    const cells = columns.flatMap((column, x) => column.regions.map((pages, y) => (pages === 0 ? null
      : svg("rect", { class: `h${shade(pages)}`, x: (box.left + x * wide).toFixed(2), y: box.top + y * high,
        width: Math.max(0.5, wide - (wide > 6 ? 1 : 0)).toFixed(2), height: high },
        svg("title", {}, `${column.name}, part ${y + 1} of ${parts}: ${number(pages)} pages`)))));
    const every = Math.ceil(columns.length / Math.max(1, Math.floor((wide * columns.length) / 36)));
    const below = columns.filter((_, x) => x % every === 0).map((column, n) =>
      svg("text", { x: box.left + (n * every + 0.5) * wide, y: box.top + tall + 14, "text-anchor": "middle" },
        String(column.n)));
    const sums = columns[0].regions.map((_, n) => columns.reduce((sum, column) => sum + (column.regions[n] ?? 0), 0));
    const hottest = sums.indexOf(Math.max(...sums));
    const title = `Pages dirtied by part of memory and round; part ${hottest + 1} of ${parts} is dirtied most`;
    const bounds = Array.from({ length: SHADES }, (_, n) => Math.ceil((most + 1) ** (n / SHADES)));
    const legend = bounds.map((from, n) => {
      const upto = n + 1 < SHADES ? bounds[n + 1] - 1 : most;
      return upto < from ? null : html("li", {},
        swatch(`h${n + 1}`), from === upto ? number(from) : `${number(from)} to ${number(upto)}`);
    });
    return [
      picture(width, height, title,
        svg("rect", { class: "frame", x: box.left, y: box.top, width: wide * columns.length, height: tall }),
        svg("text", { x: box.left - 6, y: box.top + 10, "text-anchor": "end" }, "lowest"),
        svg("text", { x: box.left - 6, y: box.top + 24, "text-anchor": "end" }, "address"),
        svg("text", { x: box.left - 6, y: box.top + tall - 14, "text-anchor": "end" }, "highest"),
        svg("text", { x: box.left - 6, y: box.top + tall, "text-anchor": "end" }, "address"),
        cells, below,
        svg("text", { x: box.left, y: height - 5 }, "round during which the guest wrote")),
      html("ul", { class: "legend", "aria-label": "pages dirtied in one part" }, legend),
    ];
  }

  const swatch = (name) =>
    svg("svg", { width: 14, height: 14, "aria-hidden": "true" }, svg("rect", { class: name, width: 14, height: 14 }));

  // What the pause was predicted to be just before it began.
  function predicted(view) {
    // The first sample of the pause has it as it was when the policy decided.
    const stopped = view.samples.findIndex((sample) => sample.phase === "stopped");
    const until = stopped < 0 ? view.samples : view.samples.slice(0, stopped + 1);
    const known = until.filter((sample) => ["live", "draining", "stopped"].includes(sample.phase)
      && sample.predicted_downtime_ms !== null);
    return known.at(-1)?.predicted_downtime_ms ?? null;
  }

  function downtime(view, width) {
    const forecast = predicted(view);
    const report = view.record.report;
    const stopped = report && report.downtime_ms > 0;
    if (!stopped && forecast === null) return null;
    const rows = [];
    // What is predicted is a pause in which all that is pending crosses: in post-copy it follows.
    const follows = rounds(view).some((round) => round.follows) || view.samples.some((sample) => sample.phase === "post-copy");
    const name = follows ? "had nothing followed" : stopped ? "predicted before the pause" : "predicted for a pause now";
    if (forecast !== null) rows.push([name, 0, forecast, "forecast"]);
    if (stopped) {
      const parts = report.downtime;
      let at = 0;
      for (const [name, ms] of [
        ["stopping it, last dirty log", parts.quiesce_ms],
        ["last pages", parts.last_pages_ms],
        ["comparing memory", parts.verify_ms],
        ["CPU and device state", parts.state_ms],
        [view.record.status === "completed" || view.record.status === "interrupted"
          ? "commit, start there" : "running again here", parts.start_ms],
      ]) {
        if (ms > 0 || name !== "comparing memory") rows.push([name, at, ms, "part"]);
        at += ms;
      }
      rows.push(["true downtime", 0, report.downtime_ms, "whole"]);
    }
    const beside = width >= 560;
    const [left, right, step] = [beside ? 200 : 4, 80, beside ? 26 : 40];
    const most = Math.max(...rows.map(([, from, ms]) => from + ms), 1e-3);
    const x = (ms) => left + (ms / most) * (width - left - right);
    const bars = rows.map(([name, from, ms, kind], n) => {
      const y = 4 + n * step + (beside ? 0 : 16);
      return [
        svg("text", beside ? { x: left - 8, y: y + 13, "text-anchor": "end" } : { x: left, y: y - 4 }, name),
        svg("rect", { class: kind, x: x(from), y, width: Math.max(1, x(ms) - x(0)), height: 18 }),
        svg("text", { x: x(from + ms) + 6, y: y + 13 }, time(ms)),
      ];
    });
    const title = rows.map(([name, , ms]) => `${name}: ${time(ms)}`).join("; ");
    return [picture(width, rows.length * step + 8, `Downtime: ${title}`, bars)];
  }

  function faults(view, width) {
    const found = view.record.report?.faults ?? view.record.incoming?.faults;
    if (!found?.count) return null;
    // Fine buckets are joined to powers of two.
    const bins = new Map();
    for (const { upto_us: upto, count } of found.histogram) {
      const bin = Math.max(0, Math.ceil(Math.log2(Math.max(upto, 1)) - 1e-9));
      bins.set(bin, (bins.get(bin) ?? 0) + count);
    }
    const numbers = html("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "fault latencies" },
      table("Page faults that crossed the network", ["faults", "median", "99 % within", "worst", "processors waited"],
        [[number(found.count), time(found.p50_us / 1e3), time(found.p99_us / 1e3), time(found.max_us / 1e3),
          time(found.stalled_ms)]]));
    if (!bins.size) return [numbers];
    const [first, last] = [Math.min(...bins.keys()), Math.max(...bins.keys())];
    const box = { left: 56, right: 12, top: 24, bottom: 40 };
    const height = 180;
    const tall = height - box.top - box.bottom;
    const up = axis(Math.max(...bins.values()), [[1, ""]], 4);
    const wide = Math.min(60, (width - box.left - box.right) / (last - first + 1));
    const y = (count) => box.top + tall - (count / up.most) * tall;
    const bars = [];
    for (let bin = first; bin <= last; bin += 1) {
      const count = bins.get(bin) ?? 0;
      const at = box.left + (bin - first) * wide;
      bars.push(svg("rect", { class: "part", x: at + 1, y: y(count), width: wide - 2, height: box.top + tall - y(count) },
        svg("title", {}, `up to ${time(2 ** bin / 1e3)}: ${number(count)}`)));
      if ((bin - first) % Math.ceil(52 / wide) === 0) {
        bars.push(svg("text", { x: at + wide, y: box.top + tall + 15, "text-anchor": "middle" }, time(2 ** bin / 1e3)));
      }
    }
    const grid = up.ticks.map((tick) => [
      svg("line", { class: "grid", x1: box.left, x2: width - box.right, y1: y(tick), y2: y(tick) }),
      svg("text", { x: box.left - 6, y: y(tick) + 4, "text-anchor": "end" }, up.label(tick)),
    ]);
    const title = `Latencies of ${number(found.count)} page faults: median ${time(found.p50_us / 1e3)}, `
      + `99 % within ${time(found.p99_us / 1e3)}, worst ${time(found.max_us / 1e3)}`;
    return [
      picture(width, height, title, grid, bars,
        svg("text", { x: 4, y: 11 }, "faults"),
        svg("text", { x: width - box.right, y: height - 5, "text-anchor": "end" }, "answered within (each bar twice the one before)")),
      numbers,
    ];
  }

  function table(caption, head, rows) {
    return html("table", {}, html("caption", {}, caption),
      html("thead", {}, html("tr", {}, head.map((name) => html("th", { scope: "col" }, name)))),
      html("tbody", {}, rows.map((row) => html("tr", {}, row.map((cell) => html("td", {}, cell))))));
  }

  function roundsTable(view) {
    const all = rounds(view);
    if (!all.length) return null;
    const report = view.record.report;
    const moved = report && ["completed", "interrupted"].includes(view.record.status);
    const note = (round, at) => (round.follows ? "followed the guest"
      : moved && at === all.length - 1 ? "in the pause" : "");
    const rows = all.map((round, at) => [
      String(round.n), number(round.pages), bytes(round.bytes), time(round.ms),
      round.ms > 0 ? rate((round.bytes / round.ms) * 1e3) : "–", number(round.dirtied), note(round, at),
    ]);
    const left = report?.rounds_omitted ? `; ${number(report.rounds_omitted)} in the middle are left out` : "";
    return [html("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "rounds" },
      table(`${number(all.length)} rounds${left}`, ["round", "pages", "sent", "time", "rate", "dirtied", "note"], rows))];
  }

  const PANELS = [
    [null, summary],
    ["Pending memory", pending],
    ["Bandwidth", bandwidth],
    ["Downtime: predicted and true", downtime],
    ["Dirty pages", heat],
    ["Page faults in post-copy", faults],
    ["Rounds", roundsTable],
  ];
  const drawn = new WeakMap();

  // Draws `view` into `root`, or draws it again where something has changed.
  function draw(root, view) {
    // Text is as large as elsewhere on the page: a unit of the pictures is a pixel.
    const width = Math.max(260, Math.min(1100, Math.floor(root.clientWidth) || 720));
    const key = `${width} ${JSON.stringify(view)}`;
    let known = drawn.get(root);
    if (known?.key === key) return;
    if (!known) {
      const panels = PANELS.map(([heading, make]) => {
        const body = html("div");
        const section = html("section", {}, heading === null ? null : html("h3", {}, heading), body);
        return { section, body, make };
      });
      root.replaceChildren(...panels.map((panel) => panel.section));
      known = { panels };
      drawn.set(root, known);
    }
    known.key = key;
    for (const { section, body, make } of known.panels) {
      const nodes = make(view, width);
      section.hidden = nodes === null;
      // Where the user has scrolled to stays.
      const scrolled = body.querySelector(".scroll");
      const [left, top] = [scrolled?.scrollLeft ?? 0, scrolled?.scrollTop ?? 0];
      body.replaceChildren(...(nodes ?? []));
      body.querySelector(".scroll")?.scrollTo(left, top);
    }
  }

  return { draw, outcome, table, html, bytes, time, number, moment };
})();
