//! Two hosts on one machine, each with a folder of guests of its own, and an agent on one of them.
#![allow(clippy::unwrap_used, clippy::panic)]

use ferry_tests::browser::Browser;
use ferry_tests::pki::{Authority, Certificates};
use ferry_tests::{Ran, ferry, guests_run, run_by, until};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

const WORK: &str = "dirty:wss=4M,rate=500";

/// A host: its guests' names are in a folder of its own.
struct Place {
    folder: TempDir,
    started: Vec<Child>,
}

impl Place {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            started: Vec::new(),
        }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(ferry());
        command.env("RUNTIME_DIRECTORY", self.folder.path());
        command
    }

    fn ferry(&self, args: &[&str]) -> Ran {
        let mut command = self.command();
        command.args(args);
        run_by(command)
    }

    fn guest(&mut self, name: &str) {
        let mut command = self.command();
        command.args(["run", "--nas", WORK, "--memory", "32M", "--name", name]);
        command.args(["--serial", "null"]).stderr(Stdio::null());
        self.started.push(command.spawn().unwrap());
        until("the guest runs", || self.state(name) == "running");
    }

    /// An agent, and where it listens.
    fn agent(&mut self, certificates: &Certificates, more: &[&str]) -> String {
        self.agent_saying(certificates, more, ["listens on "])
            .concat()
    }

    /// An agent, and what follows these words of its first lines.
    fn agent_saying<const N: usize>(
        &mut self,
        certificates: &Certificates,
        more: &[&str],
        words: [&str; N],
    ) -> [String; N] {
        let mut command = self.command();
        command.args([
            "agent",
            "--listen",
            "127.0.0.1:0",
            "--tls",
            certificates.text(),
        ]);
        let mut child = command.args(more).stderr(Stdio::piped()).spawn().unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap());
        self.started.push(child);
        let found = words.map(|words| {
            let mut line = String::new();
            said.read_line(&mut line).unwrap();
            let (_, rest) = line.trim().split_once(words).expect(&line);
            rest.to_owned()
        });
        std::thread::spawn(move || said.lines().for_each(drop));
        found
    }

    fn guests(&self) -> Vec<Value> {
        let ran = self.ferry(&["ps", "--json"]);
        let list: Value = serde_json::from_str(&ran.stdout).unwrap();
        list["guests"].as_array().unwrap().clone()
    }

    fn state(&self, name: &str) -> String {
        let guests = self.guests();
        let found = guests.iter().find(|guest| guest["name"] == name);
        found.map_or("none".into(), |guest| {
            guest["state"].as_str().unwrap().to_owned()
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for guest in self.guests() {
            self.ferry(&["stop", guest["name"].as_str().unwrap()]);
        }
        for child in &mut self.started {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn a_guest_is_moved_to_a_host_and_what_cannot_come_is_told_before() {
    if !guests_run() {
        return;
    }
    let authority = Authority::default();
    let certificates = authority.host("hostb");
    let (mut here, mut there) = (Place::new(), Place::new());
    let host = there.agent(&certificates, &[]);
    here.guest("web");
    here.guest("db");
    there.guest("db");
    let tls = ["--tls", certificates.text(), "--quiet"];
    // What the other host lacks, and who may not ask it.
    let ran = here.ferry(&[&["migrate", "db", &host], &tls[..]].concat());
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(
        ran.stderr
            .contains("a guest of the name db is here already"),
        "{ran:?}"
    );
    let strange = Authority::default().host("hostb");
    let ran = here.ferry(&["migrate", "web", &host, "--tls", strange.text()]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stderr.contains("is of another authority"), "{ran:?}");
    let late = authority.host_of(&["hostb"], 2001);
    let ran = here.ferry(&["migrate", "web", &host, "--tls", late.text()]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(
        ran.stderr.contains("this host's certificate has expired"),
        "{ran:?}"
    );
    let choosy = there.agent(&certificates, &["--tls-authz", "hostc"]);
    let ran = here.ferry(&[&["migrate", "web", &choosy], &tls[..]].concat());
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(
        ran.stderr.contains("none of the names of --tls-authz"),
        "{ran:?}"
    );
    let ran = here.ferry(&["migrate", "web", "no.such.host.invalid", tls[0], tls[1]]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(
        ran.stderr.contains("no.such.host.invalid is not reached"),
        "{ran:?}"
    );
    // A migration that ends here leaves no receiver there.
    let mut slow = here.command();
    slow.args(["migrate", "web", &host, "--bandwidth", "1M"])
        .args(tls);
    let slow = std::thread::spawn(move || run_by(slow));
    until("the guest is on its way", || {
        here.state("web") == "migrating"
    });
    assert_eq!(there.state("web"), "receiving");
    until("it is cancelled", || {
        here.ferry(&["cancel", "web"]).code == Some(0)
    });
    let ran = slow.join().unwrap();
    assert_eq!(ran.code, Some(3), "{ran:?}");
    until("the receiver has ended", || there.state("web") == "none");
    assert_eq!(here.state("web"), "running");

    let ran = here.ferry(&[&["migrate", "web", &host, "--verify"], &tls[..]].concat());
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(there.state("web"), "running");
    until("its old VMM has ended", || here.state("web") == "none");
    assert_eq!(here.state("db"), "running");
}

#[test]
fn a_host_is_emptied_and_its_guests_outlive_the_agent() {
    if !guests_run() {
        return;
    }
    let certificates = Authority::default().host("hostb");
    let (mut here, mut there) = (Place::new(), Place::new());
    let host = there.agent(&certificates, &[]);
    let agent = there.started.len() - 1;
    let names = ["a", "b", "c"];
    names.iter().for_each(|name| here.guest(name));
    let evacuate = |more: &[&str]| {
        let args = [
            "evacuate",
            "--to",
            &host,
            "--tls",
            certificates.text(),
            "--json",
        ];
        let ran = here.ferry(&[&args, more].concat());
        let printed: Value =
            serde_json::from_str(&ran.stdout).unwrap_or_else(|e| panic!("{e} {ran:?}"));
        (ran, printed)
    };
    let (ran, plan) = evacuate(&["--dry-run"]);
    assert_eq!(
        (ran.code, &plan["code"]),
        (Some(0), &"planned".into()),
        "{ran:?}"
    );
    assert!(names.iter().all(|name| here.state(name) == "running"));
    assert!(there.guests().is_empty());
    let (ran, result) = evacuate(&["--parallel", "2"]);
    assert_eq!(
        (ran.code, &result["code"]),
        (Some(0), &"moved".into()),
        "{ran:?}"
    );
    let rows = result["guests"].as_array().unwrap();
    assert_eq!(rows.len(), 3, "{result:#}");
    assert!(
        rows.iter()
            .all(|row| row["downtime_ms"].as_f64().unwrap() > 0.0),
        "{result:#}"
    );
    there.started[agent].kill().unwrap();
    there.started[agent].wait().unwrap();
    assert!(names.iter().all(|name| there.state(name) == "running"));
    until("nothing is left", || here.guests().is_empty());
    // Without an agent nothing moves, and that is one sentence.
    here.guest("d");
    let args = ["evacuate", "--to", &host, "--tls", certificates.text()];
    let ran = here.ferry(&args);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(
        ran.stderr.contains("does `ferry agent` run there?"),
        "{ran:?}"
    );
    assert_eq!(here.state("d"), "running");
}

/// What is wrong with how a page looks: something wider than the window, text that its background
/// swallows, pictures without words, tables without heads.
const FAULTS: &str = r#"(() => {
    const faults = [];
    const wide = document.documentElement.scrollWidth;
    if (wide > innerWidth) faults.push(`${wide} pixels wide in ${innerWidth}`);
    const light = (colour) => {
        const parts = colour.match(/[\d.]+/g).slice(0, 3).map((n) => n / 255)
            .map((n) => (n <= 0.04045 ? n / 12.92 : ((n + 0.055) / 1.055) ** 2.4));
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
    };
    const behind = (node) => {
        for (; node; node = node.parentElement) {
            const colour = getComputedStyle(node).backgroundColor;
            if (colour !== "rgba(0, 0, 0, 0)") return colour;
        }
        return "rgb(255, 255, 255)";
    };
    for (const node of document.querySelectorAll("h1, p, dt, dd, th, td, td span, caption, button, svg text")) {
        if (!node.textContent.trim() || !node.getClientRects().length) continue;
        const style = getComputedStyle(node);
        const pair = [node instanceof SVGElement ? style.fill : style.color, behind(node)].map(light);
        const contrast = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
        // WCAG 2.2, level AA.
        if (contrast < 4.5) faults.push(`contrast ${contrast.toFixed(1)}: ${node.textContent}`);
    }
    for (const picture of document.querySelectorAll("svg:not([aria-hidden])")) {
        if (picture.getAttribute("role") !== "img" || !picture.querySelector("title")?.textContent) {
            faults.push("a picture says nothing to who does not see it");
        }
        for (const text of picture.querySelectorAll("text")) {
            const [inner, outer] = [text, picture].map((node) => node.getBoundingClientRect());
            if (inner.left < outer.left - 1 || inner.right > outer.right + 1) {
                faults.push(`cut off: ${text.textContent}`);
            }
        }
    }
    for (const table of document.querySelectorAll("table")) {
        if (!table.querySelector("th[scope]") || !table.caption) faults.push("a table without heads");
    }
    return faults.join("; ");
})()"#;

/// How the migration that is shown stands, and what is drawn of it.
const STATUS: &str = "document.querySelector('#migration .outcome')?.dataset.status ?? 'none'";
const DRAWN: &str = "[...document.querySelectorAll('#migration section:not([hidden]) h3')].map((node) => node.textContent).join()";
const ROUNDS: &str = "document.querySelector('#migration table').innerText";

fn looks_well(browser: &mut Browser, name: &str) {
    for (width, dark) in [(1280, false), (1280, true), (400, true), (400, false)] {
        browser.show(width, dark);
        let which = format!("{name}-{width}-{}", if dark { "dark" } else { "light" });
        browser.picture(&which);
        assert_eq!(browser.eval(FAULTS), "", "{which}");
    }
}

#[test]
fn a_migration_is_watched_in_a_browser_from_begin_to_end() {
    if !guests_run() {
        return;
    }
    let Some(mut browser) = Browser::start("the agent's page in a browser") else {
        return;
    };
    let certificates = Authority::default().host("hostb");
    let (mut here, mut there) = (Place::new(), Place::new());
    let host = there.agent(&certificates, &[]);
    let config = here.folder.path().join("agent.toml");
    // No agent listens on port 1.
    std::fs::write(&config, format!("peers = [{host:?}, \"127.0.0.1:1\"]\n")).unwrap();
    let more = [
        "--config",
        config.to_str().unwrap(),
        "--page",
        "127.0.0.1:0",
    ];
    let [_, page] = here.agent_saying(&certificates, &more, ["listens on ", "its page is "]);
    here.guest("web");

    browser.show(1280, false);
    browser.open(&page);
    let rows = |browser: &mut Browser, id: &str| {
        let rows = format!(
            "[...document.querySelectorAll('#{id} tbody tr')].map((row) => row.innerText).join(' | ')"
        );
        browser.eval(&rows).as_str().unwrap_or_default().to_owned()
    };
    until("the guest is shown", || {
        rows(&mut browser, "guests").contains("web\trunning")
    });
    until("the peers are shown", || {
        let rows = rows(&mut browser, "hosts");
        rows.contains(&format!("{host}\tanswers")) && rows.contains("127.0.0.1:1\tno-answer")
    });
    assert_eq!(browser.eval(STATUS), "none");

    let file = here.folder.path().join("move.html");
    let mut command = here.command();
    command.args(["migrate", "web", &host, "--tls", certificates.text()]);
    command
        .args(["--bandwidth", "4M", "--quiet", "--html"])
        .arg(&file);
    let moving = std::thread::spawn(move || run_by(command));
    until("the migration is shown while it runs", || {
        browser.eval(STATUS) == "under-way"
            && browser
                .eval(DRAWN)
                .as_str()
                .unwrap_or_default()
                .contains("Bandwidth")
    });
    browser.picture("moving");
    let ran = moving.join().unwrap();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    until("its end is shown", || browser.eval(STATUS) == "completed");
    let drawn = "Pending memory,Bandwidth,Downtime: predicted and true,Dirty pages,Rounds";
    assert_eq!(browser.eval(DRAWN), drawn);
    until("the guest is gone from here", || {
        rows(&mut browser, "guests").is_empty()
    });
    looks_well(&mut browser, "page");
    assert!(browser.errors().is_empty(), "{:#?}", browser.errors());

    // The file shows the same, of the same migration.
    let on_page = browser.eval(ROUNDS);
    let url = format!("file://{}", file.display());
    browser.open(&url);
    assert_eq!(browser.eval(DRAWN), drawn);
    assert_eq!(browser.eval(ROUNDS), on_page);
    looks_well(&mut browser, "file");

    // One that fails is drawn too; a file that is there is not replaced, and nothing moves.
    here.guest("db");
    let ran = here.ferry(&[
        "migrate",
        "db",
        "unix:/nowhere",
        "--html",
        file.to_str().unwrap(),
    ]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stderr.contains("exists already"), "{ran:?}");
    let failed = here.folder.path().join("failed.html");
    let ran = here.ferry(&[
        "migrate",
        "db",
        "unix:/nowhere",
        "--html",
        failed.to_str().unwrap(),
    ]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    browser.open(&format!("file://{}", failed.display()));
    assert_eq!(browser.eval(STATUS), "failed");
    looks_well(&mut browser, "failed");
    assert_eq!(here.state("db"), "running");
    assert!(browser.errors().is_empty(), "{:#?}", browser.errors());

    let ran = here.ferry(&[
        "agent",
        "--tls",
        certificates.text(),
        "--listen",
        "127.0.0.1:0",
        "--page",
        "0.0.0.0:0",
    ]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stderr.contains("give a loopback address"), "{ran:?}");
}
