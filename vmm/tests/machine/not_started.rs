//! A guest in doubt that the destination never started is at the source again as it was before its
//! migration.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ferry_migration::destination::exchange_preamble;
use ferry_migration::options::{Options, Tracking};
use ferry_migration::report::Status;
use ferry_migration::wire::AbortCode;
use ferry_vmm::machine::{Backends, Machine, PauseError, ResumeError, RunState};
use ferry_vmm::migrate::{
    Arrival, Handle, Listener, Owner, Receiver, StreamLink, Uri, migrate, recover,
};

use crate::support::{COUNT, COUNTER, kvm, machine, progresses, read};

/// The connections through a proxy.
type Open = Arc<Mutex<Vec<TcpStream>>>;

/// Loses the connections when the commit comes, and starts no guest.
struct Lossy(Open);

impl Owner for Lossy {
    fn wants(&self) -> Result<(), String> {
        Ok(())
    }

    fn claim(&self) -> Result<(), String> {
        for connection in self.0.lock().unwrap().drain(..) {
            connection.shutdown(Shutdown::Both).unwrap();
        }
        Err("the commit's connection was lost".into())
    }

    fn arrival(&self, arrival: Arrival) {
        assert!(!matches!(arrival, Arrival::Arrived { .. }), "{arrival:?}");
    }
}

/// Forwards connections to `to`.
fn proxy(to: &Uri, open: Open) -> Uri {
    let to = to.to_string().trim_start_matches("tcp:").to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for near in listener.incoming() {
            let (near, far) = (near.unwrap(), TcpStream::connect(&to).unwrap());
            open.lock().unwrap().push(near.try_clone().unwrap());
            for (mut from, mut into) in [
                (near.try_clone().unwrap(), far.try_clone().unwrap()),
                (far, near),
            ] {
                std::thread::spawn(move || {
                    let _ = copy(&mut from, &mut into);
                    let _ = into.shutdown(Shutdown::Write);
                });
            }
        }
    });
    format!("tcp:{address}").parse().unwrap()
}

fn copy(from: &mut TcpStream, into: &mut TcpStream) -> io::Result<()> {
    let mut buffer = [0; 16 << 10];
    loop {
        let read = from.read(&mut buffer)?;
        if read == 0 {
            return Ok(());
        }
        into.write_all(&buffer[..read])?;
    }
}

/// A receiver that answers every question for a guest with NOT STARTED.
fn never_started() -> Uri {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let link = StreamLink::tcp(listener.accept().unwrap().0).unwrap();
        let (mut channel, _) = exchange_preamble(link, Duration::from_secs(10)).unwrap();
        channel.send_abort_as(AbortCode::NotStarted, "no guest was started here");
    });
    format!("tcp:{address}").parse().unwrap()
}

#[test]
fn what_was_paused_before_a_migration_is_paused_after_its_recovery() {
    if !kvm() {
        return;
    }
    for runs in [false, true] {
        let source = Arc::new(machine(Machine::builder(), &COUNT));
        source.resume().unwrap();
        progresses(&source, COUNTER);
        if !runs {
            source.pause().unwrap().keep_paused();
        }
        let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let open = Open::default();
        let to = proxy(listener.local_uri(), Arc::clone(&open));
        let _receiver = Receiver::of(
            listener,
            Arc::new(|| Ok(Box::new(std::io::sink()) as _)),
            Backends::default(),
            Tracking::Auto,
            Arc::new(Lossy(open)),
        )
        .unwrap();
        let options = Options::default();
        let report = migrate(&source, &to, &options, &Handle::new(), &mut |_| {});
        assert_eq!(report.status, Status::InDoubt, "{report:#?}");
        assert_eq!(source.run_state(), RunState::Committed);
        // An embedder may hold the machine still: that gives no second copy of the guest.
        assert_eq!(source.resume(), Err(ResumeError::Committed));
        assert_eq!(source.pause().err(), Some(PauseError::Committed));
        let count = read(&source, COUNTER);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(read(&source, COUNTER), count);
        let report = recover(
            &source,
            never_started(),
            &report.session,
            &options,
            &Handle::in_doubt(),
            &mut |_| {},
        );
        assert_eq!(report.status, Status::Failed, "{report:#?}");
        let after = [RunState::Paused, RunState::Running];
        assert_eq!(source.run_state(), after[usize::from(runs)]);
    }
}
