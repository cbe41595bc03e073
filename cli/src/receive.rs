//! `ferry receive`.

use super::devices::VsockFile;
use super::passed::Source;
use super::security;
use super::serve::{Place, Signals, serve};
use ferry_terminal::output::{Failure, say};
use ferry_terminal::units::duration;
use ferry_vmm::machine::Backends;
use ferry_vmm::migrate::{Listener, ReceiveState, Receiver, Uri};
use ferry_vmm::thread;
use ferry_vmm::vmm::{Arrivals, Vmm};
use std::process::ExitCode;
use std::sync::{Arc, Weak, mpsc};
use std::time::{Duration, Instant};

/// Wait for a guest to be migrated here, then be its VMM.
///
/// The guest's size and processors come with it. Give what is behind its disks and network cards
/// here, in the same order, and its vsock. After a migration that fails before the guest has moved,
/// this waits for the next one. The keys and signals of `ferry run` work here too.
///
/// On unix:PATH the guest comes from a process on this host, which hands over the memory itself
/// instead of copying it: the way to go on under a newer ferry. The taps of its network cards come
/// too. Give --net only if a card gets another tap here, and then for each card.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  ferry receive tcp:0.0.0.0:7000 --tls /etc/ferry/pki --name web
  ferry receive tcp:0.0.0.0:7000 --pair --name web --disk /net/disk.img --net tap=tap0
  ferry receive unix:/tmp/link --api /tmp/b.sock")]
pub struct Args {
    /// Where to wait: tcp:HOST:PORT (port 0 takes a free one) or unix:PATH. Or a socket that
    /// listens already: the open descriptor N (fd:N), or systemd's with FileDescriptorName=receive
    /// (systemd) or another (systemd:NAME).
    #[arg(value_name = "URI")]
    from: Source,
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    security: security::Receiver,
    /// Take a guest although a disk given here is not the file that it uses on this host, or this
    /// host's CPU (vendor, frequency of its time stamp counter, IA32_ARCH_CAPABILITIES) is not what
    /// the guest counts on.
    #[arg(long)]
    force: bool,
    /// End where no guest has begun to arrive for so long; without it, wait for ever.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    wait: Option<Duration>,
}

/// How often is looked whether a guest has come.
const LOOK: Duration = Duration::from_millis(500);

pub fn run(args: &Args) -> Result<ExitCode, Failure> {
    let signals = Signals::take()?;
    let passed = args.from.passed()?;
    let (gate, line) = args.security.gate(args.from.uri(passed.as_ref())?)?;
    let socket = args.place.socket()?;
    let console = args.place.console(&socket, |files| {
        if let Source::Uri(Uri::Unix(path)) = &args.from {
            files.socket(path);
        }
    })?;
    let listener = match passed {
        Some(listener) => listener,
        None => Listener::bind(args.from.uri(None)?)?,
    };
    let listener = listener.behind(gate);
    let uri = listener.local_uri().to_string();
    let vmm = Vmm::receiving(uri.clone())?;
    console.lines.tell(&vmm);
    vmm.set_setup(console.setup);
    let server = socket.bind(&vmm)?;
    let _scraped = console.scraping.serve(&vmm)?;
    // An arrival is booked before the source gets its answer. Printing it is this thread's, so that
    // no migration waits for a terminal.
    let (tell, told) = mpsc::channel::<String>();
    let telling = move || {
        told.iter().for_each(|sentence| say(&sentence));
        Ok(())
    };
    let failure = |why: String| say(&format!("arrivals are not told any more: {why}"));
    thread::spawn(thread::Kind::Vmm, "ferry-arrivals", telling, failure)?;
    let owner = Arrivals::new(vmm.clone(), uri.clone(), move |sentence| {
        // The thread lives as long as this does.
        let _ = tell.send(sentence);
    });
    if let Some(line) = line {
        say(&format!("the source needs: --pair {line}"));
    }
    say(&format!("waiting on {uri} for a guest"));
    let vsock = VsockFile::of(&console.backends);
    let receiver = Receiver::of(
        listener,
        console.serial,
        Backends {
            insist: args.force,
            ..console.backends
        },
        args.place.dirty,
        Arc::new(owner),
    )?;
    let receiver = Arc::new(receiver);
    if let Some(wait) = args.wait {
        give_up(Arc::downgrade(&receiver), vmm.clone(), wait)?;
    }
    // Held until the end: it answers a source that asks again whether its guest has arrived.
    let held = (args.place.observe.linger(), (receiver, vsock));
    serve(&vmm, server, signals, &console.lines, held)
}

/// Ends the VMM when it has waited for a guest for so long.
fn give_up(receiver: Weak<Receiver>, vmm: Vmm, wait: Duration) -> Result<(), Failure> {
    let watch = move || {
        let mut since = Instant::now();
        while since.elapsed() < wait {
            std::thread::sleep(LOOK.min(wait));
            match receiver.upgrade().map(|receiver| receiver.state()) {
                Some(ReceiveState::Waiting) => {}
                // One that fails has taken its time.
                Some(_) => since = Instant::now(),
                None => return Ok(()),
            }
        }
        if let Some(sentence) = vmm.interrupt("after --wait") {
            say(&sentence);
        }
        Ok(())
    };
    let failure = |why: String| say(&format!("this waits for ever: {why}"));
    thread::spawn(thread::Kind::Vmm, "ferry-wait", watch, failure)?;
    Ok(())
}
