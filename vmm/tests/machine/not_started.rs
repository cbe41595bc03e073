//! A guest in doubt that the destination never started is at the source again as it was before its
//! migration.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ferry_devices::block::Disk;
use ferry_migration::destination::exchange_preamble;
use ferry_migration::options::{Options, Tracking};
use ferry_migration::report::Status;
use ferry_migration::wire::AbortCode;
use ferry_vmm::machine::{Backends, Machine, PauseError, ResumeError, RunState};
use ferry_vmm::migrate::{
    Arrival, Handle, Listener, Owner, Receiver, StreamLink, Uri, migrate, recover,
};

use crate::support::{COUNT, COUNTER, kvm, machine, progresses, read};
use crate::virtio::{backends, disk, writer};

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

/// A receiver that answers the question for a guest with NOT STARTED.
fn never_started() -> Uri {
    never_started_after(|| {})
}

/// As [`never_started`], after `asked` was called.
fn never_started_after(asked: impl FnOnce() + Send + 'static) -> Uri {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let link = StreamLink::tcp(listener.accept().unwrap().0).unwrap();
        let (mut channel, _) = exchange_preamble(link, Duration::from_secs(10)).unwrap();
        asked();
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

/// A session's name, not that of zeros, which is no session: the receivers here answer for any.
fn session() -> String {
    "5a".repeat(16)
}

/// Another program has the source's disk by the time the destination gives the guest back.
#[test]
fn a_guest_that_comes_back_to_a_locked_disk_is_here_and_paused() {
    if !kvm() {
        return;
    }
    let file = disk();
    let source = Arc::new(writer(Machine::builder().devices(backends(file.path()))));
    source.resume().unwrap();
    progresses(&source, COUNTER);
    let theft = Disk::open(file.path(), false).unwrap();
    let hand_over = || {
        let paused = source.pause().unwrap();
        source.release_disks().unwrap();
        paused.commit();
        theft.lock().unwrap();
    };
    hand_over();
    let options = Options::default();
    let handle = Handle::in_doubt();
    let report = recover(
        &source,
        never_started(),
        &session(),
        &options,
        &handle,
        &mut |_| {},
    );
    assert_eq!(report.status, Status::Failed, "{report:#?}");
    let error = report.error.unwrap();
    assert!(error.contains("the guest is here, and paused"), "{error}");
    assert_eq!(source.run_state(), RunState::Paused);
    assert!(matches!(source.resume(), Err(ResumeError::Disk(_))));
    theft.unlock().unwrap();
    source.resume().unwrap();
    progresses(&source, COUNTER);

    // An operator's word does not help against the lock either, and can be repeated.
    hand_over();
    assert!(matches!(source.take_over(), Err(ResumeError::Disk(_))));
    assert_eq!(source.run_state(), RunState::Committed);
    theft.unlock().unwrap();
    source.take_over().unwrap();
    progresses(&source, COUNTER);
}

/// The destination may start the guest as soon as it has read COMMIT.
#[test]
fn a_guest_that_is_asked_about_is_not_taken_over() {
    if !kvm() {
        return;
    }
    let source = Arc::new(machine(Machine::builder(), &COUNT));
    source.resume().unwrap();
    source.pause().unwrap().commit();
    let (tell, told) = std::sync::mpsc::channel();
    let asked = Arc::clone(&source);
    let to = never_started_after(move || {
        let again = recover(
            &asked,
            "tcp:127.0.0.1:9".parse::<Uri>().unwrap(),
            &session(),
            &Options::default(),
            &Handle::in_doubt(),
            &mut |_| {},
        );
        tell.send((asked.take_over(), again)).unwrap();
    });
    let options = Options::default();
    let report = recover(
        &source,
        to,
        &session(),
        &options,
        &Handle::in_doubt(),
        &mut |_| {},
    );
    let (take_over, again) = told.recv().unwrap();
    assert_eq!(take_over, Err(ResumeError::Asked));
    assert_eq!(again.status, Status::InDoubt, "{again:#?}");
    assert_eq!(report.status, Status::Failed, "{report:#?}");
    progresses(&source, COUNTER);

    // Nothing answers: the operator decides.
    source.pause().unwrap().commit();
    let closed: Uri = "tcp:127.0.0.1:9".parse().unwrap();
    let handle = Handle::in_doubt();
    let report = recover(&source, closed, &session(), &options, &handle, &mut |_| {});
    assert_eq!(report.status, Status::InDoubt, "{report:#?}");
    source.take_over().unwrap();
    progresses(&source, COUNTER);
}
