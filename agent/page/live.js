"use strict";
// The agent's page: asks it again and again, while it can be seen.
{
  const { draw, outcome, table, html, bytes, time, number } = ferryMigration;
  // Milliseconds between two questions, and where a guest moves.
  const CALM = 1000;
  const MOVING = 250;
  const PATIENCE = 5000;

  const part = (id) => document.getElementById(id);
  const shown = { chosen: null, byHand: false, version: null, tables: new Map(), buttons: new Map() };

  async function ask(path) {
    const response = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
    if (response.status === 404) return null;
    if (!response.ok) throw new Error(`${response.status}`);
    return response.json();
  }

  function put(node, text) {
    if (node.textContent !== text) node.textContent = text;
  }

  // A table is made again only where something in it has changed.
  function putTable(id, caption, head, rows) {
    const key = JSON.stringify([caption, rows]);
    if (shown.tables.get(id) === key) return;
    shown.tables.set(id, key);
    const made = table(caption, head, rows.map((row) => row.map((cell) =>
      (cell !== null && typeof cell === "object" ? html("span", { "data-status": cell.state }, cell.state) : cell))));
    part(id).replaceChildren(made);
  }

  function putHosts(overview) {
    const row = (host, place, state) => [
      place, { state }, host?.version ?? "–", host ? number(host.processors) : "–",
      host?.memory_available_bytes ? bytes(host.memory_available_bytes) : "–",
      host ? host.guests.join(", ") || "none" : "–",
    ];
    const rows = [row(overview.host, `${overview.host.name} (this host)`, "answers")];
    const why = [];
    for (const peer of overview.peers) {
      rows.push(row(peer.host, peer.place, peer.error ? "no-answer" : peer.host ? "answers" : "is asked"));
      if (peer.error) why.push(peer.error);
    }
    put(part("peers"), why.join("; "));
    putTable("hosts", "this host and its peers",
      ["host", "state", "ferry", "processors", "memory left", "guests"], rows);
  }

  function putGuests(overview) {
    const rows = overview.guests.map((guest) => [
      guest.name, { state: guest.state }, guest.cpus === null ? "–" : number(guest.cpus),
      guest.memory_bytes === null ? "–" : bytes(guest.memory_bytes),
      guest.since_unix_ms === null ? "–" : up(overview.unix_ms - guest.since_unix_ms),
      guest.to ? `to ${guest.to}` : guest.state === "running" ? "" : guest.explanation,
    ]);
    const more = overview.guests_left_out;
    putTable("guests", more ? `${number(more)} more are not shown: see ferry ps` : "those with a name",
      ["guest", "state", "CPUs", "memory", "up", "note"], rows);
  }

  // Whole seconds, minutes or hours: a row changes seldom.
  function up(ms) {
    const seconds = Math.max(0, Math.floor(ms / 1000));
    return time((seconds < 60 ? seconds : seconds < 3600 ? seconds - (seconds % 60) : seconds - (seconds % 360)) * 1000);
  }

  function putList(overview) {
    const { migrations } = overview;
    part("none").hidden = migrations.length > 0;
    const list = part("list");
    for (const [id, button] of shown.buttons) {
      if (!migrations.some((migration) => migration.id === id)) {
        button.parentElement.remove();
        shown.buttons.delete(id);
      }
    }
    for (const migration of migrations) {
      let button = shown.buttons.get(migration.id);
      if (!button) {
        button = html("button", { type: "button", "aria-pressed": "false" });
        button.addEventListener("click", () => {
          Object.assign(shown, { chosen: migration.id, byHand: true, version: null });
          wake();
        });
        shown.buttons.set(migration.id, button);
        list.prepend(html("li", {}, button));
      }
      const { status, verified, lost } = migration;
      const short = outcome({ record: { status, report: { verified } }, lost }).split(":")[0];
      put(button, `${migration.guest}: ${short}`);
    }
    const known = migrations.some((migration) => migration.id === shown.chosen);
    const newest = migrations.at(-1)?.id ?? null;
    if (!known || (!shown.byHand && shown.chosen !== newest)) {
      Object.assign(shown, { chosen: newest, byHand: false, version: null });
    }
    for (const [id, button] of shown.buttons) {
      button.setAttribute("aria-pressed", String(id === shown.chosen));
    }
  }

  async function putMigration(overview) {
    const root = part("migration");
    const entry = overview.migrations.find((migration) => migration.id === shown.chosen);
    root.hidden = !entry;
    if (!entry || shown.version === entry.version) return;
    const view = await ask(`v1/migrations/${encodeURIComponent(entry.id)}`);
    // Another may have been chosen meanwhile.
    if (!view || shown.chosen !== entry.id) return;
    shown.version = entry.version;
    shown.view = view;
    draw(root, view);
  }

  async function step() {
    const overview = await ask("v1/overview");
    put(part("name"), ` on ${overview.host.name}`);
    put(part("connection"), "what the agent says now");
    if (document.title !== `ferry on ${overview.host.name}`) document.title = `ferry on ${overview.host.name}`;
    putHosts(overview);
    putGuests(overview);
    putList(overview);
    await putMigration(overview);
    return overview.migrations.some((migration) => migration.status === "under-way") ? MOVING : CALM;
  }

  let wake = () => {};
  function rest(ms) {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, ms);
      wake = () => { clearTimeout(timer); resolve(); };
    });
  }

  async function run() {
    for (;;) {
      let wait = CALM;
      if (!document.hidden) {
        try {
          wait = await step();
        } catch {
          put(part("connection"), "the agent does not answer; what is shown is what it said last");
        }
      }
      await rest(wait);
    }
  }

  document.addEventListener("visibilitychange", () => wake());
  new ResizeObserver(() => { if (shown.view) draw(part("migration"), shown.view); }).observe(part("migration"));
  run();
}
