//! `ferry receive`.

use super::output::{Failure, say};
use super::serve::{Place, Signals, bind, serve};
use ferry_vmm::machine::RunState;
use ferry_vmm::migrate::{Arrival, ReceiveState, Receiver, Uri};
use ferry_vmm::vmm::{MachineGuest, Vmm};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

/// How often the thread that waits for arrivals looks whether the VMM still exists.
const PATIENCE: Duration = Duration::from_millis(200);

/// Wait for a guest to be migrated here, then be its VMM.
///
/// The guest's size and processors come with it; what is behind its disks and network cards here is to be given, in the
/// same order. A migration that fails before the guest has moved leaves this waiting for
/// the next. The keys and signals of `ferry run` work here too.
///
/// On unix:PATH the guest comes from a process on this host, which hands over the memory itself instead of copying it: the
/// way to go on under a newer ferry.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  ferry receive tcp:0.0.0.0:7000 --api /tmp/b.sock
  ferry receive tcp:0.0.0.0:7000 --api /tmp/b.sock --disk /net/disk.img --net tap=tap0
  ferry receive unix:/tmp/link --api /tmp/b.sock")]
pub struct Args {
    /// Where to wait: tcp:HOST:PORT (port 0 takes a free one) or unix:PATH.
    #[arg(value_name = "URI")]
    uri: Uri,
    #[command(flatten)]
    place: Place,
}

pub fn run(args: &Args) -> Result<ExitCode, Failure> {
    let signals = Signals::take()?;
    let (spool, serial) = args.place.console()?;
    let receiver = Arc::new(Receiver::bind_with(
        &args.uri,
        serial,
        args.place.devices.backends(),
        args.place.dirty,
    )?);
    let uri = receiver.local_uri().to_string();
    let vmm = Vmm::receiving(uri.clone())?;
    let server = bind(args.place.api.as_deref(), None, &vmm)?;
    say(&format!("waiting on {uri} for a guest"));
    let (arriving, receiving) = (Arc::clone(&receiver), vmm.clone());
    std::thread::Builder::new()
        .name("ferry-arrivals".into())
        .spawn(move || receive(&arriving, &receiving))?;
    let result = serve(&vmm, server, signals, &args.place.serial, &spool);
    // Kept until here: it answers a source that asks again whether its guest has arrived.
    drop(receiver);
    result
}

fn receive(receiver: &Arc<Receiver>, vmm: &Vmm) {
    while vmm.outcome().is_none() {
        match receiver.wait(PATIENCE) {
            None => {}
            Some(Arrival::Failed(sentence)) => {
                if receiver.state() == ReceiveState::Waiting {
                    vmm.arrival_failed(receiver.local_uri().to_string());
                }
                say(&sentence);
            }
            Some(Arrival::InDoubt(sentence)) => {
                say(&sentence);
                vmm.unconfirmed(sentence, Arc::clone(receiver) as _);
            }
            Some(Arrival::Complete) => say("all of the guest's memory has arrived"),
            Some(Arrival::Interrupted(sentence)) => say(&sentence),
            Some(Arrival::Arrived { machine, following }) => {
                let running = machine.run_state() == RunState::Running;
                let guest = MachineGuest::followed(machine, following);
                vmm.arrived(Arc::clone(&guest) as _, running);
                say(match running {
                    true => "the guest has arrived and runs here",
                    false => "the guest has arrived, paused as it was; `ferry resume` lets it run",
                });
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
