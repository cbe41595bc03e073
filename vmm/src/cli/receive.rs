//! `ferry receive`.

use super::output::{Failure, say};
use super::serial::{Serial, Spool};
use super::serve::{Signals, bind, serve};
use ferry_vmm::migrate::{ReceiveState, Receiver, Uri};
use ferry_vmm::vmm::{MachineGuest, Vmm};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// Wait for a guest to be migrated here, then be its VMM.
///
/// The guest's size and processors come with it. A migration that fails before the guest has moved leaves this waiting for
/// the next. The keys and signals of `ferry run` work here too.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ferry receive tcp:0.0.0.0:7000 --api /tmp/b.sock")]
pub struct Args {
    /// Where to wait: tcp:HOST:PORT, unix:PATH or file:PATH.
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
    let receiver = Receiver::bind(&args.uri, move || {
        Ok(Box::new(Spool::clone(&output)) as Box<dyn Write + Send>)
    })?;
    let uri = receiver.local_uri().to_string();
    let vmm = Vmm::receiving(uri.clone())?;
    let server = bind(args.api.as_deref(), None, &vmm)?;
    say(&format!("waiting on {uri} for a guest"));
    let receiving = vmm.clone();
    std::thread::Builder::new()
        .name("ferry-receive".into())
        .spawn(move || receive(&receiver, &receiving))?;
    serve(&vmm, server, signals, &args.serial, &spool)
}

fn receive(receiver: &Receiver, vmm: &Vmm) {
    match receiver.wait(&ReceiveState::default(), &mut |notice| say(notice)) {
        Ok(machine) => {
            let guest = MachineGuest::new(machine);
            vmm.arrived(std::sync::Arc::clone(&guest) as _);
            say("the guest has arrived and runs here");
            if let Err(e) = guest.watch(vmm) {
                // It runs, and that matters more; only its own end will go unnoticed.
                say(&format!(
                    "cannot watch for the guest's end ({e}); end it with `ferry stop`"
                ));
            }
        }
        Err(e) => vmm.never_arrives(e.to_string()),
    }
}
