//! A headless Chromium, driven by its own protocol over a pair of pipes (`--remote-debugging-pipe`:
//! JSON messages that end with a zero byte).

use crate::TIMEOUT;
use serde_json::{Value, json};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A browser with one page. Dropping it ends the browser.
#[derive(Debug)]
pub struct Browser {
    child: Child,
    to: File,
    from: Receiver<Value>,
    asked: u64,
    session: Option<String>,
    errors: Vec<String>,
    _profile: TempDir,
}

impl Browser {
    /// Debian's Chromium; says loudly where it is missing.
    ///
    /// # Panics
    /// When it cannot be driven.
    pub fn start(what: &str) -> Option<Self> {
        let found = Command::new("chromium").arg("--version").output();
        if !found.is_ok_and(|out| out.status.success()) {
            eprintln!("NOT RUN: {what}: there is no chromium (Debian package chromium)");
            return None;
        }
        let profile = tempfile::tempdir().unwrap();
        let pipes = ["to", "from"].map(|name| profile.path().join(name));
        for pipe in &pipes {
            nix::unistd::mkfifo(pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        }
        // The shell opens descriptors 3 and 4, on which Chromium listens and answers.
        let child = Command::new("sh")
            .args([
                "-c",
                r#"to=$1 from=$2; shift 2; exec chromium "$@" 3<"$to" 4>"$from""#,
                "sh",
            ])
            .args(&pipes)
            .args(["--headless", "--remote-debugging-pipe", "--no-sandbox"])
            .args([
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-sync",
            ])
            .args([
                "--disable-background-networking",
                "--disable-component-update",
            ])
            .args(["--disable-dev-shm-usage", "--hide-scrollbars"])
            .arg(format!(
                "--user-data-dir={}",
                profile.path().join("profile").display()
            ))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let to = OpenOptions::new().write(true).open(&pipes[0]).unwrap();
        let mut answers = BufReader::new(File::open(&pipes[1]).unwrap());
        let (heard, from) = channel();
        std::thread::spawn(move || {
            let mut message = Vec::new();
            while matches!(answers.read_until(0, &mut message), Ok(n) if n > 0) {
                message.pop();
                let value = serde_json::from_slice(&message).unwrap_or(Value::Null);
                message.clear();
                if heard.send(value).is_err() {
                    break;
                }
            }
        });
        let mut browser = Self {
            child,
            to,
            from,
            asked: 0,
            session: None,
            errors: Vec::new(),
            _profile: profile,
        };
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"}));
        let wanted = json!({"targetId": target["targetId"], "flatten": true});
        let session = browser.call("Target.attachToTarget", wanted);
        browser.session = Some(session["sessionId"].as_str().unwrap().to_owned());
        for domain in ["Page", "Runtime", "Log"] {
            browser.call(&format!("{domain}.enable"), json!({}));
        }
        Some(browser)
    }

    /// One command of the protocol.
    fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.asked += 1;
        let mut message = json!({"id": self.asked, "method": method, "params": parameters});
        if let Some(session) = &self.session {
            message["sessionId"] = session.as_str().into();
        }
        self.to
            .write_all(format!("{message}\0").as_bytes())
            .unwrap();
        loop {
            let answer = self.from.recv_timeout(TIMEOUT).expect(method);
            if answer["id"] == self.asked {
                assert!(answer["error"].is_null(), "{method}: {answer}");
                return answer["result"].clone();
            }
            self.note(&answer);
        }
    }

    /// Notes what the browser says of a page's faults.
    fn note(&mut self, event: &Value) {
        let said = &event["params"];
        let is_fault = match event["method"].as_str() {
            Some("Runtime.exceptionThrown") => true,
            Some("Runtime.consoleAPICalled") => ["error", "warning", "assert"]
                .iter()
                .any(|kind| said["type"] == *kind),
            Some("Log.entryAdded") => ["error", "warning"]
                .iter()
                .any(|level| said["entry"]["level"] == *level),
            _ => false,
        };
        if is_fault {
            self.errors.push(said.to_string());
        }
    }

    /// Opens a page and waits until it is there.
    pub fn open(&mut self, url: &str) {
        let opened = self.call("Page.navigate", json!({"url": url}));
        assert!(opened["errorText"].is_null(), "{url}: {opened}");
        let began = Instant::now();
        while self.eval("document.readyState + location.href") != format!("complete{url}") {
            assert!(began.elapsed() < TIMEOUT, "{url} does not load");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What an expression is in the page.
    pub fn eval(&mut self, expression: &str) -> Value {
        let wanted = json!({"expression": expression, "returnByValue": true, "awaitPromise": true});
        let result = self.call("Runtime.evaluate", wanted);
        assert!(
            result["exceptionDetails"].is_null(),
            "{expression}: {result}"
        );
        result["result"]["value"].clone()
    }

    /// Shows the page so wide, and light or dark.
    pub fn show(&mut self, width: u32, dark: bool) {
        let size = json!({"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": false});
        self.call("Emulation.setDeviceMetricsOverride", size);
        let scheme = if dark { "dark" } else { "light" };
        let media = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
        self.call("Emulation.setEmulatedMedia", media);
        // The page draws itself again in the frame after the next.
        self.eval("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 50))))");
    }

    /// Errors and warnings of the console so far.
    pub fn errors(&mut self) -> &[String] {
        while let Ok(event) = self.from.try_recv() {
            self.note(&event);
        }
        &self.errors
    }

    /// Keeps a picture of the whole page in the folder `FERRY_SCREENSHOTS`, if that is set: for a
    /// person to look at.
    pub fn picture(&mut self, name: &str) {
        let Some(folder) = std::env::var_os("FERRY_SCREENSHOTS") else {
            return;
        };
        let shot = self.call(
            "Page.captureScreenshot",
            json!({"captureBeyondViewport": true}),
        );
        let path = Path::new(&folder).join(format!("{name}.png"));
        let mut decoder = Command::new("base64")
            .arg("-d")
            .stdin(Stdio::piped())
            .stdout(File::create(path).unwrap())
            .spawn()
            .unwrap();
        let mut data = decoder.stdin.take().unwrap();
        data.write_all(shot["data"].as_str().unwrap().as_bytes())
            .unwrap();
        drop(data);
        assert!(decoder.wait().unwrap().success());
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Asked to, it ends its own processes as well, and leaves its folder alone.
        let ends = self
            .to
            .write_all(b"{\"id\":0,\"method\":\"Browser.close\"}\0");
        for _ in 0..if ends.is_ok() { 200 } else { 0 } {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
