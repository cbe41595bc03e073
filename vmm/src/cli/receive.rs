//! `ferry receive`.

use super::output::{Failure, say};
use super::serial::{Serial, Spool};
use super::serve::{Signals, bind, serve};
use ferry_vmm::migrate::{Arrival, Receiver, Uri};
use ferry_vmm::vmm::{MachineGuest, Vmm};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

/// Wait for a guest to be migrated here, then be its VMM.
///
/// The guest's size and processors come with it. A migration that fails before the guest has moved leaves this waiting for
/// the next. The keys and signals of `ferry run` work here too.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ferry receive tcp:0.0.0.0:7000 --api /tmp/b.sock")]
pub struct Args {
    /// Where to wait: tcp:HOST:PORT or unix:PATH.
    #[arg(value_name = "URI")]
    uri: Uri,
    /// The control socket to make; by default in $XDG_RUNTIME_DIR or /tmp.
    #[arg(long, value_name = "SOCKET")]
    api: Option<PathBuf>,
    /// Where the guest's serial port goes: stdio, file:PATH or null.
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    serial: Serial,
}

pub fn run(args: &Args) -> Result<ExitCode, Failure> {
    let signals = Signals::take()?;
    let spool = args.serial.open()?;
    let output = spool.clone();
    let serial = move || Ok(Box::new(Spool::clone(&output)) as Box<dyn Write + Send>);
    let receiver = Arc::new(Receiver::bind(&args.uri, Arc::new(serial))?);
    let uri = receiver.local_uri().to_string();
    let vmm = Vmm::receiving(uri.clone(), Arc::clone(&receiver) as _)?;
    let server = bind(args.api.as_deref(), None, &vmm)?;
    say(&format!("waiting on {uri} for a guest"));
    let receiving = vmm.clone();
    std::thread::Builder::new()
        .name("ferry-receive".into())
        .spawn(move || receive(&receiver, &receiving))?;
    serve(&vmm, server, signals, &args.serial, &spool)
}

/// Waits for a guest, and afterwards for sources that ask what became of it.
fn receive(receiver: &Receiver, vmm: &Vmm) {
    loop {
        match receiver.wait(Duration::from_secs(3600)) {
            None => {}
            Some(Arrival::Failed(why)) => {
                vmm.arrival_failed();
                say(&format!("{why}; waiting for the next"));
            }
            Some(Arrival::InDoubt(why)) => {
                vmm.arrival_in_doubt();
                say(&format!(
                    "{why}; `ferry recover` at the source ends the doubt, or `ferry recover --take-over` here if the source \
                     certainly does not run it"
                ));
            }
            Some(Arrival::Arrived(machine)) => {
                let guest = MachineGuest::new(machine);
                vmm.arrived(Arc::clone(&guest) as _, guest.runs());
                say("the guest has arrived");
                if let Err(e) = guest.watch(vmm) {
                    // It runs, and that matters more; only its own end will go unnoticed.
                    say(&format!(
                        "cannot watch for the guest's end ({e}); end it with `ferry stop`"
                    ));
                }
            }
        }
    }
}
