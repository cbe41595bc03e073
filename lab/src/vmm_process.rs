//! A VMM process that the laboratory starts, drives over its control socket, and ends.

use ferry_guest_images::Line;
use ferry_terminal::output::Failure;
use ferry_vmm::api::client::Client;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a step may take before it has failed: this is for hosts that hang, not a speed limit.
pub const TIMEOUT: Duration = Duration::from_secs(240);
/// How often files and sockets are looked at.
pub const LOOK: Duration = Duration::from_millis(20);

/// What a run of the guest's kernel came to.
pub struct KernelRun {
    pub run: u64,
    pub verified: bool,
    pub mops: f64,
    pub seconds: f64,
    pub gap_max_us: u64,
    pub text: String,
}

/// One of these processes.
pub struct VmmProcess {
    name: &'static str,
    child: Child,
    api: PathBuf,
    console: PathBuf,
    errors: PathBuf,
}

impl Drop for VmmProcess {
    fn drop(&mut self) {
        // Those that moved their guest have ended by themselves.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl VmmProcess {
    pub fn start(dir: &Path, name: &'static str, arguments: &[&str]) -> Result<Self, Failure> {
        let file = |kind: &str| dir.join(format!("{name}.{kind}"));
        let (api, console, errors) = (file("sock"), file("console"), file("errors"));
        let child = Command::new(std::env::current_exe()?)
            .args(arguments)
            .arg("--api")
            .arg(&api)
            .arg("--serial")
            .arg(format!("file:{}", console.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&errors)?)
            .spawn()?;
        let mut host = Self {
            name,
            child,
            api,
            console,
            errors,
        };
        let client = host.client();
        host.until("answer on its control socket", |_| {
            Ok(client.status().ok().map(drop))
        })?;
        Ok(host)
    }

    pub fn client(&self) -> Client {
        Client::new(&self.api)
    }

    /// Waits until `look` finds something, as long as the process lives.
    pub fn until<T>(
        &mut self,
        what: &str,
        look: impl Fn(&Self) -> Result<Option<T>, Failure>,
    ) -> Result<T, Failure> {
        let began = Instant::now();
        loop {
            if let Some(found) = look(self)? {
                return Ok(found);
            }
            if let Some(status) = self.child.try_wait()? {
                let said = fs::read_to_string(&self.errors).unwrap_or_default();
                let said = said.trim().trim_start_matches("ferry: ");
                return Err(Failure(format!(
                    "process {} ended too early ({status}): {said}",
                    self.name
                )));
            }
            if began.elapsed() > TIMEOUT {
                return Err(Failure(format!(
                    "process {} did not {what} within {TIMEOUT:?}",
                    self.name
                )));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// The result of the first run numbered `from` or later on this host's console.
    pub fn result(&mut self, from: u64) -> Result<KernelRun, Failure> {
        self.until("see the guest finish a run of its kernel", |host| {
            let console = fs::read_to_string(&host.console).unwrap_or_default();
            for line in console.lines() {
                match Line::parse(line) {
                    Some(Line::Result(r)) if r.run >= from => {
                        return Ok(Some(KernelRun {
                            run: r.run,
                            verified: r.verified,
                            mops: r.mops,
                            seconds: r.seconds,
                            gap_max_us: r.gaps.max_us,
                            text: format!("value {:.12e}, reference {:.12e}", r.value, r.reference),
                        }));
                    }
                    Some(Line::Error(_) | Line::Fault { .. }) => {
                        return Err(Failure(format!("the guest says: {}", line.trim())));
                    }
                    _ => {}
                }
            }
            Ok(None)
        })
    }
}
