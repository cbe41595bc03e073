//! The standard library's sockets as links.

use super::*;
use crate::destination;
use crate::options::{Compress, OnTimeout};
use crate::report::Status;
use crate::testing::{TestDestination, TestSource};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

fn pairs() -> [(StreamLink, StreamLink); 2] {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let ours = StreamLink::connect_tcp(listener.local_addr().unwrap()).unwrap();
    let theirs = StreamLink::tcp(listener.accept().unwrap().0).unwrap();
    let (left, right) = UnixStream::pair().unwrap();
    let unix = |stream| StreamLink::unix(stream).unwrap();
    [(ours, theirs), (unix(left), unix(right))]
}

#[test]
fn waiting_takes_no_byte_away() {
    for (mut ours, mut theirs) in pairs() {
        assert!(!theirs.readable().unwrap());
        assert!(!theirs.wait_readable(Duration::from_millis(5)).unwrap());
        ours.send(b"head", b"body").unwrap();
        assert!(theirs.wait_readable(Duration::from_secs(60)).unwrap());
        assert!(theirs.readable().unwrap());
        let mut bytes = [0; 8];
        theirs.recv(&mut bytes).unwrap();
        assert_eq!(&bytes, b"headbody");
        assert!(!theirs.readable().unwrap());
        drop(ours);
        // The end of the stream can be read, too.
        assert!(theirs.wait_readable(Duration::from_secs(60)).unwrap());
        let end = theirs.recv(&mut bytes).unwrap_err();
        assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);
    }
}

#[test]
fn a_silent_peer_and_a_cancelled_wait_end_a_receive() {
    for (mut ours, _theirs) in pairs() {
        ours.set_timeout(Some(Duration::from_millis(1)));
        let error = ours.recv(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        // A link waits for ever, but for its cancelling.
        ours.set_timeout(None);
        let cancelled = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&cancelled);
        ours.cancelled_by(move || asked.swap(true, Ordering::SeqCst));
        let error = ours.recv(&mut [0]).unwrap_err();
        assert!(error.to_string().contains("cancelled"), "{error}");
        assert!(cancelled.load(Ordering::SeqCst));
    }
}

#[test]
fn sessions_differ() {
    let mut all: Vec<_> = (0..100).map(|_| session_id().0).collect();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 100);
}

#[test]
fn a_guest_moves_on_several_channels_over_tcp_and_unix() {
    let dir = std::env::temp_dir().join(format!("ferry-net-{}", std::process::id()));
    let _ = std::fs::remove_file(&dir);
    for unix in [false, true] {
        let listener = if unix {
            Listener::unix(&dir).unwrap()
        } else {
            Listener::tcp("127.0.0.1:0").unwrap()
        };
        let address = listener.address();
        assert_eq!(address.is_none(), unix);
        let source = TestSource::new(5000);
        let destination = TestDestination::new(5000);
        let options = Options {
            channels: Some(3),
            compress: Compress::None,
            on_timeout: OnTimeout::Stop,
            verify: true,
            ..Options::default()
        };
        let there = destination.clone();
        let report = std::thread::scope(|scope| {
            let accept = |timeout| listener.accept(timeout);
            let peer =
                scope.spawn(move || receive(accept, there, destination::Timeouts::default()));
            let report = migrate(
                &source,
                || match address {
                    Some(address) => StreamLink::connect_tcp(address),
                    None => StreamLink::connect_unix(&dir),
                },
                &options,
            );
            assert!(peer.join().unwrap().is_ok());
            report
        });
        assert_eq!(report.status, Status::Completed, "{:?}", report.error);
        assert_eq!(report.channels.opened, 3, "{:?}", report.channels);
        assert!(source.memory() == destination.memory());
        assert!(destination.runs() && !source.runs());
    }
    let _ = std::fs::remove_file(dir);
}
